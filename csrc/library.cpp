// Module init of ssod_fast._C. Importing it runs the static registrars of csrc/cpu/*.cpp; Python sees only how it was
// built.
#include <Python.h>
#include <torch/headeronly/version.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C",
                                   "CPU kernels of ssod_fast, registered with the torch dispatcher.", -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module) {
    PyModule_AddStringConstant(module, "build", "C++ compiler " __VERSION__ ", torch headers " TORCH_VERSION);
  }
  return module;
}

// Module init of ssod_fast._C. Importing it runs the static registrars of csrc/cpu/*.cpp; it has no Python contents.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "CPU kernels of ssod_fast, registered with the torch dispatcher.", -1, nullptr};
  return PyModule_Create(&module);
}

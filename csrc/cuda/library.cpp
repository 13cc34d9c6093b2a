// Module init of ssod_fast._C_cuda. Importing it runs the static registrars of csrc/cuda/*.cu; Python sees only how it
// was built.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda",
                                   "CUDA kernels of ssod_fast, registered with the torch dispatcher.", -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module) {
    PyModule_AddStringConstant(module, "build",
                               "CUDA " TEXT(CUDART_VERSION) " for " TEXT(
                                   SSOD_FAST_ARCHS) ", C++ compiler " __VERSION__ ", torch headers " TORCH_VERSION);
  }
  return module;
}

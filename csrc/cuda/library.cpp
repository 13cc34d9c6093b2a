// Module init of ssod_fast._C_cuda. Importing it runs the static registrars of csrc/cuda/*.cu; it has no Python contents.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of ssod_fast, registered with the torch dispatcher.", -1, nullptr};
  return PyModule_Create(&module);
}

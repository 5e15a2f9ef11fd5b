// The operators' schemas and the Python module that loads them. Their public, documented face is
// dk_detectron/ops/; the kernels register themselves in cpu/ and cuda/.
#include <Python.h>
#include <torch/library.h>

extern "C" PyObject* PyInit__C() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

TORCH_LIBRARY(dk_detectron, m) {
  m.set_python_module("dk_detectron.ops");
  m.def(
      "deform_kernel_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? kernel_offset, "
      "Tensor? data_offset, *, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, SymInt groups, bool clip) -> Tensor");
  // The gradients that output_mask asks for, in the order input, weight, kernel_offset,
  // data_offset.
  m.def(
      "deform_kernel_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "Tensor? kernel_offset, Tensor? data_offset, *, SymInt[2] kernel_size, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool clip, bool[4] output_mask) "
      "-> Tensor[]");
}

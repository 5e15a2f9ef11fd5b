// The operators' schemas and the Python module that loads them. Their public, documented face is
// dk_detectron/ops/; the kernels register themselves in cpu/ and cuda/.
#include <Python.h>

#include "stable.h"

extern "C" PyObject* PyInit__C() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

STABLE_TORCH_LIBRARY(dk_detectron, m) {
  m.def(
      "deform_kernel_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? kernel_offset, "
      "Tensor? data_offset, *, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, SymInt groups, bool clip) -> Tensor");
  // The gradients that output_mask asks for, in the order input, weight, kernel_offset,
  // data_offset. `deterministic` is torch's switch of that name, which the stable ABI cannot read.
  m.def(
      "deform_kernel_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "Tensor? kernel_offset, Tensor? data_offset, *, SymInt[2] kernel_size, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool clip, bool[4] output_mask, "
      "bool deterministic=False) -> Tensor[]");
}

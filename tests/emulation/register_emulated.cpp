// The CUDA host functions as CPU operators of another namespace, under the schemas of dk_detectron,
// which must be loaded before.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "cuda/deform_kernel_cuda.h"

namespace {
c10::FunctionSchema schema_of(const std::string& name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(("dk_detectron::" + name).c_str(), "")
      .schema()
      .cloneWithName("dk_emulated::" + name, "");
}
}  // namespace

TORCH_LIBRARY(dk_emulated, m) {
  m.def(schema_of("deform_kernel_conv2d"));
  m.def(schema_of("deform_kernel_conv2d_backward"));
}

TORCH_LIBRARY_IMPL(dk_emulated, CPU, m) {
  m.impl("deform_kernel_conv2d", &dk::deform_kernel_conv2d_cuda);
  m.impl("deform_kernel_conv2d_backward", &dk::deform_kernel_conv2d_backward_cuda);
}

// Apart from the operators, so that the tests can register them elsewhere (tests/emulation).
#include <torch/library.h>

#include "deform_kernel_cuda.h"

TORCH_LIBRARY_IMPL(dk_detectron, CUDA, m) {
  m.impl("deform_kernel_conv2d", &dk::deform_kernel_conv2d_cuda);
  m.impl("deform_kernel_conv2d_backward", &dk::deform_kernel_conv2d_backward_cuda);
}

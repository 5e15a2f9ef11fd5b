// Apart from the operators, so that the tests can register them elsewhere (tests/emulation).
#include "deform_kernel_cuda.h"

STABLE_TORCH_LIBRARY_IMPL(dk_detectron, CUDA, m) {
  m.impl("deform_kernel_conv2d", TORCH_BOX(&dk::deform_kernel_conv2d_cuda));
  m.impl("deform_kernel_conv2d_backward", TORCH_BOX(&dk::deform_kernel_conv2d_backward_cuda));
}

// The CUDA host functions as CPU operators of another namespace; plugin.py defines their schemas.
#include "cuda/deform_kernel_cuda.h"

STABLE_TORCH_LIBRARY_IMPL(dk_emulated, CPU, m) {
  m.impl("deform_kernel_conv2d", TORCH_BOX(&dk::deform_kernel_conv2d_cuda));
  m.impl("deform_kernel_conv2d_backward", TORCH_BOX(&dk::deform_kernel_conv2d_backward_cuda));
}

// One type per file, so that they build in parallel.
#include "forward.cuh"
#include "forward_matrix.cuh"

DK_INSTANTIATE_FORWARD(float)
DK_INSTANTIATE_FORWARD_MATRIX(float)

namespace dk {
namespace cuda {

int compiled_for() {
  cudaFuncAttributes attributes{};
  check_launch(cudaFuncGetAttributes(&attributes, forward_matrix_kernel<float, 4>));
  return attributes.ptxVersion;
}

}  // namespace cuda
}  // namespace dk

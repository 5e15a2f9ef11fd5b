// Kernels of one warp for the tests of what csrc/cuda/mma.cuh has, as PTX and emulated. Each thread
// reads its registers from the arguments, and writes them there.
#include "cuda/mma.cuh"

#define KERNEL extern "C" __global__ void

namespace {
template <typename half_t>
__device__ void product_of(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x % 32;
  uint32_t a_part[4], b_part[2];
  float d_part[4];
  for (int i = 0; i < 4; ++i) a_part[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) b_part[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) d_part[i] = d[4 * lane + i];
  dk::cuda::mma<half_t>(d_part, a_part, b_part);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = d_part[i];
}
}  // namespace

KERNEL product_half(const uint32_t* a, const uint32_t* b, float* d) {
  product_of<c10::Half>(a, b, d);
}

KERNEL product_bfloat16(const uint32_t* a, const uint32_t* b, float* d) {
  product_of<c10::BFloat16>(a, b, d);
}

KERNEL transpose(const uint32_t* rows, const uint32_t*, float* columns) {
  reinterpret_cast<uint32_t*>(columns)[threadIdx.x] = dk::cuda::transposed(rows[threadIdx.x]);
}

KERNEL product_of_half_a_warp(const uint32_t* a, const uint32_t* b, float* d) {
  if (threadIdx.x < 16) product_of<c10::Half>(a, b, d);
}

KERNEL transpose_of_half_a_warp(const uint32_t* rows, const uint32_t*, float* columns) {
  if (threadIdx.x >= 16) return;
  reinterpret_cast<uint32_t*>(columns)[threadIdx.x] = dk::cuda::transposed(rows[threadIdx.x]);
}

// For tests of what csrc/cuda/mma.cuh has, as PTX and emulated: each thread reads its registers
// from the arguments, and writes its results there. Half a warp is a fault, at the line marked so.
#include "cuda/mma.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#define KERNEL extern "C" __global__ void

namespace {
__device__ inline int thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <typename half_t>
__device__ void product_of(const uint32_t* a, const uint32_t* b, float* d) {
  const int n = thread();
  uint32_t a_part[4], b_part[2];
  float d_part[4];
  for (int i = 0; i < 4; ++i) a_part[i] = a[4 * n + i];
  for (int i = 0; i < 2; ++i) b_part[i] = b[2 * n + i];
  for (int i = 0; i < 4; ++i) d_part[i] = d[4 * n + i];
  dk::cuda::mma<half_t>(d_part, a_part, b_part);  // fault
  for (int i = 0; i < 4; ++i) d[4 * n + i] = d_part[i];
}
}  // namespace

KERNEL product_half(const uint32_t* a, const uint32_t* b, float* d) {
  product_of<c10::Half>(a, b, d);
}

KERNEL product_bfloat16(const uint32_t* a, const uint32_t* b, float* d) {
  product_of<c10::BFloat16>(a, b, d);
}

KERNEL transpose(const uint32_t* rows, const uint32_t*, float* columns) {
  reinterpret_cast<uint32_t*>(columns)[thread()] = dk::cuda::transposed(rows[thread()]);
}

KERNEL product_of_half_a_warp(const uint32_t* a, const uint32_t* b, float* d) {
  if (threadIdx.x < 16) product_of<c10::Half>(a, b, d);
}

KERNEL transpose_of_half_a_warp(const uint32_t* rows, const uint32_t*, float* columns) {
  if (threadIdx.x >= 16) return;
  const uint32_t column = dk::cuda::transposed(rows[thread()]);  // fault
  reinterpret_cast<uint32_t*>(columns)[thread()] = column;
}

#ifdef __CUDACC__
namespace {
template <typename pair_t>
__device__ float bits_of(pair_t pair) {
  return __uint_as_float(reinterpret_cast<uint32_t&>(pair));
}
}  // namespace

// What puts numbers of 16 bits together: of two floats, and a selector or shift.
KERNEL packing(const uint32_t* pairs, const uint32_t* selectors, float* d) {
  const uint32_t x = pairs[2 * thread()], y = pairs[2 * thread() + 1], n = selectors[thread()];
  float* out = d + 5 * thread();
  out[0] = bits_of(__floats2half2_rn(__uint_as_float(x), __uint_as_float(y)));
  out[1] = bits_of(__floats2bfloat162_rn(__uint_as_float(x), __uint_as_float(y)));
  uint32_t bytes;
  // __byte_perm knows no signs.
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(x), "r"(y), "r"(n));
  out[2] = __uint_as_float(bytes);
  out[3] = __uint_as_float(__funnelshift_l(x, y, n));
  out[4] = __uint_as_float(__funnelshift_rc(x, y, n));
}
#endif

// For tests of what csrc/cuda/mma.cuh has, and of sums of vectors, as PTX and emulated: each thread
// reads its registers from the arguments, and writes its results there. Faults are at the lines
// marked so: half a warp at a product, and what copies and sums must not do.
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

namespace {
__device__ dk::cuda::Vector<float, 4> vector_of(const uint32_t* words) {
  return *reinterpret_cast<const dk::cuda::Vector<float, 4>*>(words + 4 * thread());
}
}  // namespace

// Each thread adds its vector to that of the thread that `to` names.
KERNEL sum(const uint32_t* vectors, const uint32_t* to, float* d) {
  dk::cuda::atomic_add(d + 4 * to[thread()], vector_of(vectors));
}

namespace {
__device__ void write_word(float* d, uint32_t word) {
  reinterpret_cast<uint32_t*>(d)[thread()] = word;
}

template <typename half_t>
__device__ void sums_of_pairs(const uint32_t* factors, const uint32_t* summands, float* d) {
  const int n = thread();
  write_word(d, dk::cuda::multiply_add<half_t>(factors[2 * n], factors[2 * n + 1], summands[n]));
}
}  // namespace

// a * b + c of pairs of numbers.
KERNEL sums_half(const uint32_t* factors, const uint32_t* summands, float* d) {
  sums_of_pairs<c10::Half>(factors, summands, d);
}

KERNEL sums_bfloat16(const uint32_t* factors, const uint32_t* summands, float* d) {
  sums_of_pairs<c10::BFloat16>(factors, summands, d);
}

// One number of a pair, twice: the second of every other thread's.
KERNEL doubled(const uint32_t* pairs, const uint32_t*, float* d) {
  const uint32_t pair = pairs[thread()];
  write_word(d, thread() % 2 ? dk::cuda::doubled(pair, 1) : dk::cuda::doubled(pair, 0));
}

#ifdef __CUDACC__
KERNEL sum_beyond(const uint32_t* vectors, const uint32_t*, float* d) {
  dk::cuda::atomic_add(d + 4 * (thread() + 1), vector_of(vectors));  // fault
}

KERNEL sum_misaligned(const uint32_t* vectors, const uint32_t*, float* d) {
  dk::cuda::atomic_add(d + thread(), vector_of(vectors));  // fault
}

KERNEL sum_read_at_once(const uint32_t* vectors, const uint32_t*, float* d) {
  const float other = d[4 * (thread() ^ 1) + 3];
  auto x = vector_of(vectors);
  x.v[0] += other;
  dk::cuda::atomic_add(d + 4 * thread(), x);  // fault
}
#endif

#ifndef DK_SHARED_MEMORY
extern __shared__ __align__(16) unsigned char copied[];
#define DK_SHARED_MEMORY(name) unsigned char* const name = copied
#endif

namespace {
__device__ void write(float* d, const uint32_t* words) {
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(d)[4 * thread() + i] = words[i];
}
}  // namespace

// Through shared memory, to the thread on the other end of the warp; but zeros where `reads` is 0,
// from a source that does not exist.
KERNEL copy(const uint32_t* source, const uint32_t* reads, float* d) {
  DK_SHARED_MEMORY(memory);
  uint32_t* const words = reinterpret_cast<uint32_t*>(memory);
  const bool real = reads[thread()];
  const uint32_t* const from = real ? source + 4 * thread() : source - (1 << 20);
  dk::cuda::copy_async(words + 4 * threadIdx.x, from, real);
  dk::cuda::wait_for_copies();
  __syncthreads();
  write(d, words + 4 * (threadIdx.x ^ 31));
}

KERNEL copy_beyond(const uint32_t* source, const uint32_t*, float*) {
  DK_SHARED_MEMORY(memory);
  const uint32_t* const from = source - 4 + 4 * thread();
  dk::cuda::copy_async(memory + 16 * threadIdx.x, from, true);  // fault
  dk::cuda::wait_for_copies();
}

KERNEL copy_beyond_shared(const uint32_t* source, const uint32_t*, float*) {
  DK_SHARED_MEMORY(memory);
  dk::cuda::copy_async(memory + 16 * (threadIdx.x + 1), source + 4 * thread(), true);  // fault
  dk::cuda::wait_for_copies();
}

KERNEL copy_misaligned(const uint32_t* source, const uint32_t*, float*) {
  DK_SHARED_MEMORY(memory);
  const uint32_t* const from = source + 4 * thread() + 2;
  dk::cuda::copy_async(memory + 16 * threadIdx.x, from, thread() != 31);  // fault
  dk::cuda::wait_for_copies();
}

KERNEL copy_misaligned_in_shared(const uint32_t* source, const uint32_t*, float*) {
  DK_SHARED_MEMORY(memory);
  dk::cuda::copy_async(memory + 8 * threadIdx.x, source + 4 * thread(), true);  // fault
  dk::cuda::wait_for_copies();
}

KERNEL copy_read_too_early(const uint32_t* source, const uint32_t*, float* d) {
  DK_SHARED_MEMORY(memory);
  const uint32_t* const words = reinterpret_cast<uint32_t*>(memory) + 4 * threadIdx.x;
  dk::cuda::copy_async(memory + 16 * threadIdx.x, source + 4 * thread(), true);
  reinterpret_cast<uint32_t*>(d)[4 * thread()] = words[0];  // fault
  dk::cuda::wait_for_copies();
}

// Their own threads wait, but no barrier comes between.
KERNEL copy_read_by_another(const uint32_t* source, const uint32_t*, float* d) {
  DK_SHARED_MEMORY(memory);
  const uint32_t* const words = reinterpret_cast<uint32_t*>(memory) + 4 * (threadIdx.x ^ 31);
  dk::cuda::copy_async(memory + 16 * threadIdx.x, source + 4 * thread(), true);
  dk::cuda::wait_for_copies();
  reinterpret_cast<uint32_t*>(d)[4 * thread()] = words[0];  // fault
}

// The barrier comes before the wait.
KERNEL copy_awaited_too_late(const uint32_t* source, const uint32_t*, float* d) {
  DK_SHARED_MEMORY(memory);
  const uint32_t* const words = reinterpret_cast<uint32_t*>(memory) + 4 * (threadIdx.x ^ 31);
  dk::cuda::copy_async(memory + 16 * threadIdx.x, source + 4 * thread(), true);
  __syncthreads();
  dk::cuda::wait_for_copies();
  reinterpret_cast<uint32_t*>(d)[4 * thread()] = words[0];  // fault
}

KERNEL copy_never_awaited(const uint32_t* source, const uint32_t*, float*) {
  DK_SHARED_MEMORY(memory);
  dk::cuda::copy_async(memory + 16 * threadIdx.x, source + 4 * thread(), true);
}

#ifdef __CUDACC__
// Of 16 bytes, as many as `sizes` says.
KERNEL copy_in_part(const uint32_t* source, const uint32_t* sizes, float* d) {
  DK_SHARED_MEMORY(memory);
  uint32_t* const words = reinterpret_cast<uint32_t*>(memory) + 4 * threadIdx.x;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(words))),
               "l"(source + 4 * thread()), "r"(sizes[thread()])
               : "memory");
  dk::cuda::wait_for_copies();
  write(d, words);
}

namespace {
template <typename pair_t>
__device__ float bits_of(pair_t pair) {
  return __uint_as_float(reinterpret_cast<uint32_t&>(pair));
}
}  // namespace

// Of bfloat16: multiplied.
KERNEL pairs(const uint32_t* factors, const uint32_t*, float* d) {
  write_word(d, dk::cuda::multiplied(factors[2 * thread()], factors[2 * thread() + 1]));
}

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

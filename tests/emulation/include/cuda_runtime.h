// Stands before the toolkit's header on the include path: just enough CUDA for csrc/cuda to compile as
// C++, with each block's threads run as fibers on the CPU by ../emulator.cpp. For tests only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define DK_SHARED_MEMORY(name) unsigned char* const name = emulated::shared_memory

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

#define DK_EMULATED_STATE extern thread_local __attribute__((tls_model("initial-exec")))
DK_EMULATED_STATE dim3 thread_index, block_index, block_size, grid_size;
DK_EMULATED_STATE unsigned char* shared_memory;

// Whether a launch was run by something else than run_grid (dk_emulated_set_launcher).
bool launched_elsewhere(void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, int count,
                        void** args, const std::size_t* sizes);

// The shared memory that a kernel may be launched with: 48 KB, as on the device, until it is set.
int& shared_limit(void* kernel);

// Runs a grid, one block after the other; throws if its threads cannot all reach a barrier.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);

// Called by the threads.
void block_barrier();
void warp_barrier(int tag);  // tag: what the lanes are here for; all must agree
void yield();
std::uint64_t exchange(std::uint64_t value, int lane_mask);

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulated::warp_barrier(-1); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  if (mask != 0xffffffffu) std::abort();  // the kernels use whole warps
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulated::exchange(bits, lane_mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
void atomicAdd(T* address, T value) {
  emulated::yield();
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  Bits* const word = reinterpret_cast<Bits*>(address);
  Bits before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  T sum;
  do {
    std::memcpy(&sum, &before, sizeof(T));
    sum += value;
    std::memcpy(&after, &sum, sizeof(T));
  } while (!__atomic_compare_exchange_n(word, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

// ---- runtime -------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct CUstream_st* cudaStream_t;

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
// The next launch fails with the error in DK_EMULATED_LAUNCH_ERROR, so that its message can be tested.
cudaError_t emulated_launch_error();
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int bytes) {
  int limit;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (bytes > limit) return cudaErrorInvalidValue;
  emulated::shared_limit(reinterpret_cast<void*>(kernel)) = bytes;
  return cudaSuccess;
}

namespace emulated {
template <typename... P, std::size_t... I>
void call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<P>*>(args[I])...);
}
}  // namespace emulated

template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** args,
                             std::size_t shared_bytes, cudaStream_t) {
  if (const cudaError_t error = emulated_launch_error()) return error;
  int limit;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  limit = std::min(limit, emulated::shared_limit(reinterpret_cast<void*>(kernel)));
  const bool nothing = grid.x * grid.y * grid.z == 0 || block.x * block.y * block.z == 0;
  if (shared_bytes > static_cast<std::size_t>(limit) || block.x * block.y * block.z > 1024 || nothing) {
    return cudaErrorInvalidValue;
  }
  const std::size_t sizes[] = {sizeof(P)...};
  if (emulated::launched_elsewhere(reinterpret_cast<void*>(kernel), grid, block, shared_bytes,
                                   sizeof...(P), args, sizes)) {
    return cudaSuccess;
  }
  emulated::run_grid(grid, block, shared_bytes, [&] {
    emulated::call(kernel, args, std::index_sequence_for<P...>());
  });
  return cudaSuccess;
}

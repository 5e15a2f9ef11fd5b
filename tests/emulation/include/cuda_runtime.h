// Stands before the toolkit's header on the include path: just enough CUDA for csrc/cuda to compile
// as C++, with each block's threads run as fibers on the CPU by ../emulator.cpp. For tests only.
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
constexpr std::size_t kMostGiven = 64;  // bytes of a thread, in an exchange
const void* gather(const void* mine, std::size_t bytes, int tag);

// What each lane of the warp gives, once all have; good until the second exchange from here.
template <typename T>
const T* from_all_lanes(const T& mine, int tag) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMostGiven);
  return static_cast<const T*>(gather(&mine, sizeof(T), tag));
}

// Tags of warp barriers; a shuffle's is its mask, from 0 to 31.
constexpr int kSync = -1, kProduct = -2, kTranspose = -3;

// Ends the launch with an error.
[[noreturn]] void refuse(const char* what);

// What a thread has begun to copy to shared memory. A thread must not return before it is there.
struct Copy {
  void* to;
  unsigned char bytes[16];
};
void remember(const Copy& copy);
bool recall(Copy* copy);  // the oldest that is remembered, if there is one

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulated::warp_barrier(emulated::kSync); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xffffffffu) std::abort();  // the kernels use whole warps
  return emulated::from_all_lanes(value, lane_mask)[threadIdx.x % 32 ^ lane_mask];
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
  } while (
      !__atomic_compare_exchange_n(word, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

// ---- instead of the PTX in csrc/cuda/mma.cuh, which says what these do --------------------------

#define DK_EMULATED_MMA

namespace emulated {

template <typename half_t>
float half_of(std::uint32_t pair, int which) {
  const auto bits = static_cast<std::uint16_t>(pair >> 16 * which);
  return static_cast<float>(half_t(bits, half_t::from_bits()));
}

// A lane's part of the two factors, widened: by register and half of it.
struct Factors {
  float a[4][2], b[2][2];
};

}  // namespace emulated

namespace dk {
namespace cuda {

// Sums in the order of k, each rounded to float; the products are exact. The device's sums may
// round otherwise.
template <typename half_t>
void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  emulated::Factors mine;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) mine.a[i][half] = emulated::half_of<half_t>(a[i], half);
    for (int i = 0; i < 2; ++i) mine.b[i][half] = emulated::half_of<half_t>(b[i], half);
  }
  const emulated::Factors* lanes = emulated::from_all_lanes(mine, emulated::kProduct);
  const unsigned g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (unsigned k = 0; k < 16; ++k) {
    const unsigned owner = k % 8 / 2, upper = k / 8, half = k % 2;  // of k in either factor
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned lower_rows = i / 2, column = 2 * q + i % 2;
      d[i] += lanes[4 * g + owner].a[2 * upper + lower_rows][half] *
              lanes[4 * column + owner].b[upper][half];
    }
  }
}

inline std::uint32_t transposed(std::uint32_t rows) {
  const std::uint32_t* lanes = emulated::from_all_lanes(rows, emulated::kTranspose);
  const unsigned g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  std::uint32_t columns = 0;
  for (unsigned half = 0; half < 2; ++half) {
    const std::uint32_t pair = lanes[4 * (2 * q + half) + g / 2];  // has [2q + half, g]
    columns |= (pair >> 16 * (g % 2) & 0xffffu) << 16 * half;
  }
  return columns;
}

// Comes into effect at the wait, and until then nothing can be read there but 0xFF: who reads too
// early, or writes too early what others still read, shows.
inline void copy_async(void* shared, const void* global, bool reads) {
  const auto to = reinterpret_cast<std::uintptr_t>(shared);
  const auto from = reinterpret_cast<std::uintptr_t>(global);
  if ((to | from) % sizeof(emulated::Copy::bytes)) emulated::refuse("copy_async: not aligned");
  emulated::Copy copy{shared, {}};
  if (reads) std::memcpy(copy.bytes, global, sizeof(copy.bytes));
  std::memset(shared, 0xff, sizeof(copy.bytes));
  emulated::remember(copy);
}

inline void wait_for_copies() {
  emulated::Copy copy;
  while (emulated::recall(&copy)) std::memcpy(copy.to, copy.bytes, sizeof(copy.bytes));
}

}  // namespace cuda
}  // namespace dk

// ---- runtime ------------------------------------------------------------------------------------

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
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct CUstream_st* cudaStream_t;

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
// The next launch fails with the error in DK_EMULATED_LAUNCH_ERROR, to test its message.
cudaError_t emulated_launch_error();
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

int emulated_ptx_version();  // DK_EMULATED_PTX_VERSION
template <typename T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T*) {
  return attributes->ptxVersion = emulated_ptx_version(), cudaSuccess;
}

template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int bytes) {
  int limit;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  // A device takes less, too, but then another thread's launch of the same kernel may fail.
  if (bytes != limit) return cudaErrorInvalidValue;
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
  if (shared_bytes > static_cast<std::size_t>(limit) || block.x * block.y * block.z > 1024 ||
      nothing) {
    return cudaErrorInvalidValue;
  }
  const std::size_t sizes[] = {sizeof(P)...};
  if (emulated::launched_elsewhere(reinterpret_cast<void*>(kernel), grid, block, shared_bytes,
                                   sizeof...(P), args, sizes)) {
    return cudaSuccess;
  }
  emulated::run_grid(grid, block, shared_bytes,
                     [&] { emulated::call(kernel, args, std::index_sequence_for<P...>()); });
  return cudaSuccess;
}

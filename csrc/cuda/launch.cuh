// Starting kernels. No <<<>>> and no `extern __shared__` anywhere else, so that the tests can
// compile the same sources for the CPU (tests/emulation).
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <type_traits>

#include "../stable.h"

// Dynamic shared memory of the block, as bytes.
#ifndef DK_SHARED_MEMORY
#define DK_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#ifdef __CUDA_ARCH__
#define DK_UNROLL _Pragma("unroll")
#define DK_ROLLED _Pragma("unroll 1")
#else
#define DK_UNROLL
#define DK_ROLLED
#endif

namespace dk {
namespace cuda {

// The C shim alone has it.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Vectors need every pixel, and the scope, to begin at a multiple of 16 bytes.
inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

inline void check_launch(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    (void)cudaGetLastError();
    const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
    const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
    DK_CHECK(false,
             "dk_detectron was built without a kernel image for this GPU (compute capability ",
             major, ".", minor, "): rebuild it with TORCH_CUDA_ARCH_LIST=\"", major, ".", minor,
             "\" (", cudaGetErrorString(error), ")");
  }
  STD_CUDA_CHECK(error);
}

// A block gets more than 48 KB of shared memory only on request. All that there is: what is asked
// for counts for all host threads, and another may be about to launch the same kernel with more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

template <typename... Params>
void launch(void (*kernel)(Params...), int64_t blocks, dim3 threads, size_t shared_bytes,
            cudaStream_t stream, const std::common_type_t<Params>&... args) {
  DK_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "deform_kernel_conv2d: ", blocks,
           " blocks are more than one launch takes; split the batch");
  if (shared_bytes > kDefaultSharedBytes) {
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)));
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check_launch(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), threads, pointers,
                                shared_bytes, stream));
}

}  // namespace cuda
}  // namespace dk

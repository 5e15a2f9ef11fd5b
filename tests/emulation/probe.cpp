// A launch of a kernel that does nothing, for tests of the emulated runtime itself.
#include <cuda_runtime.h>

namespace {
void nothing() {}
}  // namespace

// `allowed`: what to ask of cudaFuncSetAttribute first, if anything. Returns the first error.
extern "C" int dk_emulated_launch(std::size_t shared_bytes, int allowed) {
  if (allowed) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t error = cudaFuncSetAttribute(nothing, attribute, allowed)) return error;
  }
  return cudaLaunchKernel(nothing, dim3(1), dim3(32), nullptr, shared_bytes, nullptr);
}

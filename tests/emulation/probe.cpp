// Launches for tests of the emulated runtime itself.
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>
#include <string>

#include "../ptx/products.cu"

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

// Runs a kernel of products.cu, with 16 bytes of shared memory for each thread. Returns what went
// wrong, or nothing.
extern "C" const char* dk_emulated_product(const char* name, unsigned threads, const uint32_t* a,
                                           const uint32_t* b, float* d) {
  static const std::map<std::string, void (*)(const uint32_t*, const uint32_t*, float*)> kernels = {
      {"product_half", product_half},
      {"product_bfloat16", product_bfloat16},
      {"transpose", transpose},
      {"sum", sum},
      {"sums_half", sums_half},
      {"sums_bfloat16", sums_bfloat16},
      {"doubled", doubled},
      {"product_of_half_a_warp", product_of_half_a_warp},
      {"transpose_of_half_a_warp", transpose_of_half_a_warp},
      {"copy", copy},
      {"copy_misaligned", copy_misaligned},
      {"copy_misaligned_in_shared", copy_misaligned_in_shared},
      {"copy_read_too_early", copy_read_too_early},
      {"copy_never_awaited", copy_never_awaited},
  };
  static std::string message;
  message.clear();
  void* args[] = {&a, &b, &d};
  try {
    cudaLaunchKernel(kernels.at(name), dim3(1), dim3(threads), args, 16 * threads, nullptr);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}

// Shadow of c10's header; see cuda_runtime.h in the folder above.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(...)                                                            \
  do {                                                                                 \
    const cudaError_t emulated_error = __VA_ARGS__;                                    \
    TORCH_CHECK(emulated_error == cudaSuccess, "emulated CUDA error ", emulated_error); \
  } while (0)

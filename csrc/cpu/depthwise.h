// What the CPU host functions hand to the kernels. The kernels are compiled three times, for
// baseline x86-64 (or any other processor), AVX2 and AVX-512; cpu/deform_kernel_cpu.cpp picks at
// run time.
#pragma once

#include "../deform_kernel.h"

namespace dk {

// Channels in a block of the scope.
constexpr int64_t kChannelBlock = 128;

// Activations are channels_last: [N, H, W, C]. The scope is in the arithmetic type and in blocks of
// channels: [ceil(C / kChannelBlock), S_h*S_w, kChannelBlock].
template <typename scalar_t>
struct DepthwiseForward {
  using T = opmath_t<scalar_t>;
  DepthwiseParams params;
  const scalar_t* input;
  const T* weight;
  const T* bias;  // null: none
  Offset<const T> kernel_offset, data_offset;
  scalar_t* output;
};

template <typename scalar_t>
struct DepthwiseBackward {
  using T = opmath_t<scalar_t>;
  DepthwiseParams params;
  const scalar_t* input;
  const T* weight;
  Offset<const T> kernel_offset, data_offset;
  const scalar_t* grad_output;
  Offset<T> grad_kernel_offset, grad_data_offset;
};

#define DK_DECLARE_KERNELS(ISA)                                                                    \
  namespace ISA {                                                                                  \
  /* Output rows [begin, end) of all N * H_out. */                                                 \
  template <typename scalar_t>                                                                     \
  void forward(const DepthwiseForward<scalar_t>& a, int64_t begin, int64_t end);                   \
  /* No data_offset. All gradients of input rows [begin, end) of all N * H; grad_weight (like      \
     weight) is added to. */                                                                       \
  template <typename scalar_t>                                                                     \
  void backward(const DepthwiseBackward<scalar_t>& a, scalar_t* grad_input,                        \
                opmath_t<scalar_t>* grad_weight, int64_t begin, int64_t end);                      \
  /* With data_offset. The gradients of the offsets and the weight, output rows [begin, end). */   \
  template <typename scalar_t>                                                                     \
  void backward_data_offset(const DepthwiseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_weight, \
                            int64_t begin, int64_t end);                                           \
  /* With data_offset. The gradient of the input, scattered, for image n and a block of channels;  \
     grad_input is in the arithmetic type and starts at zero. */                                   \
  template <typename scalar_t>                                                                     \
  void backward_data(const DepthwiseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input,         \
                     int64_t n, int64_t block);                                                    \
  }

DK_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
DK_DECLARE_KERNELS(avx2)
DK_DECLARE_KERNELS(avx512)
#endif
#undef DK_DECLARE_KERNELS

}  // namespace dk

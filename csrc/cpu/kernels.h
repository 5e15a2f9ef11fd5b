// What the CPU host functions hand to the kernels. The kernels are compiled three times, for
// baseline x86-64 (or any other processor), AVX2 and AVX-512; cpu/deform_kernel_cpu.cpp picks at
// run time.
#pragma once

#include "../deform_kernel.h"

namespace dk {

// Channels in a block of the scope.
constexpr int64_t kChannelBlock = 128;

// Activations are channels_last, [N, H, W, C], unless nchw says that some are not. The scope is in
// the arithmetic type and in blocks of channels: [ceil(C / kChannelBlock), S_h*S_w, kChannelBlock].
template <typename scalar_t>
struct DepthwiseForward {
  using T = opmath_t<scalar_t>;
  ConvParams params;
  const scalar_t* input;
  const T* weight;
  const T* bias;  // null: none
  Offset<const T> kernel_offset, data_offset;
  scalar_t* output;
  bool nchw;  // the output and, without data_offset, the input
};

template <typename scalar_t>
struct DepthwiseBackward {
  using T = opmath_t<scalar_t>;
  ConvParams params;
  const scalar_t* input;
  const T* weight;
  Offset<const T> kernel_offset, data_offset;
  const scalar_t* grad_output;
  Offset<T> grad_kernel_offset, grad_data_offset;  // to be added to
  // The blocks of channels of this pass; weight starts with the first. Passes go in order.
  int64_t first_channel, last_channel;
  bool nchw;  // the input, its gradient and the output's; not with data_offset
};

// A tile of the columns of a convolution that is not depthwise (csrc/dense.h): `count` output
// pixels from `first` on, of all N * H_out * W_out.
template <typename scalar_t>
struct Columns {
  using T = opmath_t<scalar_t>;
  ConvParams params;
  const scalar_t* input;
  Offset<const T> kernel_offset, data_offset;
  int64_t first, count;
};

template <typename scalar_t>
struct ColumnsBackward : Columns<scalar_t> {
  using T = opmath_t<scalar_t>;
  const T* grad_columns;                           // [groups, count, C / groups, cells]
  T* grad_taps;                                    // [count, taps, C], to be written
  Offset<T> grad_kernel_offset, grad_data_offset;  // to be written at the tile's pixels
};

#define DK_DECLARE_KERNELS(ISA)                                                                    \
  namespace ISA {                                                                                  \
  /* Output rows [begin, end) of all N * H_out. */                                                 \
  template <typename scalar_t>                                                                     \
  void forward(const DepthwiseForward<scalar_t>& a, int64_t begin, int64_t end);                   \
  /* No data_offset. All gradients of a pass, input rows [begin, end) of all N * H; grad_weight    \
     (like weight) is added to. */                                                                 \
  template <typename scalar_t>                                                                     \
  void backward(const DepthwiseBackward<scalar_t>& a, scalar_t* grad_input,                        \
                opmath_t<scalar_t>* grad_weight, int64_t begin, int64_t end);                      \
  /* With data_offset. The same of the offsets and the weight, output rows [begin, end). */        \
  template <typename scalar_t>                                                                     \
  void backward_data_offset(const DepthwiseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_weight, \
                            int64_t begin, int64_t end);                                           \
  /* With data_offset. The gradient of the input, scattered, for image n and a block of channels;  \
     grad_input is in the arithmetic type and starts at zero. */                                   \
  template <typename scalar_t>                                                                     \
  void backward_data(const DepthwiseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input,         \
                     int64_t n, int64_t block);                                                    \
  /* Pixels [begin, end) of the tile's columns, [groups, count, C / groups, cells]. */             \
  template <typename scalar_t>                                                                     \
  void columns(const Columns<scalar_t>& a, opmath_t<scalar_t>* columns, int64_t begin,             \
               int64_t end);                                                                       \
  /* From the columns' gradient, those of what each tap reads and of the offsets, pixels           \
     [begin, end) of the tile. */                                                                  \
  template <typename scalar_t>                                                                     \
  void columns_backward(const ColumnsBackward<scalar_t>& a, int64_t begin, int64_t end);           \
  /* No data_offset. Adds the gradient of what the tile's taps read to that of input rows          \
     [begin, end) of all N * H, which is in the arithmetic type. */                                \
  template <typename scalar_t>                                                                     \
  void add_taps(const ColumnsBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input, int64_t begin, \
                int64_t end);                                                                      \
  /* With data_offset. The same, scattered, for channels [begin, end). */                          \
  template <typename scalar_t>                                                                     \
  void scatter_taps(const ColumnsBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input,            \
                    int64_t begin, int64_t end);                                                   \
  }

DK_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
DK_DECLARE_KERNELS(avx2)
DK_DECLARE_KERNELS(avx512)
#endif
#undef DK_DECLARE_KERNELS

}  // namespace dk

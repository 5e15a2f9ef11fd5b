// What the CPU host functions hand to the kernels. The kernels are compiled three times, for
// baseline x86-64 (or any other processor), AVX2 and AVX-512; cpu/deform_kernel_cpu.cpp picks at
// run time.
#pragma once

#include "../dense.h"

namespace dk {

// Throws. (Not in the kernels: what makes a message of a number would be compiled with them.)
[[noreturn]] void out_of_memory(int64_t bytes);

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

// ---- not depthwise: dense.h ---------------------------------------------------------------------

// Channels whose columns are made at a time.
constexpr int64_t kDenseChannels = 64;

inline int64_t dense_blocks(const ConvParams& p) {
  return (p.channels + kDenseChannels - 1) / kDenseChannels;
}

// In the block that begins at channel c.
inline int64_t dense_width(const ConvParams& p, int64_t c) {
  return std::min(p.channels - c, kDenseChannels);
}

// How far rows of so many values are apart: whole vectors, and not a power of two, at which they
// would evict each other from the caches.
inline int64_t padded_row(int64_t values) { return (values / 16 + 2) * 16; }

// Of one pixel and group, C / groups * cells in the order of columns_kernels.h.
inline int64_t group_columns(const ConvParams& p) { return p.channels / p.groups * p.cells(); }

// The right factors of the matrix products are panels, so many numbers wide.
constexpr int64_t kPanel = 64;

// Of the output channels of a group.
inline int64_t output_panels(const ConvParams& p) {
  return (p.out_channels / p.groups + kPanel - 1) / kPanel;
}

// What they have of a panel, in whole vectors.
inline int64_t panel_width(const ConvParams& p) {
  return std::min((p.out_channels / p.groups + 15) / 16 * 16, kPanel);
}

// Pixels at a time: as floats, the columns of a block and the outputs take at most 1 MiB each,
// about what stays in the second-level cache.
inline int64_t most_pixels(const ConvParams& p) {
  constexpr int64_t values = int64_t(1) << 18, fewest = 12;
  const int64_t outputs = p.groups * output_panels(p) * panel_width(p);
  return std::max(values / std::max(p.cells() * dense_width(p, 0), outputs), fewest);
}

template <typename scalar_t>
struct Columns {
  using T = opmath_t<scalar_t>;
  ConvParams params;
  const scalar_t* input;
  Offset<const T> kernel_offset, data_offset;
  const T* weight;  // [C_out, C / groups, cells]
  // Right factors of the products, in the order of the columns; null: made when needed.
  const T* panels;
};

template <typename scalar_t>
struct DenseForward : Columns<scalar_t> {
  using T = opmath_t<scalar_t>;
  const T* bias;  // null: none
  scalar_t* output;
  int64_t tiles, parts;  // of all N * H_out * W_out pixels, of all groups' panels
};

template <typename scalar_t>
struct DenseBackward : Columns<scalar_t> {
  using T = opmath_t<scalar_t>;
  const T* grad_output;                            // [N * H_out * W_out, C_out]
  T* grad_weight;                                  // [parts][C_out, group_columns], to be written
  int64_t parts;                                   // of all pixels
  Offset<T> grad_kernel_offset, grad_data_offset;  // zero at the start
  T* grad_taps;                                    // [count, taps, C], to be written
  int64_t first, count;                            // a tile of all pixels
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
  /* Items [begin, end) of forward's panels: of all groups, [group_columns, panel_width] each. */  \
  template <typename scalar_t>                                                                     \
  void pack_panels(const Columns<scalar_t>& a, opmath_t<scalar_t>* panels, int64_t begin,          \
                   int64_t end);                                                                   \
  /* Outputs [begin, end) of each group, of all panels of backward: of all groups and              \
     dense_blocks, [C_out / groups, kPanel or, at their end, fewer] each. */                       \
  template <typename scalar_t>                                                                     \
  void pack_grad_panels(const Columns<scalar_t>& a, opmath_t<scalar_t>* panels, int64_t begin,     \
                        int64_t end);                                                              \
  /* Items [begin, end) of parts and their tiles. */                                               \
  template <typename scalar_t>                                                                     \
  void dense_forward(const DenseForward<scalar_t>& a, int64_t begin, int64_t end);                 \
  /* Items [begin, end) of parts and their dense_blocks. */                                        \
  template <typename scalar_t>                                                                     \
  void weight_gradient(const DenseBackward<scalar_t>& a, int64_t begin, int64_t end);              \
  /* Output channels [begin, end): the sum of the parts, the first of which is written. */         \
  template <typename scalar_t>                                                                     \
  void sum_parts(const DenseBackward<scalar_t>& a, int64_t begin, int64_t end);                    \
  /* Pixels [begin, end) of the tile: the gradients of what each tap reads and of the offsets. */  \
  template <typename scalar_t>                                                                     \
  void taps_gradient(const DenseBackward<scalar_t>& a, int64_t begin, int64_t end);                \
  /* No data_offset. Adds the gradient of what the tile's taps read to that of input rows          \
     [begin, end) of all N * H, which is in the arithmetic type. */                                \
  template <typename scalar_t>                                                                     \
  void add_taps(const DenseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input, int64_t begin,   \
                int64_t end);                                                                      \
  /* With data_offset. The same, scattered, for channels [begin, end). */                          \
  template <typename scalar_t>                                                                     \
  void scatter_taps(const DenseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input,              \
                    int64_t begin, int64_t end);                                                   \
  }

DK_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
DK_DECLARE_KERNELS(avx2)
DK_DECLARE_KERNELS(avx512)
#endif
#undef DK_DECLARE_KERNELS

}  // namespace dk

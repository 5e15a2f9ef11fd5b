// What the CUDA host functions (dense_cuda.h) hand to the kernels of convolutions whose columns are
// never in memory (dense_matrix.cuh). Plain C++: read by both compilers.
#pragma once

#include "depthwise.h"

namespace dk {
namespace cuda {

// Of a warp: rows of 8 pixels, which are a tile, and products beside each other, of 8 outputs each.
constexpr int kDenseRows = kMatrixRows, kDenseProducts = 8, kDenseOutputs = 8 * kDenseProducts;
constexpr int kDensePixels = kDenseRows * kMatrixColumns, kDenseWarps = kMatrixThreads / kWarpSize;
// Channels whose weights and pixels are in shared memory at once: a vector of the input's. Cells of
// each.
constexpr int kDenseChannels = 8, kDenseCells = 16;
// Blocks at once on a multiprocessor, by registers: of 168 a thread, and of 255.
template <bool kUnit>
constexpr int kDenseBlocks = kUnit ? 3 : 2;

template <typename scalar_t>
struct DenseArgs {
  ConvParams params;
  const scalar_t* input;   // channels_last
  const scalar_t* weight;  // [C_out, C, 4, 4]: a smaller scope has zeros around it
  const scalar_t* bias;    // null: none
  Offset<const float> kernel_offset;
  scalar_t* output;  // channels_last
};

DK_INLINE int64_t dense_output_tiles(const ConvParams& p) {
  return (p.out_channels + kDenseOutputs - 1) / kDenseOutputs;
}

// 3x3 taps, stride and dilation 1: sizes that the compiler may know.
inline bool is_unit(const ConvParams& p) {
  return p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 &&
         p.dilation_h == 1 && p.dilation_w == 1;
}

// The rows and columns of an image that the taps of a warp's tile read: a window. kUnit: of 3x3
// taps, stride and dilation 1.
template <bool kUnit>
struct DenseWindow {
  int kernel_w, stride_h, stride_w, dilation_h, dilation_w, rows, columns;

  DK_INLINE explicit DenseWindow(const ConvParams& p)
      : kernel_w(kUnit ? 3 : p.kernel_w),
        stride_h(kUnit ? 1 : static_cast<int>(p.stride_h)),
        stride_w(kUnit ? 1 : static_cast<int>(p.stride_w)),
        dilation_h(kUnit ? 1 : static_cast<int>(p.dilation_h)),
        dilation_w(kUnit ? 1 : static_cast<int>(p.dilation_w)),
        rows((kDenseRows - 1) * stride_h + ((kUnit ? 3 : p.kernel_h) - 1) * dilation_h + 1),
        columns((kMatrixColumns - 1) * stride_w + (kernel_w - 1) * dilation_w + 1) {}
  DK_INLINE int pixels() const { return rows * columns; }
  // Where a row of output pixels begins, or a tap, in bytes of one vector of channels.
  DK_INLINE int row(int i) const { return i * stride_h * columns * 16; }
  DK_INLINE int tap(int t) const {
    return (t / kernel_w * dilation_h * columns + t % kernel_w * dilation_w) * 16;
  }
};

// Bytes of shared memory, and where its arrays begin. Of the first two there are two: while one is
// read, the other is copied.
//   weight  [kDenseProducts, 8, kDenseChannels, kDenseCells], an output's one channel longer:
//           so neighbours' cells lie in different banks
//   window  [kDenseWarps, pixels, 16]
//   source  [kDenseWarps, pixels]  where the window's pixels are in the image; -1: outside
// Before there is a second weight, its place has the warps' DenseTaps.
struct DenseLayout {
  static constexpr int row_bytes = (kDenseChannels + 1) * kDenseCells * 2;
  static constexpr int weight_bytes = kDenseOutputs * row_bytes;
  int window_bytes, copied_bytes;

  DK_INLINE explicit DenseLayout(int pixels)
      : window_bytes(pixels * 16), copied_bytes(weight_bytes + kDenseWarps * window_bytes) {}
  DK_INLINE int weight(int which) const { return which * copied_bytes; }
  DK_INLINE int window(int which, int warp) const {
    return weight(which) + weight_bytes + warp * window_bytes;
  }
  DK_INLINE int source(int warp) const { return 2 * copied_bytes + warp * (window_bytes / 4); }
  DK_INLINE int bytes() const { return source(kDenseWarps); }
};

// ---- launcher, one instantiation per type in its own .cu ---------------------------------------

// float16 or bfloat16; groups = 1, kernel_offset, no data_offset, up to 9 taps, a scope of up to
// 4x4; input, weight and output in vectors of 16 bytes.
template <typename scalar_t>
void launch_dense_matrix(const DenseArgs<scalar_t>& a, cudaStream_t stream);

}  // namespace cuda
}  // namespace dk

// Convolutions that are not depthwise: the sum is regrouped so that the output channels meet the
// scope in an ordinary matrix product, for any groups,
//
//   columns[g, p, c, l] = sum_t B[t, l](p) * input[g, c, p + k_t (+ data offset)]
//   output[p, g, o]     = bias[g, o] + sum_{c, l} weight[g, o, c, l] * columns[g, p, c, l]
//
// B: the coefficients of tap t on cell l of the scope, or, without kernel_offset, l = t. It goes by
// tiles of pixels p, of all N * H_out * W_out, so that the columns' memory does not grow with the
// image: cuda/dense_cuda.h, cpu/dense_kernels.h.
#pragma once

#include "deform_kernel.h"

namespace dk {
namespace dense {

// Pixels of a tile, `most` or fewer, so that all tiles are alike.
inline int64_t tile_size(int64_t pixels, int64_t most) {
  const int64_t tiles = most > 1 ? (pixels + most - 1) / most : pixels;
  return (pixels + tiles - 1) / tiles;
}

// The rows of all N * H that output pixels `first` to `last` read, and perhaps others between them.
inline std::pair<int64_t, int64_t> input_rows(const ConvParams& p, int64_t first, int64_t last) {
  const auto row = [&](int64_t pixel, int64_t tap) {
    const int64_t line = pixel / p.out_w;
    const int64_t y = line % p.out_h * p.stride_h - p.pad_h + tap * p.dilation_h;
    return line / p.out_h * p.in_h + std::clamp<int64_t>(y, 0, p.in_h - 1);
  };
  return {row(first, 0), row(last, p.kernel_h - 1) + 1};
}

}  // namespace dense
}  // namespace dk

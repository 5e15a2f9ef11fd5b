// Convolutions that are not depthwise: the sum is regrouped so that the output channels meet the
// scope in an ordinary matrix product (torch's), for any groups,
//
//   columns[g, p, c, l] = sum_t B[t, l](p) * input[g, c, p + k_t (+ data offset)]
//   output[p, g, o]     = bias[g, o] + sum_{c, l} weight[g, o, c, l] * columns[g, p, c, l]
//
// B: the coefficients of tap t on cell l of the scope, or, without kernel_offset, l = t. It goes by
// tiles of pixels p, of all N * H_out * W_out, so that the columns' memory does not grow with the
// image. A pixel's columns are channels of cells, or, where threads have neighbouring channels,
// cells of channels.
//
// A backend has kernels for the columns and their gradients, and says how:
//
//   int64_t tile_values, tile_pixels, gradient_values     the largest tiles
//   ScalarType type                                       of columns
//   bool cells_first                                      a pixel's columns are [cells, C / groups]
//   Tensor product(const Tensor& a, const Tensor& b)      [g, m, k] x [g, k, n] -> [g, m, n]
//   Tensor columns(int64_t first, int64_t count)          [groups, count, C / groups * cells]
//   void add(std::optional<Tensor>& sum, const Tensor& part)
//   void backward(const Tensor& grad_columns, int64_t first, int64_t count)
//                                                         adds up all but the weight's gradient
#pragma once

#include "deform_kernel.h"

namespace dk {
namespace dense {

// Pixels of a tile of at most `values` columns' values, so that all of `pixels` are in tiles alike.
inline int64_t tile_size(const ConvParams& p, int64_t pixels, int64_t values, int64_t most) {
  most = std::clamp<int64_t>(values / (p.channels * p.cells()), 1, most);
  const int64_t tiles = (pixels + most - 1) / most;
  return (pixels + tiles - 1) / tiles;
}

// The rows of a tile of pixels, [groups, count, C_out / groups], of a tensor in channels_last.
inline Tensor tile_rows(const ConvParams& p, const Tensor& t, int64_t first, int64_t count) {
  const int64_t size = p.out_channels / p.groups;
  Tensor all =
      as_strided(t, {p.groups, p.batch * p.out_h * p.out_w, size}, {size, p.out_channels, 1});
  return stable::narrow(all, 1, first, count);
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

// [groups, C_out / groups, a, b] with the last two exchanged.
inline Tensor exchanged(const ConvParams& p, const Tensor& matrices, int64_t a, int64_t b) {
  const Tensor all = stable::view(matrices, {p.groups, p.out_channels / p.groups, a, b});
  return stable::contiguous(stable::transpose(all, 2, 3));
}

// [groups, C_out / groups, C / groups * cells], in the order of the columns.
template <typename Backend>
Tensor weight_matrices(const ConvParams& p, const Tensor& weight) {
  const int64_t size = p.channels / p.groups;
  Tensor matrices = stable::contiguous(to_type(weight, Backend::type));
  if (Backend::cells_first) matrices = exchanged(p, matrices, size, p.cells());
  return stable::view(matrices, {p.groups, p.out_channels / p.groups, size * p.cells()});
}

// The gradient of the weight, given that of its matrices.
template <typename Backend>
Tensor weight_of(const ConvParams& p, Tensor matrices, const Tensor& weight) {
  if (Backend::cells_first) matrices = exchanged(p, matrices, p.cells(), p.channels / p.groups);
  return to_type(stable::view(matrices, weight.sizes()), weight.scalar_type());
}

// `output` is in channels_last.
template <typename Backend>
void forward(const ConvParams& p, Backend& backend, const Tensor& weight,
             const std::optional<Tensor>& bias, const Tensor& output) {
  const Tensor matrices = stable::transpose(weight_matrices<Backend>(p, weight), 1, 2);
  std::optional<Tensor> row;
  if (bias) row = stable::view(stable::contiguous(*bias), {p.groups, 1, -1});
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  const int64_t step = tile_size(p, pixels, Backend::tile_values, Backend::tile_pixels);
  for (int64_t first = 0; first < pixels; first += step) {
    const int64_t count = std::min(step, pixels - first);
    Tensor product = backend.product(backend.columns(first, count), matrices);
    if (row) product = stable::subtract(product, *row, -1);
    Tensor rows = tile_rows(p, output, first, count);
    stable::copy_(rows, product);
  }
}

// `grad_output` is in channels_last. Returns the weight's gradient, if it is wanted.
template <typename Backend>
std::optional<Tensor> backward(const ConvParams& p, Backend& backend, const Tensor& weight,
                               const Tensor& grad_output, const std::vector<bool>& output_mask) {
  const Tensor matrices = weight_matrices<Backend>(p, weight);
  const bool others = output_mask[0] || output_mask[2] || output_mask[3];
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  const int64_t step = tile_size(p, pixels, Backend::tile_values, Backend::tile_pixels);
  std::optional<Tensor> grad_weight;
  for (int64_t first = 0; first < pixels; first += step) {
    const int64_t count = std::min(step, pixels - first);
    const Tensor grad =
        stable::contiguous(to_type(tile_rows(p, grad_output, first, count), Backend::type));
    if (output_mask[1]) {
      const Tensor columns = backend.columns(first, count);
      backend.add(grad_weight, backend.product(stable::transpose(grad, 1, 2), columns));
    }
    // The gradients of columns are read once, and not kept: smaller tiles stay in the cache.
    const int64_t part = tile_size(p, count, Backend::gradient_values, count);
    for (int64_t begin = 0; others && begin < count; begin += part) {
      const int64_t size = std::min(part, count - begin);
      Tensor rows = grad;
      backend.backward(backend.product(stable::narrow(rows, 1, begin, size), matrices),
                       first + begin, size);
    }
  }
  if (grad_weight) grad_weight = weight_of<Backend>(p, *grad_weight, weight);
  return grad_weight;
}

}  // namespace dense
}  // namespace dk

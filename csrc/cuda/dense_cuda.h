// csrc/dense.h on CUDA: convolutions that are not depthwise. A part of deform_kernel_cuda.cpp.
#pragma once

#include "../dense.h"
#include "columns.h"
#include "dense_matrix.h"
#include "launch.cuh"

namespace dk {
namespace cuda {
namespace {

// With as many pixels, each thread of a block has one and a vector of channels.
constexpr int kFewestPixels = kThreads / kWarpSize;

// Pixels of a block: fewer than kPixels where all blocks together would not keep the GPU busy, or
// where they have no room in shared memory.
template <typename T>
int columns_pixels(const ColumnsBackwardArgs<T>& a, int64_t count, bool backward) {
  const ConvParams& p = a.params;
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t blocks = 2 * device_attribute(cudaDevAttrMultiProcessorCount);
  int pixels = kPixels;
  const auto bytes = [&] {
    return columns_layout<opmath_t<T>>(pixels, p.taps(), a.kernel_offset.data, a.data_offset.data,
                                       backward)
        .bytes;
  };
  while (pixels > kFewestPixels && count < blocks * pixels) pixels /= 2;
  while (pixels > 1 && bytes() > static_cast<size_t>(limit)) pixels /= 2;
  DK_CHECK(bytes() <= static_cast<size_t>(limit), "weight: a kernel of ", p.kernel_h, "x",
           p.kernel_w, " needs ", bytes(), " bytes of shared memory and this GPU has ", limit,
           "; dk_detectron.ops.composed_deform_kernel_conv2d takes any size");
  return pixels;
}

// Columns are in the type of the activations, for which the matrix products are fast; sums over
// taps, channels and tiles are in the arithmetic type.
template <typename scalar_t>
struct DenseBackend {
  using T = opmath_t<scalar_t>;
  // 64 MiB of columns, and as much of their gradient.
  static constexpr int64_t tile_values = (int64_t(1) << 26) / sizeof(scalar_t);
  static constexpr ScalarType type = scalar_type_of<scalar_t>;

  const Tensor& like;
  ColumnsBackwardArgs<scalar_t> a;
  bool deterministic = false;
  cudaStream_t stream;
  std::optional<Tensor> grad_taps;  // for all tiles; the first is the largest

  DenseBackend(const ColumnsBackwardArgs<scalar_t>& a, const Tensor& like)
      : like(like), a(a), stream(current_stream(like)) {}

  static Tensor product(const Tensor& x, const Tensor& y) {
    return stable::contiguous(stable::matmul(x, y));
  }
  static void add(std::optional<Tensor>& sum, const Tensor& part) {
    const Tensor exact = to_type(part, scalar_type_of<T>);
    sum = sum ? stable::subtract(*sum, exact, -1) : exact;
  }

  Tensor columns(int64_t first, int64_t count) const {
    const ConvParams& p = a.params;
    const Tensor result =
        stable::new_empty(like, {p.groups, count, p.channels / p.groups * p.cells()}, type);
    launch_columns<scalar_t>({{p, a.input, a.kernel_offset, a.data_offset, first, count,
                               columns_pixels(a, count, /*backward=*/false)},
                              result.mutable_data_ptr<scalar_t>()},
                             stream);
    return result;
  }

  void backward(const Tensor& grad_columns, int64_t first, int64_t count) {
    const ConvParams& p = a.params;
    if (!grad_taps)
      grad_taps = stable::new_empty(like, {count, p.taps(), p.channels}, scalar_type_of<T>);
    a.first = first;
    a.count = count;
    a.grad_columns = grad_columns.const_data_ptr<scalar_t>();
    a.grad_taps = grad_taps->mutable_data_ptr<T>();
    a.pixels = columns_pixels(a, count, /*backward=*/true);
    launch_columns_backward(a, stream);
    if (!a.grad_input) return;
    if (!a.data_offset.data) {
      const auto [begin, end] = dense::input_rows(p, first, first + count - 1);
      launch_add_taps(a, begin, end, stream);
    } else if (deterministic) {
      const Tensor base = stable::new_empty(like, {count * p.taps()}, ScalarType::Long);
      launch_tap_bases(a, base.mutable_data_ptr<int64_t>(), stream);
      const auto [sorted, pair] = stable_sort(base);
      launch_gather_taps(a, sorted.template const_data_ptr<int64_t>(),
                         pair.template const_data_ptr<int64_t>(), stream);
    } else {
      launch_scatter_taps(a, stream);
    }
  }
};

// The rows of a tile of pixels, [groups, count, C_out / groups], of a tensor in channels_last.
inline Tensor tile_rows(const ConvParams& p, const Tensor& t, int64_t first, int64_t count) {
  const int64_t size = p.out_channels / p.groups;
  Tensor all =
      as_strided(t, {p.groups, p.batch * p.out_h * p.out_w, size}, {size, p.out_channels, 1});
  return stable::narrow(all, 1, first, count);
}

// [groups, C_out / groups, a, b] with the last two exchanged.
inline Tensor exchanged(const ConvParams& p, const Tensor& matrices, int64_t a, int64_t b) {
  const Tensor all = stable::view(matrices, {p.groups, p.out_channels / p.groups, a, b});
  return stable::contiguous(stable::transpose(all, 2, 3));
}

// [groups, C_out / groups, cells * C / groups], in the order of the columns.
inline Tensor weight_matrices(const ConvParams& p, const Tensor& weight) {
  const int64_t size = p.channels / p.groups;
  return stable::view(exchanged(p, stable::contiguous(weight), size, p.cells()),
                      {p.groups, p.out_channels / p.groups, size * p.cells()});
}

// The gradient of the weight, given that of its matrices.
inline Tensor weight_of(const ConvParams& p, const Tensor& matrices, const Tensor& weight) {
  const Tensor all = exchanged(p, matrices, p.cells(), p.channels / p.groups);
  return to_type(stable::view(all, weight.sizes()), weight.scalar_type());
}

// `output` is in channels_last.
template <typename scalar_t>
void tiled_forward(const ConvParams& p, DenseBackend<scalar_t>& backend, const Tensor& weight,
                   const std::optional<Tensor>& bias, const Tensor& output) {
  const Tensor matrices = stable::transpose(weight_matrices(p, weight), 1, 2);
  std::optional<Tensor> row;
  if (bias) row = stable::view(stable::contiguous(*bias), {p.groups, 1, -1});
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  const int64_t step = dense::tile_size(pixels, backend.tile_values / (p.channels * p.cells()));
  for (int64_t first = 0; first < pixels; first += step) {
    const int64_t count = std::min(step, pixels - first);
    Tensor product = backend.product(backend.columns(first, count), matrices);
    if (row) product = stable::subtract(product, *row, -1);
    Tensor rows = tile_rows(p, output, first, count);
    stable::copy_(rows, product);
  }
}

// `grad_output` is in channels_last. Returns the weight's gradient, if it is wanted.
template <typename scalar_t>
std::optional<Tensor> tiled_backward(const ConvParams& p, DenseBackend<scalar_t>& backend,
                                     const Tensor& weight, const Tensor& grad_output,
                                     const std::vector<bool>& output_mask) {
  const Tensor matrices = weight_matrices(p, weight);
  const bool others = output_mask[0] || output_mask[2] || output_mask[3];
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  const int64_t step = dense::tile_size(pixels, backend.tile_values / (p.channels * p.cells()));
  std::optional<Tensor> grad_weight;
  for (int64_t first = 0; first < pixels; first += step) {
    const int64_t count = std::min(step, pixels - first);
    const Tensor grad = stable::contiguous(tile_rows(p, grad_output, first, count));
    if (output_mask[1]) {
      const Tensor columns = backend.columns(first, count);
      backend.add(grad_weight, backend.product(stable::transpose(grad, 1, 2), columns));
    }
    if (others) backend.backward(backend.product(grad, matrices), first, count);
  }
  if (grad_weight) grad_weight = weight_of(p, *grad_weight, weight);
  return grad_weight;
}

// Whether the kernel that makes columns in registers takes the call.
template <typename scalar_t>
bool has_dense_matrix_kernel(const ColumnsBackwardArgs<scalar_t>& a) {
  const ConvParams& p = a.params;
  // Small enough for 32 bits; of strides, so large that a window has no room.
  constexpr int64_t most = 256, most_channels = int64_t(1) << 25;
  // Coefficients have the type of the activations: factors of less than 6e-5 would be subnormal
  // numbers of float16, or nothing.
  const bool fits = std::is_same_v<scalar_t, c10::BFloat16> || !a.kernel_offset.modulated;
  return fits && p.groups == 1 && a.kernel_offset.data && !a.data_offset.data &&
         p.taps() <= kMatrixTaps && std::max(p.scope_h, p.scope_w) <= kScopeRows &&
         p.channels % kDenseChannels == 0 && p.out_channels % kDenseChannels == 0 &&
         std::max(p.channels, p.out_channels) <= most_channels &&
         p.batch * std::max(p.in_h * p.in_w, p.out_h * p.out_w) < int64_t(1) << 31 &&
         std::max({p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) <= most &&
         DenseLayout(DenseWindow<false>(p).pixels()).bytes() <=
             device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) &&
         compiled_for() >= kTensorCores;
}

// In a scope of 4x4, zeros around a smaller one.
inline Tensor padded_weight(const ConvParams& p, const Tensor& weight) {
  if (p.scope_h == kScopeRows && p.scope_w == kScopeRows && is_aligned(weight)) return weight;
  Tensor padded = stable::new_zeros(weight, {p.out_channels, p.channels, kScopeRows, kScopeRows});
  Tensor rows = stable::narrow(padded, 2, 0, p.scope_h);
  Tensor inner = stable::narrow(rows, 3, 0, p.scope_w);
  stable::copy_(inner, weight);
  return padded;
}

// `weight` and `bias` are contiguous.
template <typename scalar_t>
void dense_matrix_forward(const ColumnsBackwardArgs<scalar_t>& a, const Tensor& input,
                          const Tensor& weight, const std::optional<Tensor>& bias,
                          const Tensor& output) {
  const Tensor padded = padded_weight(a.params, weight);
  launch_dense_matrix<scalar_t>({a.params, a.input, padded.const_data_ptr<scalar_t>(),
                                 bias ? bias->const_data_ptr<scalar_t>() : nullptr, a.kernel_offset,
                                 output.mutable_data_ptr<scalar_t>()},
                                current_stream(input));
}

// `input`, which is aligned, and `output` are channels_last, `weight` and `bias` contiguous; the
// offsets' tensors are those that `a` reads.
template <typename scalar_t>
void dense_forward(const ColumnsBackwardArgs<scalar_t>& a, const Tensor& input,
                   const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output) {
  if constexpr (sizeof(scalar_t) == 2) {
    if (has_dense_matrix_kernel(a)) {
      return dense_matrix_forward(a, input, weight, bias, output);
    }
  }
  DenseBackend<scalar_t> backend(a, input);
  tiled_forward(a.params, backend, weight, bias, output);
}

template <typename scalar_t>
Gradients dense_backward(const ColumnsBackwardArgs<scalar_t>& a, const Tensor& input,
                         const Tensor& weight, const std::optional<Tensor>& kernel_offset,
                         const std::optional<Tensor>& data_offset, const Tensor& grad_output,
                         const std::vector<bool>& output_mask, bool deterministic) {
  using T = opmath_t<scalar_t>;
  DenseBackend<scalar_t> backend(a, input);
  backend.deterministic = deterministic;
  Gradients gradients;
  if (output_mask[0]) {
    Tensor zeros = empty(input, input.sizes(), scalar_type_of<T>, MemoryFormat::ChannelsLast);
    gradients[0] = stable::zero_(zeros);
    backend.a.grad_input = gradients[0]->template mutable_data_ptr<T>();
  }
  const auto zero_gradient = [&](const std::optional<Tensor>& offset, Offset<T>& view) {
    std::optional<Tensor> grad;
    if (offset) grad = zeros_like(*offset);
    view = gradient_view<T>(a.params, grad);
    return grad;
  };
  gradients[2] = zero_gradient(kernel_offset, backend.a.grad_kernel_offset);
  gradients[3] = zero_gradient(data_offset, backend.a.grad_data_offset);
  gradients[1] = tiled_backward(a.params, backend, weight, grad_output, output_mask);
  return gradients;
}

}  // namespace
}  // namespace cuda
}  // namespace dk

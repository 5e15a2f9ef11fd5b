// CUDA host functions: check, lay out, split the work, launch.
#include "deform_kernel_cuda.h"

#include <algorithm>
#include <cmath>

#include "dense_cuda.h"
#include "depthwise.h"
#include "launch.cuh"

namespace dk {
namespace {

using cuda::BackwardArgs;
using cuda::ChannelTiles;
using cuda::current_stream;
using cuda::ForwardArgs;
using cuda::is_aligned;
using cuda::kHeldPixels;
using cuda::kPixels;
using cuda::kWarpSize;

// Elements and images are counted in 64 bits; the bytes of a pixel, the pixels of the images that a
// tile touches, and positions in a padded image in 32.
void check_sizes(const ConvParams& p) {
  const int64_t in = p.in_h * p.in_w, out = p.out_h * p.out_w, limit = int64_t(1) << 31;
  const int64_t images = kPixels / std::min(in, out) + 2;
  const int64_t padded = std::max(p.in_h + 2 * p.pad_h, p.in_w + 2 * p.pad_w);
  DK_CHECK(std::max(in, out) * images < limit && padded < limit && p.channels <= limit / 16,
           "input: on CUDA, expected fewer than 2^30 pixels per image, 2^31 in a padded row or "
           "column and at most 2^27 channels, got ",
           p.channels, " channels of ", p.in_h, "x", p.in_w, ", padding ", p.pad_h, "x", p.pad_w,
           " and an output of ", p.out_h, "x", p.out_w);
  DK_CHECK(p.channels / p.groups * p.cells() < limit,
           "weight: on CUDA, expected fewer than 2^31 values for each output channel, got ",
           p.channels / p.groups, "x", p.scope_h, "x", p.scope_w);
}

// The number of lanes that leaves the fewest idle.
ChannelTiles channel_tiles(int64_t channels, int vector) {
  const int64_t vectors = (channels + vector - 1) / vector;
  ChannelTiles best{vector, kWarpSize, static_cast<int>((vectors + kWarpSize - 1) / kWarpSize)};
  for (int lanes = kWarpSize / 2; lanes >= 8; lanes /= 2) {
    const int tiles = static_cast<int>((vectors + lanes - 1) / lanes);
    if (int64_t(tiles) * lanes < int64_t(best.tiles) * best.lanes) best = {vector, lanes, tiles};
  }
  return best;
}

// The input as the kernels read it; those of dense convolutions read vectors without asking.
Tensor laid_out(const ConvParams& p, const Tensor& input, MemoryFormat format) {
  const Tensor x = stable::contiguous(input, format);
  return p.depthwise() || is_aligned(x) ? x : stable::clone(x);
}

// Whether the kernels on tensor cores take the call, which is not of double. `aligned`: what they
// read in vectors can be.
template <typename scalar_t>
bool has_matrix_kernel(const ConvParams& p, const std::optional<Tensor>& kernel_offset,
                       const std::optional<Tensor>& data_offset, bool aligned) {
  return aligned && kernel_offset && !is_modulated(p, *kernel_offset) && !data_offset &&
         p.kernel_h == 3 && p.kernel_w == 3 && p.scope_h == p.scope_w &&
         (p.scope_h == 3 || p.scope_h == 4) && p.stride_h == 1 && p.stride_w == 1 &&
         p.dilation_h == 1 && p.dilation_w == 1 &&
         p.batch * std::max(p.in_h * p.in_w, p.out_h * p.out_w) < int64_t(1) << 31 &&
         p.channels % (16 / sizeof(scalar_t)) == 0 && cuda::compiled_for() >= cuda::kTensorCores;
}

[[noreturn]] void refuse_scope(const ConvParams& p, size_t bytes, int64_t limit) {
  DK_CHECK(false, "weight: a scope of ", p.scope_h, "x", p.scope_w, " with a kernel of ",
           p.kernel_h, "x", p.kernel_w, " needs ", bytes,
           " bytes of shared memory and this GPU has ", limit,
           "; dk_detectron.ops.composed_deform_kernel_conv2d takes any size");
}

// ---- forward ------------------------------------------------------------------------------------

template <typename scalar_t>
ChannelTiles plan_forward(const ConvParams& p, bool kernel, bool data, bool aligned) {
  const int limit = cuda::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  size_t bytes = 0;
  for (int vector : {aligned ? int(16 / sizeof(scalar_t)) : 1, 1}) {
    bytes = cuda::shared_layout<scalar_t>(vector, p.taps(), p.cells(), 0, kernel, data).bytes;
    if (bytes <= static_cast<size_t>(limit)) return channel_tiles(p.channels, vector);
  }
  refuse_scope(p, bytes, limit);
}

// Contiguous activations have a kernel of their own for what local DK uses. For the rest,
// converting to channels_last and back costs less than the scattered reads (data_offset) would.
bool has_nchw_kernel(const ConvParams& p, bool kernel, bool data) {
  return kernel && !data && p.kernel_h == 3 && p.kernel_w == 3 && p.scope_h == p.scope_w &&
         p.scope_h >= 3 && p.scope_h <= 5;
}

}  // namespace

Tensor deform_kernel_conv2d_cuda(const Tensor& input, const Tensor& weight,
                                 const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& kernel_offset,
                                 const std::optional<Tensor>& data_offset, IntArrayRef kernel_size,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                 int64_t groups, bool clip) {
  const ConvParams p = checked_params(input, weight, bias, kernel_offset, data_offset, kernel_size,
                                      stride, padding, dilation, groups, clip);
  const stable::accelerator::DeviceGuard guard(input.get_device_index());
  const bool nchw = p.depthwise() && output_format(input) == MemoryFormat::Contiguous &&
                    has_nchw_kernel(p, kernel_offset.has_value(), data_offset.has_value());
  const auto format = nchw ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast;
  Tensor output =
      empty(input, {p.batch, p.out_channels, p.out_h, p.out_w}, input.scalar_type(), format);
  if (output.numel() > 0 && input.numel() == 0) {  // nothing but padding
    fill_with_bias(output, bias);
  } else if (output.numel() > 0) {
    check_sizes(p);
    const Tensor x = laid_out(p, input, format), w = stable::contiguous(weight);
    std::optional<Tensor> b;
    if (bias) b = stable::contiguous(*bias);
    DK_DISPATCH(input.scalar_type(), "deform_kernel_conv2d", [&] {
      using T = cuda::ForwardArgs<scalar_t>::T;
      const auto kernel = to_arithmetic<T>(kernel_offset), data = to_arithmetic<T>(data_offset);
      ForwardArgs<scalar_t> a{p,
                              x.const_data_ptr<scalar_t>(),
                              w.const_data_ptr<scalar_t>(),
                              b ? b->const_data_ptr<scalar_t>() : nullptr,
                              offset_view<T>(p, kernel),
                              offset_view<T>(p, data),
                              output.mutable_data_ptr<scalar_t>(),
                              {}};
      if (!p.depthwise()) {
        return cuda::dense_forward<scalar_t>({{p, a.input, a.kernel_offset, a.data_offset}}, x, w,
                                             b, output);
      }
      const cudaStream_t stream = current_stream(input);
      if (nchw) return cuda::launch_forward_nchw(a, stream);
      constexpr int wide = 16 / sizeof(scalar_t);
      const bool aligned = p.channels % wide == 0 && is_aligned(x) && is_aligned(w);
      a.channels = plan_forward<scalar_t>(p, kernel.has_value(), data.has_value(), aligned);
      if constexpr (!std::is_same_v<scalar_t, double>) {
        if (has_matrix_kernel<scalar_t>(p, kernel, data, aligned)) {
          return cuda::launch_forward_matrix(a, stream);
        }
      }
      cuda::launch_forward(a, stream);
    });
  }
  return stable::contiguous(output, output_format(input));
}

// ---- backward -----------------------------------------------------------------------------------

namespace {

// Warps per block and channels per thread: what keeps the most work resident on a multiprocessor,
// given that every warp has weight sums of its own in shared memory and that registers allow 16
// warps.
template <typename scalar_t>
int plan_backward_block(BackwardArgs<scalar_t>& a, bool aligned) {
  const ConvParams& p = a.params;
  const int per_block = cuda::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int per_processor = cuda::device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  constexpr int reserved = 1024, max_warps = 16, wide = 16 / sizeof(opmath_t<scalar_t>);
  size_t bytes = 0;
  int most = 0, blocks_per_processor = 0;
  for (int vector : {aligned ? wide : 1, 1}) {
    const ChannelTiles channels = channel_tiles(p.channels, vector);
    for (int warps = kPixels / kHeldPixels * channels.lanes / kWarpSize; warps > 0; warps /= 2) {
      bytes = cuda::shared_layout<scalar_t>(vector, p.taps(), p.cells(), warps,
                                            a.kernel_offset.data, a.data_offset.data)
                  .bytes;
      if (bytes > static_cast<size_t>(per_block)) continue;
      const int blocks =
          std::clamp(per_processor / static_cast<int>(bytes + reserved), 1, max_warps / warps);
      if (blocks * warps * vector <= most) continue;
      most = blocks * warps * vector;
      blocks_per_processor = blocks;
      a.warps = warps;
      a.channels = channels;
    }
  }
  if (!most) refuse_scope(p, bytes, per_block);
  return blocks_per_processor;
}

// The same of the kernel on tensor cores.
template <typename scalar_t>
int plan_backward_matrix(BackwardArgs<scalar_t>& a) {
  constexpr int vector = 16 / sizeof(scalar_t), width = cuda::kBackwardLanes * vector;
  a.channels = {vector, cuda::kBackwardLanes,
                static_cast<int>((a.params.channels + width - 1) / width)};
  return cuda::kBackwardBlocks<scalar_t>;
}

// As many blocks as run at once, split between pixels and channels so that the partial sums,
// [splits, cells, C] for the weight and [groups, 2*taps, pixels] for the offsets, are small
// together.
template <typename scalar_t>
void plan_backward_split(BackwardArgs<scalar_t>& a, int64_t tiles, int blocks_per_processor) {
  const ConvParams& p = a.params;
  const int64_t blocks =
      int64_t(blocks_per_processor) * cuda::device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t channel_tiles = a.channels.tiles;
  const double weight_sums = double(blocks) * p.cells() * p.channels;
  const double offset_sums = 2.0 * p.taps() * p.batch * p.out_h * p.out_w;
  int64_t groups = std::llround(std::sqrt(weight_sums / offset_sums));
  groups = std::max(groups, (blocks + tiles - 1) / tiles);
  if (!a.kernel_offset.data && !a.data_offset.data) groups = channel_tiles;
  a.groups = static_cast<int>(std::clamp<int64_t>(groups, 1, std::min(channel_tiles, blocks)));
  a.splits = static_cast<int>(std::clamp<int64_t>(blocks / a.groups, 1, tiles));
  a.tiles_of_split = {tiles, a.splits};
  a.channels_of_group = {channel_tiles, a.groups};
}

// The gradient of an offset, summed per group of channels: one zeroed row per group.
template <typename T>
struct OffsetGradient {
  std::optional<Tensor> rows, like;

  OffsetGradient(const std::optional<Tensor>& offset, int groups) {
    if (!offset) return;
    like = stable::empty_like(*offset);
    // Taps that lie in the padding are never visited: their gradient stays 0.
    rows = stable::new_zeros(*like, {groups, like->numel()});
  }
  cuda::OffsetGradients<T> view(const ConvParams& p) const {
    if (!like) return {};
    return {{rows->mutable_data_ptr<T>(), offset_strides(*like), is_modulated(p, *like)},
            like->numel()};
  }
  Tensor total() const {
    const Tensor sum = rows->size(0) == 1 ? *rows : stable::sum(*rows, IntArrayRef({0}));
    return as_strided(sum, like->sizes(), like->strides());
  }
};

// In sorted order instead of by atomics.
template <typename scalar_t>
Tensor gather_grad_input(const BackwardArgs<scalar_t>& a, const Tensor& x, cudaStream_t stream) {
  const ConvParams& p = a.params;
  const Tensor base =
      stable::new_empty(x, {p.batch * p.out_h * p.out_w * p.taps()}, ScalarType::Long);
  cuda::launch_base_pixels(a, base.mutable_data_ptr<int64_t>(), stream);
  const auto [sorted, pair] = stable_sort(base);
  const Tensor grad_input = stable::empty_like(x);
  cuda::launch_gather_grad_input(a, sorted.template const_data_ptr<int64_t>(),
                                 pair.template const_data_ptr<int64_t>(),
                                 grad_input.mutable_data_ptr<scalar_t>(), stream);
  return grad_input;
}

}  // namespace

std::vector<Tensor> deform_kernel_conv2d_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& kernel_offset, const std::optional<Tensor>& data_offset,
    IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t groups, bool clip, const std::vector<bool>& output_mask, bool deterministic) {
  const ConvParams p =
      checked_backward_params(grad_output, input, weight, kernel_offset, data_offset, kernel_size,
                              stride, padding, dilation, groups, clip, output_mask);
  const stable::accelerator::DeviceGuard guard(input.get_device_index());
  Gradients gradients;
  if (grad_output.numel() == 0 || input.numel() == 0) {
    gradients = zero_gradients(input, weight, kernel_offset, data_offset);
  } else {
    check_sizes(p);
    // The weight's gradient sums over pixels: only with channels next to each other can every
    // thread keep its own. Three conversions cost less than summing across threads, cell by cell.
    const auto format = MemoryFormat::ChannelsLast;
    const Tensor x = laid_out(p, input, format);
    const Tensor grad = stable::contiguous(grad_output, format);
    const Tensor w = stable::contiguous(weight);
    DK_DISPATCH(input.scalar_type(), "deform_kernel_conv2d_backward", [&] {
      using T = BackwardArgs<scalar_t>::T;
      constexpr int wide = 16 / sizeof(T);
      const cudaStream_t stream = current_stream(input);
      const auto kernel = to_arithmetic<T>(kernel_offset), data = to_arithmetic<T>(data_offset);
      BackwardArgs<scalar_t> a{};
      a.params = p;
      a.input = x.const_data_ptr<scalar_t>();
      a.weight = w.const_data_ptr<scalar_t>();
      a.grad_output = grad.const_data_ptr<scalar_t>();
      a.kernel_offset = offset_view<T>(p, kernel);
      a.data_offset = offset_view<T>(p, data);
      if (!p.depthwise()) {
        gradients =
            cuda::dense_backward<scalar_t>({{p, a.input, a.kernel_offset, a.data_offset}}, x,
                                           weight, kernel, data, grad, output_mask, deterministic);
        return;
      }

      std::optional<Tensor> grad_input;
      if (!data) {
        grad_input = stable::empty_like(x);
        a.grad_input = grad_input->mutable_data_ptr<scalar_t>();
      } else if (output_mask[0] && deterministic) {
        grad_input = gather_grad_input(a, x, stream);
      } else if (output_mask[0]) {
        Tensor zeros = empty(x, x.sizes(), scalar_type_of<T>, format);
        grad_input = stable::zero_(zeros);
        a.grad_input_sum = grad_input->mutable_data_ptr<T>();
      }

      const bool aligned =
          p.channels % wide == 0 && is_aligned(x) && is_aligned(grad) && is_aligned(w);
      const bool matrix =
          sizeof(scalar_t) == 2 && has_matrix_kernel<scalar_t>(p, kernel, data, aligned);
      const int blocks_per_processor =
          matrix ? plan_backward_matrix(a) : plan_backward_block(a, aligned);
      const int64_t tiles =
          matrix ? cuda::matrix_tiles(p.batch, p.in_h, p.in_w)
                 : cuda::pixel_tiles(p.batch * (data ? p.out_h * p.out_w : p.in_h * p.in_w));
      plan_backward_split(a, tiles, blocks_per_processor);
      const Tensor partial =
          stable::new_empty(x, {a.splits, p.cells(), p.channels}, scalar_type_of<T>);
      a.weight_partial = partial.mutable_data_ptr<T>();
      const OffsetGradient<T> grad_kernel(kernel, a.groups), grad_data(data, a.groups);
      a.grad_kernel_offset = grad_kernel.view(p);
      a.grad_data_offset = grad_data.view(p);
      if constexpr (sizeof(scalar_t) == 2) {
        if (matrix) cuda::launch_backward_matrix(a, stream);
      }
      if (!matrix) cuda::launch_backward(a, stream);

      gradients[1] = stable::new_empty(weight, weight.sizes());
      cuda::launch_sum_weight(a, gradients[1]->mutable_data_ptr<scalar_t>(), stream);
      gradients[0] = grad_input;
      if (kernel) {
        const Tensor grad = grad_kernel.total();
        if (p.clip) cuda::launch_turn_inward(a, gradient_view<T>(p, grad), stream);
        gradients[2] = grad;
      }
      if (data) gradients[3] = grad_data.total();
    });
    if (gradients[0]) {
      gradients[0] =
          stable::contiguous(to_type(*gradients[0], input.scalar_type()), output_format(input));
    }
    if (kernel_offset) gradients[2] = to_type(*gradients[2], kernel_offset->scalar_type());
    if (data_offset) gradients[3] = to_type(*gradients[3], data_offset->scalar_type());
  }
  return needed_gradients(gradients, output_mask);
}

}  // namespace dk

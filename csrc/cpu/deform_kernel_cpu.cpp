// CPU host functions: check, lay out, split the work, run the kernels of this processor.
#include <cstdlib>
#include <string>

#include "../dense.h"
#include "kernels.h"

namespace dk {

void out_of_memory(int64_t bytes) {
  throw std::runtime_error(
      message("deform_kernel_conv2d: expected ", bytes,
              " bytes of memory for what a thread keeps of its taps, got none: use fewer threads "
              "(torch.set_num_threads), or smaller images or kernels"));
}

namespace {

enum class Isa { baseline, avx2, avx512 };

// torch's own choice, which the stable ABI does not tell: by the same features of the processor and
// the same variable, which can only lower it here.
Isa current_isa() {
  static const Isa isa = [] {
#if defined(__x86_64__)
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string wanted = variable ? variable : "";
    if (wanted == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
      return Isa::baseline;
    }
    if (wanted == "avx2" || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq")) {
      return Isa::avx2;
    }
    return Isa::avx512;
#else
    return Isa::baseline;
#endif
  }();
  return isa;
}

#if defined(__x86_64__)
#define DK_CALL(function, ...)                              \
  switch (current_isa()) {                                  \
    case Isa::avx512: avx512::function(__VA_ARGS__); break; \
    case Isa::avx2: avx2::function(__VA_ARGS__); break;     \
    default: baseline::function(__VA_ARGS__);               \
  }
#else
#define DK_CALL(function, ...) baseline::function(__VA_ARGS__);
#endif

// Kernels count cells, and with data_offset rows and columns, in 32 bits.
void check_sizes(const ConvParams& p, bool kernel, bool data) {
  constexpr int64_t limit = std::numeric_limits<int>::max(), most = limit / (4 * kChannelBlock);
  DK_CHECK(!kernel || (p.scope_h + int64_t(1)) * (p.scope_w + int64_t(1)) <= most,
           "weight: on a CPU, expected a scope of at most ", most,
           " cells, with one more row and column, got ", p.scope_h, "x", p.scope_w);
  DK_CHECK(!data || std::max(p.in_h, p.in_w) <= limit,
           "input: on a CPU, with data_offset, expected at most ", limit, " rows and columns, got ",
           p.in_h, "x", p.in_w);
}

int64_t channel_blocks(const ConvParams& p) {
  return (p.channels + kChannelBlock - 1) / kChannelBlock;
}

// Calls body(i, j) for each value of `count` blocks of channels: i counts in [C, 1, S_h, S_w],
// j in [blocks, S_h*S_w, kChannelBlock] from block `first` on.
template <typename Body>
void for_blocks(const ConvParams& p, int64_t first, int64_t count, const Body& body) {
  const int64_t begin = first * kChannelBlock;
  const int64_t end = std::min(p.channels, begin + count * kChannelBlock);
  for (int64_t c = begin; c < end; ++c) {
    const int64_t at = (c - begin) / kChannelBlock * p.cells() * kChannelBlock + c % kChannelBlock;
    for (int64_t cell = 0; cell < p.cells(); ++cell)
      body(c * p.cells() + cell, at + cell * kChannelBlock);
  }
}

// The scope in the kernels' layout and the arithmetic type.
template <typename T>
Tensor to_blocks(const ConvParams& p, const Tensor& weight) {
  const Tensor from = stable::contiguous(to_type(weight, scalar_type_of<T>));
  const Tensor to = stable::new_empty(from, {channel_blocks(p), p.cells(), kChannelBlock});
  const T* x = from.const_data_ptr<T>();
  T* y = to.mutable_data_ptr<T>();
  for_blocks(p, 0, channel_blocks(p), [&](int64_t i, int64_t j) { y[j] = x[i]; });
  return to;
}

// ---- not depthwise ------------------------------------------------------------------------------

// What forward and backward read alike; the weight comes later.
template <typename scalar_t>
Columns<scalar_t> dense_columns(const ConvParams& p, const Tensor& input,
                                const std::optional<Tensor>& kernel_offset,
                                const std::optional<Tensor>& data_offset) {
  using T = opmath_t<scalar_t>;
  return {p,
          input.const_data_ptr<scalar_t>(),
          offset_view<T>(p, kernel_offset),
          offset_view<T>(p, data_offset),
          /*weight=*/nullptr,
          /*panels=*/nullptr};
}

// Tiles of the pixels and parts of the panels, together a multiple of the threads where that goes.
// Of few pixels, threads share the panels: each makes all columns, but packs its own part alone.
template <typename scalar_t>
void share_out(DenseForward<scalar_t>& a, int64_t pixels, int64_t panels) {
  const int64_t threads = stable::get_num_threads(), most = most_pixels(a.params);
  a.tiles = (pixels + most - 1) / most;
  a.parts = 1;
  while (2 * a.parts * a.tiles <= threads && 2 * a.parts <= panels) a.parts *= 2;
  const int64_t step = (threads + a.parts - 1) / a.parts;
  a.tiles = std::min((a.tiles + step - 1) / step * step, pixels);
}

template <typename scalar_t>
void dense_forward(DenseForward<scalar_t> a, const Tensor& weight,
                   const std::optional<Tensor>& bias) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const int64_t panels = p.groups * output_panels(p);
  const Tensor scope = stable::contiguous(to_type(weight, scalar_type_of<T>));
  std::optional<Tensor> row = to_arithmetic<T>(bias);
  if (row) row = stable::contiguous(*row);
  a.weight = scope.const_data_ptr<T>();
  a.bias = row ? row->const_data_ptr<T>() : nullptr;
  share_out(a, p.batch * p.out_h * p.out_w, panels);
  std::optional<Tensor> kept;
  if (a.tiles > stable::get_num_threads()) {  // each comes back to the panels
    kept = stable::new_empty(scope, {panels, group_columns(p), panel_width(p)});
    T* to = kept->mutable_data_ptr<T>();
    stable::parallel_for(
        0, panels, 1, [&](int64_t begin, int64_t end) { DK_CALL(pack_panels, a, to, begin, end) });
    a.panels = to;
  }
  stable::parallel_for(0, a.tiles * a.parts, 1,
                       [&](int64_t begin, int64_t end) { DK_CALL(dense_forward, a, begin, end) });
}

// The gradient of the input: no two threads add to the same place, and each adds in one order.
template <typename scalar_t>
void add_grad_taps(const DenseBackward<scalar_t>& a, opmath_t<scalar_t>* grad_input) {
  constexpr int64_t kScatterChannels = 32;
  const ConvParams& p = a.params;
  if (a.data_offset.data) {
    const int64_t blocks = (p.channels + kScatterChannels - 1) / kScatterChannels;
    stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(p.channels, end * kScatterChannels);
      DK_CALL(scatter_taps, a, grad_input, begin * kScatterChannels, last)
    });
  } else {
    const auto [begin, end] = dense::input_rows(p, a.first, a.first + a.count - 1);
    stable::parallel_for(begin, end, 1, [&](int64_t begin, int64_t end) {
      DK_CALL(add_taps, a, grad_input, begin, end)
    });
  }
}

// Summed up in parts of the pixels, whose number does not depend on that of the threads, then over
// the parts in order.
template <typename scalar_t>
Tensor dense_weight_gradient(DenseBackward<scalar_t> a, const Tensor& weight) {
  using T = opmath_t<scalar_t>;
  // Enough items for so many threads, in at most 16 MiB of floats, or one part.
  constexpr int64_t kItems = 32, kValues = int64_t(1) << 22, kGrain = int64_t(1) << 14;
  const ConvParams& p = a.params;
  const int64_t pixels = p.batch * p.out_h * p.out_w, size = weight.numel();
  const int64_t most = std::min(kItems / dense_blocks(p), kValues / size);
  a.parts = std::clamp<int64_t>(most, 1, (pixels + most_pixels(p) - 1) / most_pixels(p));
  Tensor sums = stable::new_empty(weight, {a.parts, size}, scalar_type_of<T>);
  a.grad_weight = sums.mutable_data_ptr<T>();
  stable::parallel_for(0, a.parts * dense_blocks(p), 1,
                       [&](int64_t begin, int64_t end) { DK_CALL(weight_gradient, a, begin, end) });
  stable::parallel_for(0, p.out_channels, kGrain / group_columns(p) + 1,
                       [&](int64_t begin, int64_t end) { DK_CALL(sum_parts, a, begin, end) });
  const Tensor sum = stable::view(stable::select(sums, 0, 0), weight.sizes());
  if (a.parts == 1) return to_type(sum, weight.scalar_type());
  // A copy, which does not keep all parts.
  return to_type(stable::clone(sum), weight.scalar_type());
}

// All other gradients. `grad_input` is null where it is not wanted.
template <typename scalar_t>
void dense_taps_gradient(DenseBackward<scalar_t> a, const Tensor& weight,
                         opmath_t<scalar_t>* grad_input) {
  using T = opmath_t<scalar_t>;
  // For each thread half a MiB of floats, which stay in its second-level cache, but, as each tile
  // reads the whole weight, as many as 256 pixels have; 16 MiB for all.
  constexpr int64_t kCached = int64_t(1) << 17, kPixels = 256, kMost = int64_t(1) << 22;
  // Pixels of an item, whole rows of blocks of a matrix product: which rows such a block has, and
  // so how a compiler may round them, does not depend on the threads.
  constexpr int64_t kItem = 24;
  constexpr int64_t kPacked = 16;  // outputs that a thread packs at least
  const ConvParams& p = a.params;
  const int64_t pixels = p.batch * p.out_h * p.out_w;
  const int64_t values = p.taps() * p.channels;
  const int64_t most = stable::get_num_threads() * std::max(kCached / values, kPixels);
  const int64_t tile = dense::tile_size(pixels, std::min(most, kMost / values));
  const int64_t step = (tile + kItem - 1) / kItem * kItem;
  const Tensor scope = stable::contiguous(to_type(weight, scalar_type_of<T>));
  const Tensor taps = stable::new_empty(scope, {step, p.taps(), p.channels});
  a.weight = scope.const_data_ptr<T>();
  std::optional<Tensor> kept;
  if (step < pixels) {  // each tile comes back to the panels, of which products read whole vectors
    kept = stable::new_empty(scope, {weight.numel() + kPanel});
    T* to = kept->mutable_data_ptr<T>();
    stable::parallel_for(0, p.out_channels / p.groups, kPacked, [&](int64_t begin, int64_t end) {
      DK_CALL(pack_grad_panels, a, to, begin, end)
    });
    a.panels = to;
  }
  a.grad_taps = taps.mutable_data_ptr<T>();
  for (a.first = 0; a.first < pixels; a.first += step) {
    a.count = std::min(step, pixels - a.first);
    stable::parallel_for(0, (a.count + kItem - 1) / kItem, 1, [&](int64_t begin, int64_t end) {
      DK_CALL(taps_gradient, a, begin * kItem, std::min(a.count, end * kItem))
    });
    if (grad_input) add_grad_taps(a, grad_input);
  }
}

// ---- the operators ------------------------------------------------------------------------------

Tensor deform_kernel_conv2d_cpu(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& kernel_offset,
                                const std::optional<Tensor>& data_offset, IntArrayRef kernel_size,
                                IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                int64_t groups, bool clip) {
  const ConvParams p = checked_params(input, weight, bias, kernel_offset, data_offset, kernel_size,
                                      stride, padding, dilation, groups, clip);
  check_sizes(p, kernel_offset.has_value(), data_offset.has_value());
  const MemoryFormat format = output_format(input);
  const bool nchw = p.depthwise() && format == MemoryFormat::Contiguous;
  const Tensor x =
      stable::contiguous(input, nchw && !data_offset ? format : MemoryFormat::ChannelsLast);
  Tensor output = empty(input, {p.batch, p.out_channels, p.out_h, p.out_w}, input.scalar_type(),
                        nchw ? format : MemoryFormat::ChannelsLast);
  if (input.numel() == 0 || output.numel() == 0) {  // at most padding, which has no pixel to read
    fill_with_bias(output, bias);
    return stable::contiguous(output, format);
  }
  DK_DISPATCH(input.scalar_type(), "deform_kernel_conv2d", [&] {
    using T = opmath_t<scalar_t>;
    const auto kernel = to_arithmetic<T>(kernel_offset), data = to_arithmetic<T>(data_offset);
    if (!p.depthwise()) {
      DenseForward<scalar_t> a{dense_columns<scalar_t>(p, x, kernel, data)};
      a.output = output.mutable_data_ptr<scalar_t>();
      return dense_forward(a, weight, bias);
    }
    const Tensor scope = to_blocks<T>(p, weight);
    std::optional<Tensor> b = to_arithmetic<T>(bias);
    if (b) b = stable::contiguous(*b);
    const DepthwiseForward<scalar_t> a{p,
                                       x.const_data_ptr<scalar_t>(),
                                       scope.const_data_ptr<T>(),
                                       b ? b->const_data_ptr<T>() : nullptr,
                                       offset_view<T>(p, kernel),
                                       offset_view<T>(p, data),
                                       output.mutable_data_ptr<scalar_t>(),
                                       nchw};
    stable::parallel_for(0, p.batch * p.out_h, 1,
                         [&](int64_t begin, int64_t end) { DK_CALL(forward, a, begin, end) });
  });
  return stable::contiguous(output, format);
}

// The weight gradient is summed in a fixed number of parts of the rows, each in order, then over
// the parts in order: the result does not depend on the number of threads. A twentieth of the
// input's size for the partial sums buys enough parts to keep the threads busy. Where it does not
// buy four, the channels are done in passes, each with the partial sums of its blocks alone.
struct Passes {
  int64_t parts, blocks;  // at once
};

Passes plan_passes(const ConvParams& p, int64_t rows) {
  const int64_t affordable = p.batch * p.channels * p.in_h * p.in_w / 20;
  const int64_t block = p.cells() * kChannelBlock, blocks = channel_blocks(p);
  // Besides the sums, there is the scope itself.
  const int64_t wanted = std::clamp<int64_t>(affordable / (blocks * block) - 1, 4, 64);
  const int64_t parts = std::min(rows, wanted);
  return {parts, std::clamp<int64_t>(affordable / ((parts + 1) * block), 1, blocks)};
}

// The weight gradient: calls body(arguments of a pass, begin, end, partial gradient, which starts
// at zero) over parts of the rows.
template <typename scalar_t, typename Body>
Tensor sum_weight_gradient(DepthwiseBackward<scalar_t> a, const Tensor& weight, int64_t rows,
                           const Body& body) {
  using T = opmath_t<scalar_t>;
  const ConvParams& p = a.params;
  const Tensor from = stable::contiguous(to_type(weight, scalar_type_of<T>));
  const Tensor to = stable::new_empty(from, weight.sizes());
  const Passes passes = plan_passes(p, rows);
  const int64_t parts = passes.parts, at_once = passes.blocks;
  const int64_t size = at_once * p.cells() * kChannelBlock;
  const Tensor scope = stable::new_empty(from, {size}),
               sums = stable::new_empty(from, {parts, size});
  const T* x = from.const_data_ptr<T>();
  T *w = scope.mutable_data_ptr<T>(), *partials = sums.mutable_data_ptr<T>();
  T* y = to.mutable_data_ptr<T>();
  a.weight = w;
  for (int64_t first = 0; first < channel_blocks(p); first += at_once) {
    a.first_channel = first * kChannelBlock;
    a.last_channel = std::min(p.channels, a.first_channel + at_once * kChannelBlock);
    for_blocks(p, first, at_once, [&](int64_t i, int64_t j) { w[j] = x[i]; });
    stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* partial = partials + i * size;
        std::fill(partial, partial + size, T(0));
        body(a, i * rows / parts, (i + 1) * rows / parts, partial);
      }
    });
    for (int64_t i = 1; i < parts; ++i) {
      for (int64_t j = 0; j < size; ++j) partials[j] += partials[i * size + j];
    }
    for_blocks(p, first, at_once, [&](int64_t i, int64_t j) { y[i] = partials[j]; });
  }
  return to_type(to, weight.scalar_type());
}

// Deterministic without being asked.
std::vector<Tensor> deform_kernel_conv2d_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& kernel_offset, const std::optional<Tensor>& data_offset,
    IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t groups, bool clip, const std::vector<bool>& output_mask, bool /*deterministic*/) {
  const ConvParams p =
      checked_backward_params(grad_output, input, weight, kernel_offset, data_offset, kernel_size,
                              stride, padding, dilation, groups, clip, output_mask);
  check_sizes(p, kernel_offset.has_value(), data_offset.has_value());
  if (input.numel() == 0 || grad_output.numel() == 0) {
    return needed_gradients(zero_gradients(input, weight, kernel_offset, data_offset), output_mask);
  }
  const bool nchw =
      p.depthwise() && !data_offset && output_format(input) == MemoryFormat::Contiguous;
  const auto format = nchw ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast;
  const Tensor x = stable::contiguous(input, format);
  const Tensor grad = stable::contiguous(grad_output, format);
  Gradients gradients;
  DK_DISPATCH(input.scalar_type(), "deform_kernel_conv2d_backward", [&] {
    using T = opmath_t<scalar_t>;
    const auto kernel = to_arithmetic<T>(kernel_offset), data = to_arithmetic<T>(data_offset);
    // Taps that lie in the padding for every input pixel are never visited: their gradient is 0.
    if (kernel) gradients[2] = zeros_like(*kernel);
    if (data) gradients[3] = zeros_like(*data);
    if (!p.depthwise()) {
      const Tensor exact = to_type(grad, scalar_type_of<T>);
      DenseBackward<scalar_t> a{dense_columns<scalar_t>(p, x, kernel, data)};
      a.grad_output = exact.const_data_ptr<T>();
      a.grad_kernel_offset = gradient_view<T>(p, gradients[2]);
      a.grad_data_offset = gradient_view<T>(p, gradients[3]);
      if (output_mask[1]) gradients[1] = dense_weight_gradient(a, weight);
      T* grad_input = nullptr;
      if (output_mask[0]) {
        Tensor zeros = empty(x, x.sizes(), scalar_type_of<T>, format);
        gradients[0] = stable::zero_(zeros);
        grad_input = gradients[0]->mutable_data_ptr<T>();
      }
      if (output_mask[0] || output_mask[2] || output_mask[3])
        dense_taps_gradient(a, weight, grad_input);
      return;
    }
    DepthwiseBackward<scalar_t> a{p,
                                  x.const_data_ptr<scalar_t>(),
                                  /*weight=*/nullptr,
                                  offset_view<T>(p, kernel),
                                  offset_view<T>(p, data),
                                  grad.const_data_ptr<scalar_t>(),
                                  gradient_view<T>(p, gradients[2]),
                                  gradient_view<T>(p, gradients[3]),
                                  /*first_channel=*/0,
                                  p.channels,
                                  nchw};
    if (!data) {
      gradients[0] = stable::empty_like(x);
      scalar_t* grad_input = gradients[0]->mutable_data_ptr<scalar_t>();
      gradients[1] = sum_weight_gradient(
          a, weight, p.batch * p.in_h, [&](const auto& a, int64_t begin, int64_t end, T* partial) {
            DK_CALL(backward, a, grad_input, partial, begin, end)
          });
      return;
    }
    if (output_mask[1] || output_mask[2] || output_mask[3]) {
      gradients[1] = sum_weight_gradient(
          a, weight, p.batch * p.out_h, [&](const auto& a, int64_t begin, int64_t end, T* partial) {
            DK_CALL(backward_data_offset, a, partial, begin, end)
          });
    }
    if (output_mask[0]) {
      const Tensor scope = to_blocks<T>(p, weight);
      a.weight = scope.const_data_ptr<T>();
      Tensor zeros = empty(x, x.sizes(), scalar_type_of<T>, format);
      gradients[0] = stable::zero_(zeros);
      T* grad_input = gradients[0]->mutable_data_ptr<T>();
      // Channels are independent: splitting them changes no sum.
      const int64_t blocks = channel_blocks(p);
      stable::parallel_for(0, p.batch * blocks, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          DK_CALL(backward_data, a, grad_input, i / blocks, i % blocks)
        }
      });
    }
  });
  if (gradients[0]) {
    gradients[0] =
        stable::contiguous(to_type(*gradients[0], input.scalar_type()), output_format(input));
  }
  if (kernel_offset) gradients[2] = to_type(*gradients[2], kernel_offset->scalar_type());
  if (data_offset) gradients[3] = to_type(*gradients[3], data_offset->scalar_type());
  return needed_gradients(gradients, output_mask);
}

}  // namespace
}  // namespace dk

STABLE_TORCH_LIBRARY_IMPL(dk_detectron, CPU, m) {
  m.impl("deform_kernel_conv2d", TORCH_BOX(&dk::deform_kernel_conv2d_cpu));
  m.impl("deform_kernel_conv2d_backward", TORCH_BOX(&dk::deform_kernel_conv2d_backward_cpu));
}

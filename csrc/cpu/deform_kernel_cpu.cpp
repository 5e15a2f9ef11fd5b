// CPU host functions: check, lay out, split the work, run the kernels of this processor.
#include <cstdlib>
#include <string>

#include "../dense.h"
#include "kernels.h"

// oneDNN's matrix product. torch.matmul calls MKL instead, which does not use AVX-512 on every
// processor that has it. Null in a torch that is built without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B, const char* attr,
    const double** scalars, int64_t scalars_len_, const char** algorithm, AtenTensorHandle* ret0);

namespace dk {
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
#define DK_CALL(function, ...) baseline::function(__VA_ARGS__)
#endif

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

// dense.h's view of these kernels. Columns are in the arithmetic type: rounded to bfloat16, their
// products would be no faster without instructions of its own, and less exact.
template <typename scalar_t>
struct DenseBackend {
  using T = opmath_t<scalar_t>;
  // At most 16 MiB of float columns, and 4 MiB of their gradient. Beyond 512 pixels, the products
  // are no faster.
  static constexpr int64_t tile_values = int64_t(1) << 22, tile_pixels = 512;
  static constexpr int64_t gradient_values = tile_values / 4;
  static constexpr bool cells_first = false;
  static constexpr ScalarType type = scalar_type_of<T>;
  static constexpr int64_t kPixelGrain = 16, kScatterChannels = 32, kAddGrain = 1 << 14;

  const Tensor& like;
  ColumnsBackward<scalar_t> a;
  T* grad_input = nullptr;  // null: not wanted
  // For all tiles, since fresh memory is slow. The first tile is the largest.
  std::optional<Tensor> buffer, grad_taps;

  Tensor product(const Tensor& x, const Tensor& y) const {
    if (std::is_same_v<T, float> && x.size(0) == 1 && aoti_torch_cpu__linear_pointwise) {
      const Tensor matrix = stable::select(x, 0, 0);
      const Tensor transposed = stable::transpose(stable::select(y, 0, 0), 0, 1);
      AtenTensorHandle result;
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(
          matrix.get(), transposed.get(), nullptr, "none", nullptr, 0, nullptr, &result));
      return stable::unsqueeze(Tensor(result), 0);
    }
    return stable::contiguous(stable::matmul(x, y));
  }

  Tensor columns(int64_t first, int64_t count) {
    const ConvParams& p = a.params;
    a.first = first;
    a.count = count;
    const int64_t values = p.channels / p.groups * p.cells();
    if (!buffer) buffer = stable::new_empty(like, {p.groups * count * values}, type);
    T* data = buffer->mutable_data_ptr<T>();
    stable::parallel_for(0, count, kPixelGrain,
                         [&](int64_t begin, int64_t end) { DK_CALL(columns, a, data, begin, end) });
    return as_strided(*buffer, {p.groups, count, values}, {count * values, values, 1});
  }

  static void add(std::optional<Tensor>& sum, const Tensor& part) {
    if (!sum) {
      sum = part;
      return;
    }
    T* to = sum->mutable_data_ptr<T>();
    const T* from = part.const_data_ptr<T>();
    stable::parallel_for(0, part.numel(), kAddGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    });
  }

  void backward(const Tensor& grad_columns, int64_t first, int64_t count) {
    const ConvParams& p = a.params;
    if (!grad_taps) grad_taps = stable::new_empty(like, {count, p.taps(), p.channels}, type);
    a.first = first;
    a.count = count;
    a.grad_columns = grad_columns.const_data_ptr<T>();
    a.grad_taps = grad_taps->mutable_data_ptr<T>();
    stable::parallel_for(0, count, kPixelGrain, [&](int64_t begin, int64_t end) {
      DK_CALL(columns_backward, a, begin, end)
    });
    if (!grad_input) return;
    // No two threads add to the same place, and each adds in one order.
    if (a.data_offset.data) {
      const int64_t blocks = (p.channels + kScatterChannels - 1) / kScatterChannels;
      stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(p.channels, end * kScatterChannels);
        DK_CALL(scatter_taps, a, grad_input, begin * kScatterChannels, last)
      });
    } else {
      const auto [begin, end] = dense::input_rows(p, first, first + count - 1);
      stable::parallel_for(begin, end, 1, [&](int64_t begin, int64_t end) {
        DK_CALL(add_taps, a, grad_input, begin, end)
      });
    }
  }
};

// ---- the operators ------------------------------------------------------------------------------

Tensor deform_kernel_conv2d_cpu(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& kernel_offset,
                                const std::optional<Tensor>& data_offset, IntArrayRef kernel_size,
                                IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                int64_t groups, bool clip) {
  const ConvParams p = checked_params(input, weight, bias, kernel_offset, data_offset, kernel_size,
                                      stride, padding, dilation, groups, clip);
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
      DenseBackend<scalar_t> backend{x};
      backend.a.params = p;
      backend.a.input = x.const_data_ptr<scalar_t>();
      backend.a.kernel_offset = offset_view<T>(p, kernel);
      backend.a.data_offset = offset_view<T>(p, data);
      return dense::forward(p, backend, weight, bias, output);
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
  const auto [parts, at_once] = plan_passes(p, rows);
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
      DenseBackend<scalar_t> backend{x};
      backend.a.params = p;
      backend.a.input = x.const_data_ptr<scalar_t>();
      backend.a.kernel_offset = offset_view<T>(p, kernel);
      backend.a.data_offset = offset_view<T>(p, data);
      backend.a.grad_kernel_offset = gradient_view<T>(p, gradients[2]);
      backend.a.grad_data_offset = gradient_view<T>(p, gradients[3]);
      if (output_mask[0]) {
        Tensor zeros = empty(x, x.sizes(), scalar_type_of<T>, format);
        gradients[0] = stable::zero_(zeros);
        backend.grad_input = gradients[0]->mutable_data_ptr<T>();
      }
      gradients[1] = dense::backward(p, backend, weight, grad, output_mask);
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

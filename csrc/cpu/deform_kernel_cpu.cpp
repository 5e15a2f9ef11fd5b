// CPU host functions: check, lay out, split the work, run the kernels of this processor.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include "depthwise.h"

namespace dk {
namespace {

enum class Isa { baseline, avx2, avx512 };

// torch's own choice, so that its ATEN_CPU_CAPABILITY variable steers these kernels as well.
Isa current_isa() {
  static const Isa isa = [] {
#if defined(__x86_64__)
    const std::string name = at::get_cpu_capability();
    if (name == "AVX512") return Isa::avx512;
    if (name == "AVX2") return Isa::avx2;
#endif
    return Isa::baseline;
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

int64_t channel_blocks(const DepthwiseParams& p) {
  return (p.channels + kChannelBlock - 1) / kChannelBlock;
}

// [C, 1, S_h, S_w] -> [blocks of C, S_h*S_w, kChannelBlock] in the arithmetic type.
template <typename T>
at::Tensor to_blocks(const DepthwiseParams& p, const at::Tensor& weight) {
  const at::Tensor from = weight.to(c10::CppTypeToScalarType<T>::value).contiguous();
  const at::Tensor to = at::empty({channel_blocks(p), p.cells(), kChannelBlock}, from.options());
  const T* x = from.const_data_ptr<T>();
  T* y = to.mutable_data_ptr<T>();
  for (int64_t c = 0; c < p.channels; ++c) {
    T* first = y + c / kChannelBlock * p.cells() * kChannelBlock + c % kChannelBlock;
    for (int64_t cell = 0; cell < p.cells(); ++cell) first[cell * kChannelBlock] = *x++;
  }
  return to;
}

template <typename T>
Offset<T> gradient_view(const at::Tensor& offset) {
  if (!offset.defined()) return {};
  return {offset.mutable_data_ptr<T>(), offset_strides(offset)};
}

at::Tensor deform_kernel_conv2d_cpu(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias,
                                    const std::optional<at::Tensor>& kernel_offset,
                                    const std::optional<at::Tensor>& data_offset,
                                    at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                    at::IntArrayRef padding, at::IntArrayRef dilation,
                                    int64_t groups, bool clip) {
  const DepthwiseParams p = checked_params(input, weight, bias, kernel_offset, data_offset,
                                           kernel_size, stride, padding, dilation, groups, clip);
  const at::Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor output = at::empty({p.batch, p.channels, p.out_h, p.out_w}, input.options(),
                                      at::MemoryFormat::ChannelsLast);
  if (input.numel() == 0) {  // nothing but padding, which has no pixel to read
    output.zero_();
    if (bias) output.add_(bias->view({-1, 1, 1}));
    return output.contiguous(output_format(input));
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "deform_kernel_conv2d", [&] {
        using T = opmath_t<scalar_t>;
        const at::Tensor scope = to_blocks<T>(p, weight);
        const auto b = to_arithmetic<T>(bias);
        const auto kernel = to_arithmetic<T>(kernel_offset), data = to_arithmetic<T>(data_offset);
        const at::Tensor b_rows = b ? b->contiguous() : at::Tensor();
        const DepthwiseForward<scalar_t> a{p,
                                           x.const_data_ptr<scalar_t>(),
                                           scope.const_data_ptr<T>(),
                                           b ? b_rows.const_data_ptr<T>() : nullptr,
                                           offset_view<T>(kernel),
                                           offset_view<T>(data),
                                           output.mutable_data_ptr<scalar_t>()};
        at::parallel_for(0, p.batch * p.out_h, 1,
                         [&](int64_t begin, int64_t end) { DK_CALL(forward, a, begin, end) });
      });
  return output.contiguous(output_format(input));
}

// The weight gradient is summed in a fixed number of blocks of rows, each in order, then over the
// blocks in order: the result does not depend on the number of threads. A few percent of the
// input's size for the partial sums buys enough blocks to keep the threads busy.
int64_t count_weight_blocks(const DepthwiseParams& p, int64_t rows) {
  const int64_t input_size = p.batch * p.channels * p.in_h * p.in_w;
  const int64_t affordable = input_size / std::max<int64_t>(1, 20 * p.cells() * p.channels);
  return std::min(rows, std::clamp<int64_t>(affordable, 4, 64));
}

// Runs body(begin, end, partial gradient, which starts at zero) over blocks of rows, and returns
// the sum of the partial gradients, which are like the scope.
template <typename T, typename Body>
at::Tensor sum_weight_blocks(const DepthwiseParams& p, const at::Tensor& scope, int64_t rows,
                             const Body& body) {
  const int64_t blocks = count_weight_blocks(p, rows), size = scope.numel();
  const at::Tensor partials = at::empty({blocks, size}, scope.options());
  T* data = partials.mutable_data_ptr<T>();
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      T* partial = data + i * size;
      std::fill(partial, partial + size, T(0));
      body(i * rows / blocks, (i + 1) * rows / blocks, partial);
    }
  });
  return partials.sum(0).view(scope.sizes());
}

// The counterpart of to_blocks.
at::Tensor from_blocks(const DepthwiseParams& p, const at::Tensor& blocks,
                       const at::Tensor& weight) {
  const at::Tensor rows = blocks.transpose(1, 2).flatten(0, 1).narrow(0, 0, p.channels);
  return rows.reshape(weight.sizes()).to(weight.scalar_type()).contiguous();
}

std::vector<at::Tensor> deform_kernel_conv2d_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const std::optional<at::Tensor>& kernel_offset, const std::optional<at::Tensor>& data_offset,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool clip, std::array<bool, 4> output_mask) {
  const DepthwiseParams p =
      checked_backward_params(grad_output, input, weight, kernel_offset, data_offset, kernel_size,
                              stride, padding, dilation, groups, clip, output_mask);
  if (input.numel() == 0) {
    return needed_gradients(zero_gradients(input, weight, kernel_offset, data_offset), output_mask);
  }
  const auto format = at::MemoryFormat::ChannelsLast;
  const at::Tensor x = input.contiguous(format), grad = grad_output.contiguous(format);
  Gradients gradients;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "deform_kernel_conv2d_backward", [&] {
        using T = opmath_t<scalar_t>;
        const at::Tensor scope = to_blocks<T>(p, weight);
        const auto kernel = to_arithmetic<T>(kernel_offset), data = to_arithmetic<T>(data_offset);
        // Taps that lie in the padding for every input pixel are never visited: their gradient is
        // 0.
        if (kernel) gradients[2] = at::zeros_like(*kernel);
        if (data) gradients[3] = at::zeros_like(*data);
        const DepthwiseBackward<scalar_t> a{p,
                                            x.const_data_ptr<scalar_t>(),
                                            scope.const_data_ptr<T>(),
                                            offset_view<T>(kernel),
                                            offset_view<T>(data),
                                            grad.const_data_ptr<scalar_t>(),
                                            gradient_view<T>(gradients[2]),
                                            gradient_view<T>(gradients[3])};
        if (!data) {
          gradients[0] = at::empty_like(x);
          scalar_t* grad_input = gradients[0].mutable_data_ptr<scalar_t>();
          gradients[1] = sum_weight_blocks<T>(
              p, scope, p.batch * p.in_h, [&](int64_t begin, int64_t end, T* grad_weight) {
                DK_CALL(backward, a, grad_input, grad_weight, begin, end)
              });
        } else {
          if (output_mask[1] || output_mask[2] || output_mask[3]) {
            gradients[1] = sum_weight_blocks<T>(
                p, scope, p.batch * p.out_h, [&](int64_t begin, int64_t end, T* grad_weight) {
                  DK_CALL(backward_data_offset, a, grad_weight, begin, end)
                });
          }
          if (output_mask[0]) {
            gradients[0] = at::zeros_like(x, x.options().dtype(c10::CppTypeToScalarType<T>::value));
            T* grad_input = gradients[0].mutable_data_ptr<T>();
            // Channels are independent: splitting them changes no sum.
            const int64_t blocks = channel_blocks(p);
            at::parallel_for(0, p.batch * blocks, 1, [&](int64_t first, int64_t last) {
              for (int64_t i = first; i < last; ++i) {
                DK_CALL(backward_data, a, grad_input, i / blocks, i % blocks)
              }
            });
          }
        }
      });
  if (gradients[0].defined()) {
    gradients[0] = gradients[0].to(input.scalar_type()).contiguous(output_format(input));
  }
  if (gradients[1].defined()) gradients[1] = from_blocks(p, gradients[1], weight);
  if (kernel_offset) gradients[2] = gradients[2].to(kernel_offset->scalar_type());
  if (data_offset) gradients[3] = gradients[3].to(data_offset->scalar_type());
  return needed_gradients(gradients, output_mask);
}

}  // namespace
}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detectron, CPU, m) {
  m.impl("deform_kernel_conv2d", &dk::deform_kernel_conv2d_cpu);
  m.impl("deform_kernel_conv2d_backward", &dk::deform_kernel_conv2d_backward_cpu);
}

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

// [C, 1, S_h, S_w] -> [S_h*S_w, C] in the arithmetic type.
template <typename T>
at::Tensor scope_rows(const at::Tensor& weight) {
  return weight.flatten(1).t().to(c10::CppTypeToScalarType<T>::value).contiguous();
}

template <typename T>
Offset<T> gradient_view(const std::optional<at::Tensor>& offset) {
  if (!offset) return {};
  return {offset->mutable_data_ptr<T>(), offset_strides(*offset)};
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
        const at::Tensor rows = scope_rows<T>(weight);
        const auto b = to_arithmetic<T>(bias);
        const auto kernel = to_arithmetic<T>(kernel_offset), data = to_arithmetic<T>(data_offset);
        const at::Tensor b_rows = b ? b->contiguous() : at::Tensor();
        const DepthwiseForward<scalar_t> a{p,
                                           x.const_data_ptr<scalar_t>(),
                                           rows.const_data_ptr<T>(),
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

// Runs body(begin, end, partial weight gradient) over blocks of rows; returns [blocks, S_h*S_w, C].
template <typename T, typename Body>
at::Tensor sum_weight_blocks(const DepthwiseParams& p, const at::Tensor& rows_of_scope,
                             int64_t rows, const Body& body) {
  const int64_t blocks = count_weight_blocks(p, rows);
  const at::Tensor partial = at::zeros({blocks, p.cells(), p.channels}, rows_of_scope.options());
  T* data = partial.mutable_data_ptr<T>();
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      body(i * rows / blocks, (i + 1) * rows / blocks, data + i * p.cells() * p.channels);
    }
  });
  return partial.sum(0);
}

std::vector<at::Tensor> deform_kernel_conv2d_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const std::optional<at::Tensor>& kernel_offset, const std::optional<at::Tensor>& data_offset,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool clip, std::array<bool, 4> output_mask) {
  const DepthwiseParams p = checked_params(input, weight, std::nullopt, kernel_offset, data_offset,
                                           kernel_size, stride, padding, dilation, groups, clip);
  TORCH_CHECK((kernel_offset || !output_mask[2]) && (data_offset || !output_mask[3]),
              "output_mask: expected no gradient of an absent offset");
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type() &&
                  grad_output.sizes() == at::IntArrayRef({p.batch, p.channels, p.out_h, p.out_w}),
              "grad_output: expected the output's type and size, got ", grad_output.scalar_type(),
              " ", grad_output.sizes());
  const auto format = at::MemoryFormat::ChannelsLast;
  const at::Tensor x = input.contiguous(format), grad = grad_output.contiguous(format);
  std::array<std::optional<at::Tensor>, 4> gradients;
  std::vector<at::Tensor> needed;
  if (input.numel() == 0) {
    const std::array<std::optional<at::Tensor>, 4> inputs{input, weight, kernel_offset,
                                                          data_offset};
    for (int i = 0; i < 4; ++i) {
      if (output_mask[i]) needed.push_back(at::zeros_like(*inputs[i]));
    }
    return needed;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "deform_kernel_conv2d_backward", [&] {
        using T = opmath_t<scalar_t>;
        const at::Tensor scope = scope_rows<T>(weight);
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
          scalar_t* grad_input = gradients[0]->mutable_data_ptr<scalar_t>();
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
            T* grad_input = gradients[0]->mutable_data_ptr<T>();
            // Channels are independent: splitting them changes no sum.
            const int64_t step = 64, blocks = (p.channels + step - 1) / step;
            at::parallel_for(0, p.batch * blocks, 1, [&](int64_t first, int64_t last) {
              for (int64_t i = first; i < last; ++i) {
                const int64_t c = i % blocks * step;
                DK_CALL(backward_data, a, grad_input, i / blocks, c, std::min(c + step, p.channels))
              }
            });
          }
        }
      });
  if (gradients[0]) {
    gradients[0] = gradients[0]->to(input.scalar_type()).contiguous(output_format(input));
  }
  if (gradients[1]) {
    gradients[1] = gradients[1]->t().reshape(weight.sizes()).to(weight.scalar_type()).contiguous();
  }
  if (kernel_offset) gradients[2] = gradients[2]->to(kernel_offset->scalar_type());
  if (data_offset) gradients[3] = gradients[3]->to(data_offset->scalar_type());
  for (int i = 0; i < 4; ++i) {
    if (output_mask[i]) needed.push_back(*gradients[i]);
  }
  return needed;
}

}  // namespace
}  // namespace dk

TORCH_LIBRARY_IMPL(dk_detectron, CPU, m) {
  m.impl("deform_kernel_conv2d", &dk::deform_kernel_conv2d_cpu);
  m.impl("deform_kernel_conv2d_backward", &dk::deform_kernel_conv2d_backward_cpu);
}

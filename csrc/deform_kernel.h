// Sizes and strides of one deform_kernel_conv2d call, checked once, for every backend.
//
//   input          [N, C, H, W]
//   weight         [C_out, C/groups, S_h, S_w]  the scope
//   bias           [C_out]
//   kernel_offset  [N, 2*K_h*K_w, H_out, W_out] channel 2t: rows, 2t+1: columns, in scope cells
//   data_offset    [N, 2*K_h*K_w, H_out, W_out] the same layout, in input pixels
//                  the last of them may have K_h*K_w channels more: 2*K_h*K_w + t: what tap t is
//                  multiplied by
//   output         [N, C_out, H_out, W_out]
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "stable.h"

namespace dk {

// Arithmetic type: float for everything but double.
template <typename scalar_t>
using opmath_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

struct ConvParams {
  int64_t batch, channels, out_channels, groups, in_h, in_w, out_h, out_w;
  int scope_h, scope_w, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool clip;

  int taps() const { return kernel_h * kernel_w; }
  int cells() const { return scope_h * scope_w; }
  // Depthwise convolutions have direct kernels; dense.h has the others.
  bool depthwise() const { return groups == channels && out_channels == channels; }
};

// Element strides of an offset tensor, so that any memory format is read where it lies.
struct OffsetStrides {
  int64_t n, c, h, w;
};

template <typename T>
struct Offset {
  T* data = nullptr;  // null: absent
  OffsetStrides strides = {};
  bool modulated = false;  // whether there are factors of the taps behind their offsets
};

inline OffsetStrides offset_strides(const Tensor& offset) {
  return {offset.stride(0), offset.stride(1), offset.stride(2), offset.stride(3)};
}

inline bool is_modulated(const ConvParams& p, const Tensor& offset) {
  return offset.size(1) == 3 * p.taps();
}

template <typename T>
Offset<const T> offset_view(const ConvParams& p, const std::optional<Tensor>& offset) {
  if (!offset) return {};
  return {offset->const_data_ptr<T>(), offset_strides(*offset), is_modulated(p, *offset)};
}

// The same of its gradient, to be written.
template <typename T>
Offset<T> gradient_view(const ConvParams& p, const std::optional<Tensor>& grad) {
  if (!grad) return {};
  return {grad->mutable_data_ptr<T>(), offset_strides(*grad), is_modulated(p, *grad)};
}

template <typename T>
std::optional<Tensor> to_arithmetic(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return to_type(*tensor, scalar_type_of<T>);
}

// One rule for all backends and the fake kernels: channels_last in, channels_last out.
inline MemoryFormat output_format(const Tensor& input) {
  return input.size(1) > 1 && input.stride(1) == 1 ? MemoryFormat::ChannelsLast
                                                   : MemoryFormat::Contiguous;
}

// Throws on anything a kernel could not handle. dk_detectron.ops checks the same with friendlier
// words; this one is what keeps direct calls through torch.ops inside their memory.
inline ConvParams checked_params(const Tensor& input, const Tensor& weight,
                                 const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& kernel_offset,
                                 const std::optional<Tensor>& data_offset, IntArrayRef kernel_size,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                 int64_t groups, bool clip) {
  DK_CHECK(input.dim() == 4, "input: expected [N, C, H, W], got ", input.sizes());
  const int64_t channels = input.size(1);
  DK_CHECK(groups >= 1 && channels % groups == 0, "groups: expected a divisor of the ", channels,
           " input channels, got ", groups);
  DK_CHECK(weight.dim() == 4 && weight.size(1) == channels / groups && weight.size(0) % groups == 0,
           "weight: expected [C_out, ", channels / groups, ", S_h, S_w] with C_out a multiple of ",
           groups, " groups, got ", weight.sizes());
  DK_CHECK(is_floating_point(input), "input: expected a floating point type, got ",
           input.scalar_type());
  auto check_pair = [](IntArrayRef pair, const char* name, int64_t least) {
    // The upper bound keeps every sum and product below inside int64.
    constexpr int64_t most = std::numeric_limits<int>::max();
    DK_CHECK(pair.size() == 2 && std::min(pair[0], pair[1]) >= least &&
                 std::max(pair[0], pair[1]) <= most,
             name, ": expected two values from ", least, " to ", most, ", got ", pair);
  };
  check_pair(kernel_size, "kernel_size", 1);
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  check_pair(weight.sizes().slice(2), "scope size", 1);
  constexpr int64_t most = std::numeric_limits<int>::max() / 3;  // offsets and factors have an int
  DK_CHECK(kernel_size[0] * kernel_size[1] <= most && weight.size(2) * weight.size(3) <= most,
           "kernel_size, scope size: expected at most ", most, " taps and cells, got ", kernel_size,
           " and ", weight.sizes().slice(2));

  ConvParams p;
  p.batch = input.size(0);
  p.channels = channels;
  p.out_channels = weight.size(0);
  p.groups = groups;
  p.in_h = input.size(2);
  p.in_w = input.size(3);
  p.scope_h = static_cast<int>(weight.size(2));
  p.scope_w = static_cast<int>(weight.size(3));
  p.kernel_h = static_cast<int>(kernel_size[0]);
  p.kernel_w = static_cast<int>(kernel_size[1]);
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.pad_h = padding[0];
  p.pad_w = padding[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  p.clip = clip;
  p.out_h = (p.in_h + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_w = (p.in_w + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  DK_CHECK(p.in_h + 2 * p.pad_h > p.dilation_h * (p.kernel_h - 1) &&
               p.in_w + 2 * p.pad_w > p.dilation_w * (p.kernel_w - 1),
           "input: padded size ", p.in_h + 2 * p.pad_h, "x", p.in_w + 2 * p.pad_w,
           " is smaller than the dilated kernel ", kernel_size, " with dilation ", dilation);
  DK_CHECK(kernel_offset || (p.scope_h == p.kernel_h && p.scope_w == p.kernel_w),
           "weight: without kernel_offset expected a scope of the kernel size ", kernel_size,
           ", got ", weight.sizes(), "; sample_kernel makes one");

  auto check_like_input = [&](const Tensor& t, const char* name) {
    DK_CHECK(t.device() == input.device(), name, ": expected device ", input.device(),
             " like input, got ", t.device());
    DK_CHECK(t.scalar_type() == input.scalar_type(), name, ": expected type ", input.scalar_type(),
             " like input, got ", t.scalar_type());
  };
  check_like_input(weight, "weight");
  if (bias) {
    check_like_input(*bias, "bias");
    DK_CHECK(bias->dim() == 1 && bias->size(0) == p.out_channels, "bias: expected [",
             p.out_channels, "], got ", bias->sizes());
  }
  const std::vector<int64_t> offset_sizes{p.batch, 2 * p.taps(), p.out_h, p.out_w};
  const std::vector<int64_t> modulated_sizes{p.batch, 3 * p.taps(), p.out_h, p.out_w};
  auto check_offset = [&](const std::optional<Tensor>& offset, const char* name, bool factors) {
    if (!offset) return;
    DK_CHECK(offset->sizes().equals(offset_sizes) ||
                 (factors && offset->sizes().equals(modulated_sizes)),
             name, ": expected ", IntArrayRef(offset_sizes),
             factors ? " or, modulated, " : ", not ", IntArrayRef(modulated_sizes), ", got ",
             offset->sizes());
    DK_CHECK(offset->device() == input.device(), name, ": expected device ", input.device(),
             " like input, got ", offset->device());
    DK_CHECK(is_floating_point(*offset), name, ": expected a floating point type, got ",
             offset->scalar_type());
  };
  check_offset(kernel_offset, "kernel_offset", !data_offset);
  check_offset(data_offset, "data_offset", true);
  return p;
}

// The same for backward.
inline ConvParams checked_backward_params(const Tensor& grad_output, const Tensor& input,
                                          const Tensor& weight,
                                          const std::optional<Tensor>& kernel_offset,
                                          const std::optional<Tensor>& data_offset,
                                          IntArrayRef kernel_size, IntArrayRef stride,
                                          IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                          bool clip, const std::vector<bool>& output_mask) {
  const ConvParams p = checked_params(input, weight, std::nullopt, kernel_offset, data_offset,
                                      kernel_size, stride, padding, dilation, groups, clip);
  DK_CHECK(output_mask.size() == 4, "output_mask: expected 4 values, got ", output_mask.size());
  DK_CHECK((kernel_offset || !output_mask[2]) && (data_offset || !output_mask[3]),
           "output_mask: expected no gradient of an absent offset");
  DK_CHECK(grad_output.scalar_type() == input.scalar_type() &&
               grad_output.device() == input.device() &&
               grad_output.sizes().equals({p.batch, p.out_channels, p.out_h, p.out_w}),
           "grad_output: expected the output's type and size, on its device, got ",
           grad_output.scalar_type(), " ", grad_output.device(), " ", grad_output.sizes());
  return p;
}

// The output where all that a tap can read is padding.
inline void fill_with_bias(Tensor& output, const std::optional<Tensor>& bias) {
  if (bias) {
    stable::copy_(output, stable::view(*bias, {-1, 1, 1}));
  } else {
    stable::zero_(output);
  }
}

// Of input, weight, kernel_offset and data_offset; empty where there is none.
using Gradients = std::array<std::optional<Tensor>, 4>;

inline Gradients zero_gradients(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& kernel_offset,
                                const std::optional<Tensor>& data_offset) {
  // The weight's is contiguous, as everywhere, whatever the strides of the weight.
  Gradients gradients{zeros_like(input), stable::new_zeros(weight, weight.sizes())};
  if (kernel_offset) gradients[2] = zeros_like(*kernel_offset);
  if (data_offset) gradients[3] = zeros_like(*data_offset);
  return gradients;
}

inline std::vector<Tensor> needed_gradients(const Gradients& gradients,
                                            const std::vector<bool>& output_mask) {
  std::vector<Tensor> needed;
  for (int i = 0; i < 4; ++i) {
    if (output_mask[i]) needed.push_back(*gradients[i]);
  }
  return needed;
}

}  // namespace dk

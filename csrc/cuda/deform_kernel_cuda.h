// The operators on CUDA; schemas in deform_kernel.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

namespace dk {

at::Tensor deform_kernel_conv2d_cuda(const at::Tensor& input, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias,
                                     const std::optional<at::Tensor>& kernel_offset,
                                     const std::optional<at::Tensor>& data_offset,
                                     at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation,
                                     int64_t groups, bool clip);

std::vector<at::Tensor> deform_kernel_conv2d_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const std::optional<at::Tensor>& kernel_offset, const std::optional<at::Tensor>& data_offset,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool clip, std::array<bool, 4> output_mask);

}  // namespace dk

// The operators on CUDA; schemas in deform_kernel.cpp.
#pragma once

#include <optional>
#include <vector>

#include "../stable.h"

namespace dk {

Tensor deform_kernel_conv2d_cuda(const Tensor& input, const Tensor& weight,
                                 const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& kernel_offset,
                                 const std::optional<Tensor>& data_offset, IntArrayRef kernel_size,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                 int64_t groups, bool clip);

std::vector<Tensor> deform_kernel_conv2d_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& kernel_offset, const std::optional<Tensor>& data_offset,
    IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t groups, bool clip, const std::vector<bool>& output_mask, bool deterministic);

}  // namespace dk

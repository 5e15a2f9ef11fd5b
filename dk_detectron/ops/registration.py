"""What torch must know of the operators beside their kernels: fake kernels and derivatives."""

from __future__ import annotations

import torch

from . import library  # noqa: F401  (registers the operators)
from .arguments import check, output_format, output_size
from .sampling import scope_coefficients

_library = torch.library.Library("dk_detectron", "FRAGMENT")
_library.define(
    "sample_kernel(Tensor weight, Tensor kernel_offset, SymInt[2] kernel_size, *, bool clip=True) "
    "-> Tensor"
)


@torch.library.impl(_library, "sample_kernel", "CompositeImplicitAutograd")
def _(weight, kernel_offset, kernel_size, *, clip=True):
    coefficients = scope_coefficients(kernel_offset, weight.shape[2:], kernel_size, clip)
    kernels = weight.flatten(0, 1).flatten(1) @ coefficients.to(weight.dtype).transpose(1, 2)
    return kernels.unflatten(2, list(kernel_size)).unflatten(1, weight.shape[:2])


@torch.library.register_fake("dk_detectron::deform_kernel_conv2d")
def _(input, weight, bias, kernel_offset, data_offset, *, groups, clip, **sizes):
    check(input, weight, bias, kernel_offset, data_offset, groups=groups, **sizes)
    shape = [input.shape[0], weight.shape[0], *output_size(input, **sizes)]
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=output_format(input)
    )


@torch.library.register_fake("dk_detectron::deform_kernel_conv2d_backward")
def _(grad_output, input, weight, kernel_offset, data_offset, *, output_mask, **_):
    gradients = (
        torch.empty(
            input.shape, dtype=input.dtype, device=input.device, memory_format=output_format(input)
        ),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        None if kernel_offset is None else torch.empty_like(kernel_offset),
        None if data_offset is None else torch.empty_like(data_offset),
    )
    return [g for g, needed in zip(gradients, output_mask, strict=True) if needed]


def _save_for_backward(ctx, inputs, keyword_only_inputs, output):
    input, weight, _, kernel_offset, data_offset = inputs
    ctx.save_for_backward(input, weight, kernel_offset, data_offset)
    ctx.arguments = keyword_only_inputs


def _backward(ctx, grad_output):
    need_input, need_weight, need_bias, *need_offsets = ctx.needs_input_grad[:5]
    output_mask = [need_input, need_weight, *need_offsets]
    gradients = [None] * 4
    if any(output_mask):
        needed = torch.ops.dk_detectron.deform_kernel_conv2d_backward(
            grad_output, *ctx.saved_tensors, output_mask=output_mask, **ctx.arguments
        )
        gradients = [needed.pop(0) if mask else None for mask in output_mask]
    grad_bias = grad_output.sum((0, 2, 3)) if need_bias else None
    return gradients[0], gradients[1], grad_bias, gradients[2], gradients[3]


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "deform_kernel_conv2d: the compiled operator has no second derivative; "
        "dk_detectron.ops.composed_deform_kernel_conv2d has"
    )


torch.library.register_autograd(
    "dk_detectron::deform_kernel_conv2d", _backward, setup_context=_save_for_backward
)
torch.library.register_autograd(
    "dk_detectron::deform_kernel_conv2d_backward", _refuse_double_backward
)

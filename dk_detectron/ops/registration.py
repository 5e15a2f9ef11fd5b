"""What torch must know of the operators beside their kernels: fake kernels and derivatives."""

from __future__ import annotations

import torch

from . import library  # noqa: F401  (registers the operators)
from .arguments import autocast, check, output_format, output_size
from .composed import composed_sample_kernel
from .derivatives import gradients, run_backward, second_gradients

_library = torch.library.Library("dk_detectron", "FRAGMENT")
_library.define(
    "sample_kernel(Tensor weight, Tensor kernel_offset, SymInt[2] kernel_size, *, bool clip=True) "
    "-> Tensor"
)


@torch.library.impl(_library, "sample_kernel", "CompositeImplicitAutograd")
def _(weight, kernel_offset, kernel_size, *, clip=True):
    return composed_sample_kernel(weight, kernel_offset, kernel_size, clip=clip)


def _register_autocast(device: str) -> None:
    """Activations and weights take the lower precision type; offsets keep theirs, since a location
    needs more bits than bfloat16 has."""

    @torch.library.impl(_library, "deform_kernel_conv2d", f"Autocast{device.upper()}")
    def _(input, weight, bias, kernel_offset, data_offset, **arguments):
        input, weight, bias = autocast(input, weight, bias)
        with torch.autocast(device, enabled=False):
            return torch.ops.dk_detectron.deform_kernel_conv2d(
                input, weight, bias, kernel_offset, data_offset, **arguments
            )


_register_autocast("cpu")
_register_autocast("cuda")


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
    return tuple(gradients(ctx, grad_output, run_backward))


def _save_for_second_backward(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.arguments = dict(keyword_only_inputs)
    ctx.output_mask = ctx.arguments.pop("output_mask")
    del ctx.arguments["deterministic"]


def _second_backward(ctx, cotangents):
    found = second_gradients(ctx.saved_tensors, ctx.output_mask, ctx.arguments, cotangents)
    return tuple(found)


torch.library.register_autograd(
    "dk_detectron::deform_kernel_conv2d", _backward, setup_context=_save_for_backward
)
torch.library.register_autograd(
    "dk_detectron::deform_kernel_conv2d_backward",
    _second_backward,
    setup_context=_save_for_second_backward,
)

"""Derivatives of every kind: the first ones by the compiled kernels, all others composed.

``loss.backward()`` and ``torch.func.grad`` run the compiled backward kernels; second and higher
derivatives differentiate the composed function; forward mode (``torch.func.jvp``, dual numbers)
runs it. ``torch.func.vmap`` folds its dimension into the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .composed import composed_deform_kernel_conv2d

Tensors = Sequence[Tensor | None]


def run_backward(*inputs) -> list[Tensor]:
    """The compiled backward operator, of what :class:`Backward` takes."""
    *tensors, output_mask, arguments = inputs
    return torch.ops.dk_detectron.deform_kernel_conv2d_backward(
        *tensors,
        output_mask=output_mask,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **arguments,
    )


def gradients(ctx, grad_output: Tensor, backward) -> list[Tensor | None]:
    """Of input, weight, bias, kernel_offset, data_offset, where they are needed."""
    need_input, need_weight, need_bias, *need_offsets = ctx.needs_input_grad[:5]
    output_mask = [need_input, need_weight, *need_offsets]
    found: list[Tensor | None] = [None] * 4
    if any(output_mask):
        needed = list(backward(grad_output, *ctx.saved_tensors, output_mask, ctx.arguments))
        found = [needed.pop(0) if mask else None for mask in output_mask]
    grad_bias = grad_output.sum((0, 2, 3)) if need_bias else None
    return [found[0], found[1], grad_bias, found[2], found[3]]


def second_gradients(
    saved: Tensors, output_mask: Sequence[bool], arguments: dict, cotangents: Tensors
) -> list[Tensor | None]:
    """The derivative of the backward operator, by that of the composed function.

    Args:
        saved: grad_output, input, weight, kernel_offset, data_offset.
        cotangents: of the gradients that ``output_mask`` asks for.

    Returns:
        Of ``saved``, in its order.
    """
    wanted = [tensor for tensor, mask in zip(saved[1:], output_mask, strict=True) if mask]
    full = tuple(
        torch.zeros_like(like) if given is None and like is not None else given
        for given, like in zip(cotangents, wanted, strict=True)
    )
    places = [i for i, tensor in enumerate(saved) if tensor is not None]

    def convolve(*tensors: Tensor) -> Tensor:
        input, weight, *offsets = _in_places(places[1:], tensors, 1)
        return composed_deform_kernel_conv2d(input, weight, None, *offsets, **arguments)

    def first(grad_output: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        pull_back = torch.func.vjp(convolve, *tensors)[1]
        found = _in_places(places[1:], pull_back(grad_output), 1)
        return tuple(g for g, mask in zip(found, output_mask, strict=True) if mask)

    pull_back = torch.func.vjp(first, *(saved[i] for i in places))[1]
    return _in_places(places, pull_back(full), 0)


def _in_places(places: Sequence[int], tensors: Sequence[Tensor], first: int) -> list:
    """A list with ``tensors`` at ``places``, counted from ``first``, and None elsewhere."""
    full: list[Tensor | None] = [None] * (5 - first)
    for place, tensor in zip(places, tensors, strict=True):
        full[place - first] = tensor
    return full


# ---- torch.func, which cannot see through operators with a registered derivative
# ------------------------------------------------------------------------------------------


def _fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The dimension ``dim`` of vmap, made if there is none, into the batch."""
    if tensor is None:
        return None
    batched = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.flatten(0, 1)


def _each(tensors: Tensors, in_dims: Sequence[int | None], size: int) -> list[Tensors]:
    """The arguments of every item of vmap's dimension."""
    return [
        [
            tensor if tensor is None or dim is None else tensor.select(dim, i)
            for tensor, dim in zip(tensors, in_dims, strict=True)
        ]
        for i in range(size)
    ]


class Forward(torch.autograd.Function):
    """The compiled operator: (input, weight, bias, kernel_offset, data_offset, arguments)."""

    @staticmethod
    def forward(*inputs):
        *tensors, arguments = inputs
        return torch.ops.dk_detectron.deform_kernel_conv2d(*tensors, **arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, kernel_offset, data_offset, ctx.arguments = inputs
        ctx.save_for_backward(input, weight, kernel_offset, data_offset)

    @staticmethod
    def backward(ctx, grad_output):
        return *gradients(ctx, grad_output, Backward.apply), None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, arguments = inputs
        dims, size = in_dims[:5], info.batch_size
        if dims[1] is not None or dims[2] is not None:  # a weight or bias for each
            each = [Forward.apply(*item, arguments) for item in _each(tensors, dims, size)]
            return torch.stack(each), 0
        folded = [
            tensor if i in (1, 2) else _fold(tensor, dim, size)
            for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True))
        ]
        return Forward.apply(*folded, arguments).unflatten(0, (size, -1)), 0


class Backward(torch.autograd.Function):
    """The compiled backward operator: (grad_output, input, weight, offsets, mask, arguments)."""

    @staticmethod
    def forward(*inputs):
        return tuple(run_backward(*inputs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.output_mask, ctx.arguments = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        found = second_gradients(ctx.saved_tensors, ctx.output_mask, ctx.arguments, cotangents)
        return *found, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, output_mask, arguments = inputs
        dims, size = in_dims[:5], info.batch_size
        if output_mask[1] or dims[2] is not None:  # the gradient of the weight sums over a batch
            each = [
                Backward.apply(*item, output_mask, arguments) for item in _each(tensors, dims, size)
            ]
            found = tuple(map(torch.stack, zip(*each, strict=True)))
        else:
            folded = [
                tensor if i == 2 else _fold(tensor, dim, size)
                for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True))
            ]
            found = tuple(
                gradient.unflatten(0, (size, -1))
                for gradient in Backward.apply(*folded, output_mask, arguments)
            )
        return found, (0,) * len(found)


def in_forward_mode() -> bool:
    """Whether derivatives are carried along with the values."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0

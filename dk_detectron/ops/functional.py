"""The public operators.

Shapes, used throughout:

    N, C_in, C_out   batch size, input and output channels
    H, W             input size;  H_out, W_out: output size
    K_h, K_w         kernel size: the taps of one output location, K = K_h * K_w of them, row-major
    S_h, S_w         scope size: the cells of the stored weight that the taps sample, S = S_h * S_w
    kernel_offset    [N, 2*K, H_out, W_out], channel 2t: row, 2t+1: column of tap t, in scope cells
    data_offset      [N, 2*K, H_out, W_out], the same layout, in input pixels
    G                groups of input channels with offsets of their own
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    Size,
    autocast,
    check,
    check_floating,
    check_groups,
    check_images,
    check_outputs,
    checked_output_size,
    in_format_of,
    in_transform,
    output_format,
    pair,
    shape,
)
from .composed import (
    composed_deform_kernel_conv2d,
    composed_per_image_conv2d,
    composed_sample_kernel,
)
from .derivatives import Forward, in_forward_mode
from .dispatch import for_onnx, warn_composed, why_composed
from .sampling import rest_kernel


def deform_kernel_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel_offset: Tensor | None = None,
    data_offset: Tensor | None = None,
    *,
    kernel_size: Size,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    offset_groups: int = 1,
    clip: bool = True,
) -> Tensor:
    """Convolution whose kernel, data, or both are sampled at learnt offsets (eq. 7, 9 and 11).

        O[n,co,p] = b[co] + sum_t sum_ci I[n, ci, p*stride - pad + k_t*dilation +
        data_offset[n,t,p]]
                                       * W[co,ci](clip(k0 + k_t + kernel_offset[n,t,p]))

    W(.) is bilinear interpolation in the scope (eq. 12) and k0 = (scope_size - kernel_size) / 2
    centres the unit-spaced taps in it. Without ``kernel_offset`` the taps rest there; without
    ``data_offset`` they read the rigid grid; without both this is an ordinary convolution.
    Offsets may come with factors of the taps, by which the summands are multiplied (the modulation
    of DCNv2, Zhu et al. 2019).

    The image is zero outside, as in ``torchvision.ops.deform_conv2d``. An infinite offset reads the
    clipped edge of the scope, or zero; a NaN makes its output locations NaN; neither reads out of
    bounds. (An infinite or NaN pixel in the first row or column also shows where a data offset
    leads outside: it is multiplied by zero.) ``channels_last`` in, ``channels_last`` out.

    Args:
        input: [N, C_in, H, W].
        weight: [C_out, C_in / groups, S_h, S_w], the scope.
        bias: [C_out].
        kernel_offset: [N, 2*K, H_out, W_out], in scope cells; or, without data_offset, 3*K: factors
            of the K taps behind their offsets.
        data_offset: [N, 2*K, H_out, W_out], in input pixels; or 3*K, likewise.
        kernel_size: (K_h, K_w), or one number for both; likewise the next three.
        groups: any divisor of both channel numbers. Depthwise (groups = C_in = C_out) runs in one
            direct kernel; the others go through a matrix product with S columns instead of K, by
            tiles of pixels: beyond the results, a CPU needs, whatever the image, about 3 MiB a
            thread and the weight once more, and backward 16 MiB each for the gradients of what taps
            read and for parts of the weight's. There, a pixel that is infinite or NaN makes NaN.
        offset_groups: G, a divisor of the input channels: each of G parts of neighbouring channels
            has offsets (and factors) of its own, which are [N, G*2*K, ...] then, or [N, G*3*K,
            ...]. The operator runs once for each, on a copy of its channels. Beyond 1 it must
            divide ``groups``, or these be 1; then the parts are added up in the input's type.
        clip: keep the sampling location inside [0, S - 1]. A tap that its offset takes outside
            reads the edge. Its offset's gradient, summed over the channels, is what it would be on
            the edge where descent leads back inside, and zero where it leads further out. (The true
            derivative, zero outside, would leave the tap there for ever.) If off, cells outside the
            scope count as zero.

    Returns:
        [N, C_out, H_out, W_out].

    Raises:
        ValueError: a size or shape is wrong.
        TypeError: tensors of different types.
        RuntimeError: tensors on different devices.
    """
    sizes = {
        "kernel_size": pair("kernel_size", kernel_size, 1),
        "stride": pair("stride", stride, 1),
        "padding": pair("padding", padding, 0),
        "dilation": pair("dilation", dilation, 1),
    }
    if offset_groups != 1:
        offsets = {"kernel_offset": kernel_offset, "data_offset": data_offset}
        check(input, weight, bias, None, None, groups=groups, **sizes)
        settings: dict[str, Any] = {"groups": groups, "clip": clip, **sizes}
        return _by_offset_groups(input, weight, bias, offsets, offset_groups, settings)
    check(input, weight, bias, kernel_offset, data_offset, groups=groups, **sizes)
    if kernel_offset is None:
        weight = rest_kernel(weight, sizes["kernel_size"], clip)
        if data_offset is None:
            del sizes["kernel_size"]
            output = F.conv2d(input, weight, bias, groups=groups, **sizes)
            if output_format(input) != torch.channels_last or in_transform():  # vmap cannot tell
                return output
            # In double precision on CUDA it is not.
            return output.contiguous(memory_format=torch.channels_last)
    arguments: dict[str, Any] = {"groups": groups, "clip": clip, **sizes}
    tensors: list[Any] = [input, weight, bias, kernel_offset, data_offset]
    if reason := why_composed(input):
        warn_composed(reason)
    if reason or in_forward_mode() or for_onnx():
        return composed_deform_kernel_conv2d(*tensors, **arguments)
    if in_transform():
        tensors[:3] = autocast(*tensors[:3])  # or it saves what the kernels do not see
        return Forward.apply(*tensors, arguments)
    return torch.ops.dk_detectron.deform_kernel_conv2d(*tensors, **arguments)


def _by_offset_groups(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: dict[str, Tensor | None],
    offset_groups: int,
    arguments: dict,
) -> Tensor:
    """The convolution of each group of channels that has offsets of its own, side by side."""
    groups = arguments["groups"]
    check_groups(offset_groups, input.shape[1], "input channels", "offset_groups")
    if groups != 1 and groups % offset_groups:
        raise ValueError(
            f"offset_groups: expected a divisor of the {groups} groups, got {offset_groups}"
        )
    for name, offset in offsets.items():
        if offset is not None and (offset.dim() != 4 or offset.shape[1] % offset_groups):
            raise ValueError(
                f"{name}: expected [N, G*2*K_h*K_w, H_out, W_out], or G*3*K_h*K_w with factors, "
                f"for {offset_groups} groups G, got {shape(offset)}"
            )

    def parts(tensor: Tensor | None, dim: int) -> list[Any]:
        return [None] * offset_groups if tensor is None else [*tensor.chunk(offset_groups, dim)]

    dense = groups == 1  # every output channel sees all groups of input channels: a sum
    biases = [bias, *[None] * (offset_groups - 1)] if dense else parts(bias, 0)
    tensors = parts(input, 1), parts(weight, int(dense)), biases
    arguments["groups"] = 1 if dense else groups // offset_groups
    outputs = [
        deform_kernel_conv2d(*part, **arguments)
        for part in zip(*tensors, *(parts(offset, 1) for offset in offsets.values()), strict=True)
    ]
    output = sum(outputs[1:], outputs[0]) if dense else torch.cat(outputs, 1)
    return in_format_of(input, output)


def sample_kernel(
    weight: Tensor, kernel_offset: Tensor, kernel_size: Size, *, clip: bool = True
) -> Tensor:
    """Samples one K_h x K_w kernel per image from a scope (eq. 12): the global deformable kernel.

    Args:
        weight: [C_out, C_in / groups, S_h, S_w], the scope.
        kernel_offset: [N, 2*K], channel 2t: row, 2t+1: column of tap t, in scope cells.
        kernel_size: (K_h, K_w), or one number for both.
        clip: as in :func:`deform_kernel_conv2d`.

    Returns:
        [N, C_out, C_in / groups, K_h, K_w].

    Raises:
        ValueError: a shape is wrong.
        TypeError: a tensor of integers.
    """
    size = pair("kernel_size", kernel_size, 1)
    check_floating(weight=weight, kernel_offset=kernel_offset)
    if weight.dim() != 4 or 0 in weight.shape[2:]:
        raise ValueError(f"weight: expected [C_out, C_in/groups, S_h, S_w], got {shape(weight)}")
    channels = 2 * size[0] * size[1]
    if kernel_offset.dim() != 2 or kernel_offset.shape[1] != channels:
        raise ValueError(
            f"kernel_offset: expected [N, {channels}] for kernel_size {size}, "
            f"got {shape(kernel_offset)}"
        )
    # torch.func sees through Python, not through an operator of it.
    operator = torch.ops.dk_detectron.sample_kernel
    function = composed_sample_kernel if in_transform() or for_onnx() else operator
    return function(weight, kernel_offset, size, clip=clip)


def per_image_conv2d(
    input: Tensor,
    kernels: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` with a kernel of its own for every image.

    Args:
        input: [N, C_in, H, W].
        kernels: [N, C_out, C_in / groups, K_h, K_w].
        bias: [C_out].

    Returns:
        [N, C_out, H_out, W_out].

    Raises:
        ValueError: a size or shape is wrong.
        TypeError: a tensor of integers.
    """
    check_floating(input=input, kernels=kernels)
    stride, padding = pair("stride", stride, 1), pair("padding", padding, 0)
    dilation = pair("dilation", dilation, 1)
    check_images(input)
    check_groups(groups, input.shape[1])
    expected = [input.shape[0], input.shape[1] // groups]
    if kernels.dim() != 5 or [kernels.shape[0], kernels.shape[2]] != expected:
        raise ValueError(
            f"kernels: expected [{expected[0]}, C_out, {expected[1]}, K_h, K_w], one kernel an "
            f"image, got {shape(kernels)}"
        )
    check_outputs("kernels", kernels.shape[1], groups, bias)
    checked_output_size(input, kernels.shape[3:], stride, padding, dilation)
    kernels = kernels.to(input.dtype)
    if list(kernels.shape[3:]) == [1, 1] and groups == 1 and padding == (0, 0):
        # A batch of matrix products, without any copy in either memory format.
        x = input[:, :, :: stride[0], :: stride[1]]
        matrices = kernels.flatten(2)
        if output_format(input) == torch.channels_last:
            output = (x.flatten(2).transpose(1, 2) @ matrices.transpose(1, 2)).transpose(1, 2)
        else:
            output = matrices @ x.flatten(2)
        output = output.reshape(*output.shape[:2], *x.shape[2:])
        return output if bias is None else output + bias.to(output.dtype).view(-1, 1, 1)
    n = input.shape[0]
    if torch.compiler.is_compiling() or for_onnx():
        output = composed_per_image_conv2d(input, kernels, stride, padding, dilation, groups)
    elif n == 0:
        # A sum of no kernels, through which gradients of zeros reach what would have made them.
        output = F.conv2d(input, kernels.sum(0), None, stride, padding, dilation, groups)
    else:
        output = F.conv2d(
            input.reshape(1, -1, *input.shape[2:]), kernels.flatten(0, 1), None,
            stride, padding, dilation, n * groups,
        )  # fmt: skip
        output = output.unflatten(1, (n, -1)).squeeze(0)
    if bias is not None:
        output = output + bias.to(output.dtype).view(-1, 1, 1)
    return in_format_of(input, output)

"""The operator out of PyTorch's own, for every grouping, device and order of derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import in_format_of, output_size
from .sampling import (
    at_least_float,
    locate,
    rest_kernel,
    scope_coefficients,
    split_factors,
    split_offset,
    tap_grid,
)


def _deformed_columns(
    input: Tensor, data_offset: Tensor, kernel_size, stride, padding, dilation
) -> Tensor:
    """The data of every tap (eq. 9), [N, C_in, K, H_out*W_out]; the image is zero outside."""
    channels, *size = input.shape[1:]
    data_offset, factors = split_factors(
        at_least_float(data_offset), kernel_size[0] * kernel_size[1]
    )
    offsets = split_offset(data_offset)
    located = []
    for axis, tap in enumerate(tap_grid(kernel_size, offsets[0])):
        pixel = torch.arange(data_offset.shape[2 + axis], dtype=tap.dtype, device=tap.device)
        rest = pixel.view([1, -1, 1] if axis == 0 else [1, 1, -1]) * stride[axis] - padding[axis]
        located.append(locate(rest + tap * dilation[axis] + offsets[axis], size[axis]))
    (row, share_row), (column, share_column) = located
    columns = torch.zeros((), dtype=input.dtype, device=input.device)
    for i, coef_row in enumerate((1 - share_row, share_row)):
        for j, coef_column in enumerate((1 - share_column, share_column)):
            y, x = row + i, column + j
            inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
            coef = torch.where(inside, coef_row * coef_column, 0 * (share_row + share_column))
            index = torch.where(inside, y * size[1] + x, 0).long().flatten(1).unsqueeze(1)
            value = input.flatten(2).gather(2, index.expand(-1, channels, -1))
            columns = columns + value * coef.flatten(1).unsqueeze(1).to(value.dtype)
    columns = columns.unflatten(2, (kernel_size[0] * kernel_size[1], -1))
    if factors is not None:
        columns = columns * factors.flatten(2).unsqueeze(1).to(columns.dtype)
    return columns


def composed_deform_kernel_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_offset: Tensor | None,
    data_offset: Tensor | None,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    clip: bool,
) -> Tensor:
    """:func:`deform_kernel_conv2d` out of PyTorch's own operators, for every grouping and device.

    The sum is regrouped so that the output channels meet the scope in an ordinary matrix product:

        G[n,ci,l,p] = sum_t B[n,t,l,p] * I[n, ci, p + k_t (+ data_offset)]
        O[n,co,p]   = sum_ci sum_l W[co,ci,l] * G[n,ci,l,p]

    Differentiable any number of times. Needs memory for G, S times the input.
    """
    if kernel_offset is None:
        weight = rest_kernel(weight, kernel_size, clip)
    if data_offset is None:
        columns = F.unfold(input, kernel_size, dilation, padding, stride)
        columns = columns.unflatten(1, (input.shape[1], -1))
    else:
        columns = _deformed_columns(input, data_offset, kernel_size, stride, padding, dilation)
    if kernel_offset is not None:
        kernel_offset, factors = split_factors(kernel_offset, kernel_size[0] * kernel_size[1])
        coefficients = scope_coefficients(kernel_offset, weight.shape[2:], kernel_size, clip)
        if factors is not None:
            coefficients = coefficients * factors.unsqueeze(-1)
        coefficients = coefficients.flatten(2, 3).to(columns.dtype)
        columns = torch.einsum("nckp,nkps->ncsp", columns, coefficients)
    grouped = columns.unflatten(1, (groups, -1)).flatten(2, 3)  # [N, groups, C_in/groups*S, p]
    rows = weight.unflatten(0, (groups, -1)).flatten(2)  # [groups, C_out/groups, C_in/groups*S]
    output = (rows @ grouped).flatten(1, 2)
    if bias is not None:
        output = output + bias.to(output.dtype).unsqueeze(-1)
    out_size = output_size(input, kernel_size, stride, padding, dilation)
    output = output.reshape(*output.shape[:2], *out_size)  # not unflatten, which ONNX fixes
    return in_format_of(input, output)


def composed_sample_kernel(
    weight: Tensor, kernel_offset: Tensor, kernel_size: Sequence[int], *, clip: bool = True
) -> Tensor:
    """:func:`sample_kernel`, which has no other implementation."""
    coefficients = scope_coefficients(kernel_offset, weight.shape[2:], kernel_size, clip)
    kernels = weight.flatten(0, 1).flatten(1) @ coefficients.to(weight.dtype).transpose(1, 2)
    return kernels.unflatten(2, list(kernel_size)).unflatten(1, weight.shape[:2])


def composed_per_image_conv2d(
    input: Tensor,
    kernels: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """:func:`per_image_conv2d` without bias, tap by tap.

    For torch.compile, which makes one loop of it, and dies on a number of groups that it does not
    know, as N * groups is; and for ONNX, which has to know it as well.
    """
    size = output_size(input, kernels.shape[3:], stride, padding, dilation)
    padded = F.pad(input, [padding[1], padding[1], padding[0], padding[0]])
    depthwise = kernels.shape[1] == groups and kernels.shape[2] == 1
    output = torch.zeros((), dtype=input.dtype, device=input.device)
    for i in range(kernels.shape[3]):
        for j in range(kernels.shape[4]):
            top, left = i * dilation[0], j * dilation[1]
            seen = padded[
                :, :,
                top : top + (size[0] - 1) * stride[0] + 1 : stride[0],
                left : left + (size[1] - 1) * stride[1] + 1 : stride[1],
            ]  # fmt: skip
            if depthwise:
                output = output + seen * kernels[:, :, :, i, j].unsqueeze(-1)
            else:
                rows = kernels[..., i, j].unflatten(1, (groups, -1))  # [N, g, C_out/g, C_in/g]
                columns = seen.unflatten(1, (groups, -1)).flatten(3)  # [N, g, C_in/g, P]
                product = (rows @ columns).flatten(1, 2)
                output = output + product.reshape(*product.shape[:2], *size)
    return output

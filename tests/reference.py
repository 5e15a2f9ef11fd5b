"""The oracle: the operator's formula (eq. 7, 9, 11 and 12) written out, differentiable by autograd.

    O[n,co,p] = b[co] + sum_t sum_ci I[n, ci, p*stride - pad + k_t*dilation + data_offset[n,t,p]]
                                   * W[co,ci](clip(k0 + k_t + kernel_offset[n,t,p]))

It shares no code and no idea with dk_detectron.ops: every tap meets every pixel of the image and
every cell of the scope, most with coefficient zero. Slow, and meant for float64.

    input          [N, C_in, H, W]
    weight         [C_out, C_in / groups, S_h, S_w], the scope
    bias           [C_out]
    kernel_offset  [N, 2*K_h*K_w, H_out, W_out], channel 2t: row, 2t+1: column, in scope cells
    data_offset    [N, 2*K_h*K_w, H_out, W_out], the same layout, in input pixels
                   the last of them may have K_h*K_w channels more, by which the tap's summands are
                   multiplied
    output         [N, C_out, H_out, W_out]
"""

from itertools import product

import torch
from torch import Tensor


def _bilinear(location: Tensor, lower: Tensor, size: int) -> Tensor:
    """The coefficient of each of an axis' `size` cells, as a last dimension.

    Two cells are not zero, `lower` and the next, if they are on the axis; autograd gives their
    derivative. A NaN location makes all coefficients NaN.
    """
    cell = torch.arange(size, dtype=location.dtype, device=location.device)
    location, lower = location[..., None], lower[..., None]
    fraction = location - lower
    coefficient = torch.where(cell == lower + 1, fraction, 0.0)
    coefficient = torch.where(cell == lower, 1 - fraction, coefficient)
    return torch.where(location.isnan(), location, coefficient)


def image_coefficients(row: Tensor, column: Tensor, size) -> Tensor:
    """Locations [...] -> the coefficient of every pixel of the image, [..., H, W]."""
    rows = _bilinear(row, row.floor(), size[0])
    columns = _bilinear(column, column.floor(), size[1])
    return rows[..., :, None] * columns[..., None, :]


def scope_coefficients(row: Tensor, column: Tensor, size, clip: bool) -> Tensor:
    """Locations [...] -> the coefficient of every cell of the scope, [..., S_h, S_w]."""
    rows = _scope_axis(row, size[0], clip)
    columns = _scope_axis(column, size[1], clip)
    return rows[..., :, None] * columns[..., None, :]


class _Clipped(torch.autograd.Function):
    """The location that is read, in [0, S - 1], with a gradient that never leads further out.

    From the edge's gradient g: left of the scope min(g, 0), right of it max(g, 0).
    """

    @staticmethod
    def forward(ctx, location, last):
        ctx.left, ctx.right = location < 0, location > last
        return location.clamp(0, last)

    @staticmethod
    def backward(ctx, g):
        g = torch.where(ctx.left, g.clamp(max=0), g)
        return torch.where(ctx.right, g.clamp(min=0), g), None


def _scope_axis(location: Tensor, size: int, clip: bool) -> Tensor:
    if clip:
        location = _Clipped.apply(location, size - 1)
        if size == 1:  # constant along the axis
            location = location.detach()
    lower = location.floor()
    if size > 1:
        # The last cell has none after it: its derivative is that of the last pair.
        lower = lower.where(location != size - 1, size - 2.0)
    return _bilinear(location, lower, size)


def deform_kernel_conv2d(
    input, weight, bias, kernel_offset, data_offset, *,
    kernel_size, stride, padding, dilation, groups, clip,
):  # fmt: skip
    height, width = (
        (input.shape[2 + a] + 2 * padding[a] - dilation[a] * (kernel_size[a] - 1) - 1) // stride[a]
        + 1
        for a in range(2)
    )
    row = torch.arange(height, device=input.device)[:, None] * stride[0] - padding[0]
    column = torch.arange(width, device=input.device) * stride[1] - padding[1]
    no_offset = input.new_zeros(input.shape[0], 2 * kernel_size[0] * kernel_size[1], height, width)
    moved_data = no_offset if data_offset is None else data_offset
    moved_kernel = no_offset if kernel_offset is None else kernel_offset
    scope_size, image_size = weight.shape[2:], input.shape[2:]

    output = 0.0 if bias is None else bias[:, None, None]
    for t, (i, j) in enumerate(product(range(kernel_size[0]), range(kernel_size[1]))):
        pixels = image_coefficients(
            row + i * dilation[0] + moved_data[:, 2 * t],
            column + j * dilation[1] + moved_data[:, 2 * t + 1],
            image_size,
        )
        cells = scope_coefficients(
            (scope_size[0] - kernel_size[0]) / 2 + i + moved_kernel[:, 2 * t],
            (scope_size[1] - kernel_size[1]) / 2 + j + moved_kernel[:, 2 * t + 1],
            scope_size,
            clip,
        )
        image = torch.einsum("nirs,nyxrs->niyx", input, pixels).unflatten(1, (groups, 1, -1))
        kernel = torch.einsum("oirs,nyxrs->noiyx", weight, cells).unflatten(1, (groups, -1))
        summand = (image * kernel).sum(3).flatten(1, 2)
        for offset in moved_data, moved_kernel:
            if offset.shape[1] > no_offset.shape[1]:
                summand = summand * offset[:, no_offset.shape[1] + t, None]
        output = output + summand
    return output


def sample_kernel(weight, kernel_offset, kernel_size, *, clip=True):
    """kernel_offset [N, 2*K_h*K_w] -> [N, C_out, C_in / groups, K_h, K_w]."""
    scope_size = weight.shape[2:]
    taps = []
    for t, (i, j) in enumerate(product(range(kernel_size[0]), range(kernel_size[1]))):
        cells = scope_coefficients(
            (scope_size[0] - kernel_size[0]) / 2 + i + kernel_offset[:, 2 * t],
            (scope_size[1] - kernel_size[1]) / 2 + j + kernel_offset[:, 2 * t + 1],
            scope_size,
            clip,
        )
        taps.append(torch.einsum("oirs,nrs->noi", weight, cells))
    return torch.stack(taps, -1).unflatten(-1, tuple(kernel_size))

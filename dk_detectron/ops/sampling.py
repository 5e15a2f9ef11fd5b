"""Where taps lie in a scope, and what they read of its cells (eq. 12)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _Clip(torch.autograd.Function):
    """Clips a location to [0, size - 1]; ``inward`` of ``csrc/bilinear.h`` is its backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(location: Tensor, size: int) -> Tensor:
        return location.clamp(0, size - 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        location, ctx.size = inputs
        ctx.save_for_backward(location)
        ctx.save_for_forward(location)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (location,) = ctx.saved_tensors
        outward = (location < 0) & (grad > 0) | (location > ctx.size - 1) & (grad < 0)
        return grad.masked_fill(outward, 0), None


class _ForwardModeClip(_Clip):
    """With the true derivative in forward mode, zero outside: no descent could lead back there.

    A class of its own, since torch.compile takes none with a ``jvp``.
    """

    @staticmethod
    def jvp(ctx, tangent: Tensor, _):
        (location,) = ctx.saved_tensors
        return tangent.masked_fill((location < 0) | (location > ctx.size - 1), 0)


def _clip(location: Tensor, size: int) -> Tensor:
    kind = _Clip if torch.compiler.is_compiling() else _ForwardModeClip
    return kind.apply(location, size)


def locate(
    location: Tensor, size: int, *, scope: bool = False, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """The lower of the two cells around each location, and the share of the upper one.

    The derivative at a cell is that towards the next one; at the last cell of a scope, towards the
    one before. ``csrc/bilinear.h`` is the same for the compiled kernels.
    """
    if clip:
        location = _clip(location, size)
    else:
        # Everything further out reads the same zeros: keep infinities out of the sums.
        location = location.clamp(-2, size + 1)
    lower = location.detach().floor()
    if scope and size > 1:
        lower = lower - (location.detach() == size - 1).to(lower.dtype)
    share = location - lower
    # A scope of one cell is constant: a gradient of zero, not the absence of one.
    return lower, 0 * share if clip and size == 1 else share


def axis_coefficients(location: Tensor, size: int, clip: bool = True) -> Tensor:
    """Bilinear coefficients [..., size] of locations [...] along one axis of a scope."""
    lower, share = (t.unsqueeze(-1) for t in locate(location, size, scope=True, clip=clip))
    cell = torch.arange(size, dtype=location.dtype, device=location.device)
    zero = 0 * share  # NaN for a NaN location, so that the output shows it
    return torch.where(cell == lower, 1 - share, zero) + torch.where(cell == lower + 1, share, zero)


def at_least_float(offset: Tensor) -> Tensor:
    """Locations need more bits than half precision has."""
    return offset.float() if offset.element_size() < 4 else offset


def split_offset(offset: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 2*K, ...] -> row and column offsets, [N, K, ...] each."""
    offset = offset.unflatten(1, (-1, 2))
    return offset[:, :, 0], offset[:, :, 1]


def split_factors(offset: Tensor, taps: int) -> tuple[Tensor, Tensor | None]:
    """Offsets [N, 2*K or 3*K, ...] -> those [N, 2*K, ...], and the taps' factors [N, K, ...]."""
    if offset.shape[1] == 2 * taps:
        return offset, None
    return offset[:, : 2 * taps], offset[:, 2 * taps :]


def tap_grid(kernel_size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every tap, shaped to broadcast against ``like`` [N, K, ...].

    Of ``like`` [N, G*K, ...], the taps of each group after another.
    """
    rows, columns = torch.meshgrid(
        *(torch.arange(k, dtype=like.dtype, device=like.device) for k in kernel_size), indexing="ij"
    )
    shape = [-1] + [1] * (like.dim() - 2)
    groups = like.shape[1] // rows.numel()
    rows, columns = (taps.reshape(-1).repeat(groups).view(shape) for taps in (rows, columns))
    return rows, columns


def tap_locations(
    kernel_offset: Tensor, scope_size: Sequence[int], kernel_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Offsets [N, 2*K, ...] -> row and column of the taps in the scope, [N, K, ...] each."""
    offsets = split_offset(at_least_float(kernel_offset))
    row, column = (
        tap + (scope - kernel) / 2 + offset
        for tap, scope, kernel, offset in zip(
            tap_grid(kernel_size, offsets[0]), scope_size, kernel_size, offsets, strict=True
        )
    )
    return row, column


def outside_scope(
    kernel_offset: Tensor, scope_size: Sequence[int], kernel_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Offsets [N, 2*K, ...] -> whether the taps' row and column is clipped, [N, K, ...] each.

    Those of NaN are counted as such.
    """
    locations = tap_locations(kernel_offset, scope_size, kernel_size)
    row, column = (
        ~((location >= 0) & (location <= size - 1))
        for location, size in zip(locations, scope_size, strict=True)
    )
    return row, column


def scope_coefficients(
    kernel_offset: Tensor, scope_size: Sequence[int], kernel_size: Sequence[int], clip: bool
) -> Tensor:
    """B of eq. 12: offsets [N, 2*K, ...] -> coefficients [N, K, ..., S] of taps on cells."""
    locations = tap_locations(kernel_offset, scope_size, kernel_size)
    rows, columns = (
        axis_coefficients(location, size, clip)
        for location, size in zip(locations, scope_size, strict=True)
    )
    return (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)


def rest_kernel(weight: Tensor, kernel_size: Sequence[int], clip: bool = True) -> Tensor:
    """The kernel at zero offset: [.., .., S_h, S_w] -> [.., .., K_h, K_w]."""
    if list(weight.shape[2:]) == list(kernel_size):
        return weight
    zero = torch.zeros(1, 2 * kernel_size[0] * kernel_size[1], dtype=torch.float64)
    read = scope_coefficients(zero, weight.shape[2:], kernel_size, clip)[0].to(weight)  # [K, S]
    return (weight.flatten(2) @ read.t()).unflatten(2, list(kernel_size))

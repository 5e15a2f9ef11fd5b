"""Where the scope of a deformable kernel starts (docs/start.md)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import axis_coefficients, rest_kernel, tap_locations
from ..ops.arguments import Size, pair


def _spread_taps(scope_size: int, kernel_size: int) -> Tensor:
    """Places of the taps along an axis [K], evenly over the whole scope; a single one: its centre.

    In float64, as everything here: what comes of it is exact in the type of the weight.
    """
    centre = (scope_size - 1) / 2
    first = 0 if kernel_size > 1 else centre
    return torch.linspace(first, 2 * centre, kernel_size, dtype=torch.float64)


def spread_offset(scope_size: Sequence[int], kernel_size: Sequence[int]) -> Tensor:
    """The kernel offsets [2*K] that spread the taps evenly over the scope, in scope cells."""
    with torch.device("cpu"):  # numbers, also under torch.device("meta")
        spread = torch.meshgrid(*map(_spread_taps, scope_size, kernel_size), indexing="ij")
        zero = torch.zeros(1, 2 * prod(kernel_size), dtype=torch.float64)
        centre = tap_locations(zero, scope_size, kernel_size)
    return torch.stack(
        [s.flatten() - c[0] for s, c in zip(spread, centre, strict=True)], -1
    ).flatten()


def _smooth_inverse(scope_size: int, kernel_size: int) -> Tensor:
    """[S, K]: the cells of least squared differences along an axis that the spread taps read so."""
    read = axis_coefficients(_spread_taps(scope_size, kernel_size), scope_size)  # [K, S]
    difference = torch.eye(scope_size, dtype=torch.float64).diff(dim=0)
    # Lagrange: the gradient of |difference @ cells|^2 is a combination of the rows of `read`.
    system = torch.zeros(2 * [scope_size + kernel_size], dtype=torch.float64)
    system[:scope_size, :scope_size] = difference.t() @ difference
    system[:scope_size, scope_size:] = read.t()
    system[scope_size:, :scope_size] = read
    return torch.linalg.inv(system)[:scope_size, scope_size:]


@cache
def _cells_of_taps(scope_size: tuple[int, int], kernel_size: tuple[int, int]) -> list[list[float]]:
    """[S_h * S_w, K_h * K_w]: both axes together, of which networks ask for every layer."""
    with torch.device("cpu"):  # numbers, also for layers that are made on "meta"
        rows, columns = map(_smooth_inverse, scope_size, kernel_size)
        return torch.einsum("sk,tl->stkl", rows, columns).flatten(2).flatten(0, 1).tolist()


def lift_to_scope(weight: Tensor, scope_size: Size) -> Tensor:
    """The smoothest scope whose kernel, at :func:`spread_offset`, is exactly ``weight``.

    Args:
        weight: [C_out, C_in / groups, K_h, K_w].
        scope_size: (S_h, S_w), no smaller than the kernel.

    Returns:
        [C_out, C_in / groups, S_h, S_w].
    """
    size = pair("scope_size", scope_size, 1)
    cells = torch.tensor(
        _cells_of_taps(size, tuple(weight.shape[2:])), dtype=torch.float64, device=weight.device
    )
    # One product of large matrices, not two of small ones for each kernel.
    return (weight.double().flatten(2) @ cells.t()).unflatten(2, size).to(weight.dtype)


def embed_scope(weight: Tensor, scope_size: Size) -> tuple[Tensor, Tensor]:
    """A larger scope that reads as ``weight`` does, wherever the taps are.

    The smaller scope lies in its middle. Around it lie copies of its edge, which is what taps
    outside read. Where there is no middle cell, the taps have to move by half a cell.

    Args:
        weight: [C_out, C_in / groups, S_h, S_w].
        scope_size: of the larger one.

    Returns:
        The larger scope, and [2]: what to add to kernel offsets along rows and columns.

    Raises:
        ValueError: ``scope_size`` is smaller than the scope of ``weight``.
    """
    size = pair("scope_size", scope_size, 1)
    more = [new - old for new, old in zip(size, weight.shape[2:], strict=True)]
    if min(more) < 0:
        raise ValueError(
            f"weight: expected a scope of at most {size}, got {tuple(weight.shape[2:])}: a smaller "
            "scope cannot hold the kernels of a larger one"
        )
    (above, left), (below, right) = zip(*((m // 2, m - m // 2) for m in more), strict=True)
    scope = F.pad(weight.double(), [left, right, above, below], mode="replicate").to(weight.dtype)
    return scope, torch.tensor([above - more[0] / 2, left - more[1] / 2], device="cpu")


@cache
def centre_gain(scope_size: tuple[int, int], kernel_size: tuple[int, int]) -> float:
    """By how much taps in the centre of a lifted scope lower the deviation of independent draws."""
    taps = prod(kernel_size)
    with torch.device("cpu"):  # a number, also for layers that are made on "meta"
        units = torch.eye(taps, dtype=torch.float64).view(taps, 1, *kernel_size)
        read = rest_kernel(lift_to_scope(units, scope_size), kernel_size)
    return float(read.square().sum(0).mean()) ** -0.5


def deviation(weight: Tensor) -> Tensor:
    """The standard deviation of a rigid weight [C_out, ...].

    Of a constant it is its size; of zeros, the deviation of ``nn.Conv2d``'s weight. Perturbations
    are in proportion to it, and of none of them nothing would ever part.
    """
    own, size = weight.std(correction=0), weight.abs().max()
    drawn = torch.full_like(own, (3 * weight[0].numel()) ** -0.5)
    # Constants deviate by rounding.
    return torch.where(own > 1e-5 * size, own, torch.where(size > 0, size, drawn))

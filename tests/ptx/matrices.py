"""What warps compute together on tensor cores: mma.m16n8k16 and movmatrix.

Registers come as arrays [register, thread] of whole warps.
"""

import numpy as np

from .arithmetic import convert
from .memory import WARP

# Of the PTX ISA's names for a thread: its group, and its place in that.
_GROUPS, _PLACES = 8, 4


def _elements(registers, *split: int):
    """[*split, warp, group, place, which of two], two of 16 bits to a register of 32."""
    halves = np.ascontiguousarray(registers, "<u4").view("<u2")
    return halves.reshape(*split, -1, _GROUPS, _PLACES, 2)


def _widen(bits, half: str):
    stored = np.ascontiguousarray(bits)
    return convert(half, "f32", set())(stored.view(np.float16) if half == "f16" else stored)


def product(a, b, c, half: str):
    """c + a b as registers of float32, summed in the order of k and rounded each time.

    The hardware's order and rounding are its own.

    Args:
        half: f16 or bf16, what a and b hold.
    """
    warps = a.shape[1] // WARP
    upper_k, upper_row, warp, group, place, which = range(6)
    a = _elements(a, 2, 2).transpose(warp, upper_row, group, upper_k, place, which)
    a = _widen(a, half).reshape(warps, 16, 16)
    b = _elements(b, 2).transpose(1, 0, 3, 4, 2)  # [warp, upper k, place, which, group]
    b = _widen(b, half).reshape(warps, 16, 8)
    c = c.reshape(2, 2, warps, _GROUPS, _PLACES)  # [upper row, which column, ...]
    d = c.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
    for k in range(16):
        d = d + a[:, :, k, None] * b[:, k, None, :]
    d = d.reshape(warps, 2, _GROUPS, _PLACES, 2)
    return d.transpose(1, 4, 0, 2, 3).reshape(4, -1)


def transpose(rows):
    """Of matrices [8, 8] of 16 bits, a row to a group."""
    elements = _elements(rows).reshape(-1, 8, 8)
    return np.ascontiguousarray(elements.transpose(0, 2, 1)).view("<u4").reshape(1, -1)

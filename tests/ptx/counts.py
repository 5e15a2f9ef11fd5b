"""What accesses cost: requests, sectors of global memory, wavefronts of shared memory."""

from collections import defaultdict
from dataclasses import astuple, dataclass

import numpy as np

from .memory import WARP
from .parser import Entry


@dataclass
class Cost:
    """Of accesses to global (sectors) or shared memory (wavefronts).

    Attributes:
        threads: that made them.
        requests: of a warp each.
        pieces: sectors of 32 bytes, or wavefronts: clocks in which the 32 banks give a word each.
            8 and 16 bytes per thread are taken to be served by half and quarter warps.
        fewest: pieces that the distinct bytes of each request would fit in.
        merged: wavefronts if a whole warp were served at once: the other extreme. The truth lies in
            between; no hardware was asked. For global memory, the pieces again.
    """

    threads: int = 0
    requests: int = 0
    pieces: int = 0
    fewest: int = 0
    merged: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def _distinct(rows):
    """Sorted rows with -1 for repetitions, and how many others there are in each."""
    rows = np.sort(rows, axis=1)
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1
    return rows, (rows >= 0).sum(1)


def _wavefronts(rows, size: int):
    """Of each row of lanes' addresses (-1: idle): the most words wanted of one of the 32 banks."""
    words = rows[:, :, None] + np.arange(0, size, 4)
    words, _ = _distinct(np.where(rows[:, :, None] >= 0, words // 4, -1).reshape(len(rows), -1))
    row, column = np.nonzero(words >= 0)
    banks = np.bincount(row * 32 + words[row, column] % 32, minlength=32 * len(rows))
    return banks.reshape(-1, 32).max(1)


def cost_of(address, size: int, active, space: str) -> Cost:
    """Of one instruction; `address` of the active threads."""
    lane_address = np.full(active.shape, -1, np.int64)
    lane_address[active] = address
    rows = lane_address.reshape(-1, WARP)
    rows = rows[(rows >= 0).any(1)]
    _, elements = _distinct(rows)
    if space == "global":
        _, sectors = _distinct(np.where(rows >= 0, rows // 32, -1))
        pieces = merged = sectors.sum()
        fewest = np.ceil(elements * size / 32).sum()
    else:
        pieces = _wavefronts(rows.reshape(-1, WARP // max(1, size // 4)), size).sum()
        merged = _wavefronts(rows, size).sum()
        # Parts of one word are one word.
        words = (
            elements * size // 4 if size >= 4 else _distinct(np.where(rows < 0, -1, rows // 4))[1]
        )
        fewest = np.ceil(words / 32).sum()
    return Cost(len(address), len(rows), int(pieces), int(fewest), int(merged))


class Counts:
    """By instruction number: warps that ran it, and, by space too, the cost of its accesses."""

    def __init__(self):
        self.warps: dict[int, int] = defaultdict(int)
        self.costs: dict[tuple[int, str], Cost] = defaultdict(Cost)

    def by_line(self, entry: Entry) -> dict[tuple[str, str], Cost]:
        """Costs by opcode and source line (``Instruction.where``).

        A copy from space to space has two: ``cp.global`` and ``cp.shared``.
        """
        lines: dict[tuple[str, str], Cost] = defaultdict(Cost)
        for (number, space), cost in self.costs.items():
            instruction = entry.code[number]
            copies = instruction.parts[0] == "cp"
            opcode = f"cp.{space}" if copies else instruction.opcode
            lines[opcode, instruction.where] += cost
        return dict(lines)

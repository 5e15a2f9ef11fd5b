"""What the kernels' PTX costs at the size of a network: counted and modelled, not measured.

PYTHONPATH=tests python -m ptx.costs    prints the tables of docs/cuda.md (make costs)

Of each launch eight blocks run, on the multiprocessors of an H100. PTX is not yet the hardware's
code: ptxas allots registers (its report is in the table), schedules, and may merge or move
instructions; caches and latencies do not show.

The model: a multiprocessor starts four instructions of a warp a clock, and moves 128 bytes a clock
between its threads and shared memory or first-level cache; the memory of the GPU moves what a
kernel must read and write at least, once, at its full bandwidth. That is the byte floor, and what
takes longest is the bound.
"""

import importlib
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from conftest import Case
from tabulate import tabulate

from .build import ROOT, kernel_sources, ptxas_report
from .counts import Cost
from .device import Device, Launch, plain_name
from .parser import Instruction

PROCESSORS, WARPS, REGISTERS, SHARED_BYTES, RESERVED = 132, 64, 65536, 228 * 1024, 1024
BYTES_PER_CLOCK = 3.35e12 / 1.755e9  # of the whole GPU's memory (SXM5)
SCHEDULERS, SECTORS_PER_CLOCK = 4, 4  # of a multiprocessor
MMA_CLOCKS = 8  # about, that an m16n8k16 keeps a scheduler's tensor core; other warps go on


@dataclass
class Row:
    """Of a launch; the clocks are what its blocks take of all multiprocessors."""

    stage: str
    dtype: torch.dtype
    launch: Launch
    costs: dict[str, Cost]  # by space
    floor: float  # clocks for the bytes
    issue: float  # clocks to start the instructions
    tensor: float  # clocks of the tensor cores
    exchange: tuple[float, float]  # clocks of shared memory and first-level cache, from, to

    @property
    def bounds(self) -> tuple[float, float]:
        """Over the byte floor, from, to."""
        others = max(self.issue, self.tensor, self.floor)
        least, most = (max(clocks, others) / self.floor for clocks in self.exchange)
        return least, most


def occupancy(registers: int, block: int, shared_bytes: int) -> float:
    """Warps that a multiprocessor of an H100 holds at once, over the most that it could."""
    warps = block // 32
    per_warp = -(-32 * registers // 256) * 256
    blocks = min(REGISTERS // per_warp // warps, SHARED_BYTES // (shared_bytes + RESERVED), 32)
    return min(blocks * warps, WARPS) / WARPS


@cache
def benchmark_ops():
    """The tool of that name."""
    sys.path.append(str(ROOT / "tools"))
    return importlib.import_module("benchmark_ops")


def stages() -> list[tuple[str, Case]]:
    """Two images of 800 x 1216 in ResNet-50-DW, as in tools/benchmark_ops.py."""
    return [
        (w.name, Case(batch=w.n, channels=w.c, size=(w.h, w.w), bias=False))
        for w in benchmark_ops().stages(2, 800, 1216)
    ]


def main_blocks(launch: Launch) -> range:
    """Eight, evenly spread over the grid, of the launches that take the time.

    Not two neighbours: blocks of backward have two or three tiles each, borders have less to do.
    """
    if launch.name.startswith(("sum_weight", "turn_inward")):
        return range(0)
    return range(launch.grid // 16, launch.grid, max(1, launch.grid // 8))[:8]


def issued(instruction: Instruction) -> int:
    """Of the hardware's instructions, for one of PTX: roughly, since only ptxas knows."""
    parts = instruction.parts
    wide = parts[-1][1:] == "64" and parts[-1][0] in "sub"
    if parts[0] in ("div", "rem"):
        return 50 if wide else 20
    if parts[0] == "mov":  # halves of a register are read where they are, put together by one
        halves = set(re.findall(r"%\w+", instruction.operands[1]))
        return "{" in instruction.operands[1] and len(halves) > 1  # one half twice: as it is
    if parts[0] == "cvt" and parts[-1][0] == "u":
        return 0
    if parts[0] in ("or", "and") and parts[-1] == "pred":  # mostly part of a comparison
        return 0
    if parts[:2] == ["mad", "wide"]:  # a product, and two additions
        return 3
    if parts[0] in ("mul", "mad") and "wide" not in parts:
        return 4 if wide else 1
    return 2 if wide and parts[0] not in ("ld", "st", "mul", "mad", "cvt") else 1


def least_bytes(case: Case, dtype: torch.dtype, backward: bool) -> int:
    """What a stage's kernel must read and write: activations and kernel offsets."""
    activations = case.batch * case.channels * math.prod(case.size) * dtype.itemsize
    offsets = case.batch * 2 * math.prod(case.kernel) * math.prod(case.output_size) * 4
    return 3 * activations + 2 * offsets if backward else 2 * activations + offsets


def modelled(device: Device, stage: str, case: Case, dtype: torch.dtype, launch: Launch) -> Row:
    """From the blocks that have run, for all."""
    share = launch.grid / len(main_blocks(launch)) / PROCESSORS
    code = device.entry(launch.name).code
    warps = launch.counts.warps
    costs = by_space(device, launch)
    shuffles, products = (
        sum(n for i, n in warps.items() if code[i].parts[0] == name) for name in ("shfl", "mma")
    )
    moved = costs["global"].pieces / SECTORS_PER_CLOCK + shuffles
    return Row(
        stage,
        dtype,
        launch,
        costs,
        floor=least_bytes(case, dtype, launch.name.startswith("backward")) / BYTES_PER_CLOCK,
        issue=share * sum(n * issued(code[i]) for i, n in warps.items()) / SCHEDULERS,
        tensor=share * products * MMA_CLOCKS / SCHEDULERS,
        exchange=(
            share * (costs["shared"].merged + moved),
            share * (costs["shared"].pieces + moved),
        ),
    )


def by_space(device: Device, launch: Launch) -> dict[str, Cost]:
    costs = {"global": Cost(), "shared": Cost()}
    for (opcode, _), cost in launch.counts.by_line(device.entry(launch.name)).items():
        costs[opcode.split(".")[1]] += cost
    return costs


def rows(device: Device) -> Iterator[Row]:
    os.environ["DK_EMULATED_PROCESSORS"] = str(PROCESSORS)
    for stage, case in stages():
        for dtype in (torch.float32, torch.bfloat16):
            tensors = case.tensors(dtype)
            tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
            shape = list(tensors["kernel_offset"].shape)
            offset = benchmark_ops().draw_offsets("trained", shape, case.kernel[0], case.scope[0])
            tensors["kernel_offset"] = offset.to(dtype)
            _, launches = device.call(tensors, case, only=main_blocks, counting=True, races=False)
            for launch in launches:
                if main_blocks(launch):
                    yield modelled(device, stage, case, dtype, launch)


def table() -> str:
    torch.manual_seed(0)
    sources = [p for p in kernel_sources() if p.stem.endswith(("_float", "_bfloat16"))]
    reports = [ptxas_report(path) for path in sources]
    ptxas = {plain_name(name): use for report in reports for name, use in report.items()}
    header = ["stage", "", "kernel", "registers", "spilled", "occupancy", "sectors", "wavefronts"]
    header += ["issue", "tensor", "exchange", "bound"]
    lines = []
    for row in rows(Device(sources)):
        launch, use = row.launch, ptxas[row.launch.name]
        sectors, waves = row.costs["global"], row.costs["shared"]
        lines.append(
            [
                row.stage,
                str(row.dtype)[6:],
                launch.name.split("_kernel")[0],
                use["registers"],
                use["spilled"],
                f"{100 * occupancy(use['registers'], launch.block, launch.shared_bytes):.3g} %",
                f"{sectors.pieces / sectors.fewest:.2f}",
                f"{waves.merged / waves.fewest:.2f}-{waves.pieces / waves.fewest:.2f}",
                f"{row.issue / row.floor:.2f}",
                f"{row.tensor / row.floor:.2f}",
                "{:.2f}-{:.2f}".format(*(clocks / row.floor for clocks in row.exchange)),
                "{:.2f}-{:.2f}".format(*row.bounds),
            ]
        )
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    from .dense_costs import dense_tables

    print(table(), dense_tables(), sep="\n\n")

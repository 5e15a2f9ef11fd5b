"""What the kernels' PTX costs at the size of a network: counted and modelled, not measured.

PYTHONPATH=tests python -m ptx.costs    prints the table of docs/cuda.md (make costs)

Of each launch a few blocks run, on the multiprocessors of an H100. PTX is not yet the hardware's
code: ptxas allots registers (its report is in the table), schedules, and may merge or move
instructions; caches and latencies do not show.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from conftest import Case
from tabulate import tabulate

from .build import ROOT, kernel_sources, ptxas_report
from .counts import Cost
from .device import Device, Launch, plain_name

PROCESSORS, WARPS, REGISTERS, SHARED_BYTES, RESERVED = 132, 64, 65536, 228 * 1024, 1024


@dataclass
class Row:
    stage: str
    dtype: torch.dtype
    launch: Launch
    costs: dict[str, Cost]  # by space


def occupancy(registers: int, block: int, shared_bytes: int) -> float:
    """Warps that a multiprocessor of an H100 holds at once, over the most that it could."""
    warps = block // 32
    per_warp = -(-32 * registers // 256) * 256
    blocks = min(REGISTERS // per_warp // warps, SHARED_BYTES // (shared_bytes + RESERVED), 32)
    return min(blocks * warps, WARPS) / WARPS


def stages() -> list[tuple[str, Case]]:
    """Two images of 800 x 1216 in ResNet-50-DW, as in tools/benchmark_ops.py."""
    sys.path.append(str(ROOT / "tools"))
    import benchmark_ops

    return [
        (w.name, Case(batch=w.n, channels=w.c, size=(w.h, w.w), bias=False))
        for w in benchmark_ops.stages(2, 800, 1216)
    ]


def main_blocks(launch: Launch) -> range:
    """Two in the middle of the grid, of the launches that take the time."""
    if launch.name.startswith(("sum_weight", "turn_inward")):
        return range(0)
    return range(launch.grid // 2, launch.grid // 2 + 2)


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
            _, launches = device.call(tensors, case, only=main_blocks, counting=True, races=False)
            for launch in launches:
                if main_blocks(launch):
                    yield Row(stage, dtype, launch, by_space(device, launch))


def table() -> str:
    torch.manual_seed(0)
    sources = [p for p in kernel_sources() if p.stem.endswith(("_float", "_bfloat16"))]
    reports = [ptxas_report(path) for path in sources]
    ptxas = {plain_name(name): use for report in reports for name, use in report.items()}
    header = ["stage", "", "kernel", "registers", "spilled", "occupancy", "sectors", "wavefronts"]
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
            ]
        )
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    print(table())

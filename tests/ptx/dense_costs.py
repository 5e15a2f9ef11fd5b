"""A model of the dense operator on CUDA, over torch's convolution of the same size: not measured.

Its kernels (columns.cuh, dense_matrix.cuh) are counted on their PTX as in costs.py; torch's matrix
products, ours and those of the rigid convolution, take their multiply-adds at an H100's peak or
their bytes at its memory's full speed, whichever is longer. Columns of more than a cache travel to
memory and back.
"""

import os
from dataclasses import dataclass

import torch
from conftest import Case
from tabulate import tabulate

from .build import kernel_sources
from .costs import BYTES_PER_CLOCK, PROCESSORS, benchmark_ops, main_blocks, modelled
from .device import Device

CLOCKS_PER_SECOND = 1.755e9
# Multiply-adds a clock: tensor cores; CUDA cores, since torch.matmul does not round to TF32.
PEAK = {
    torch.bfloat16: 989e12 / 2 / CLOCKS_PER_SECOND,
    torch.float32: 67e12 / 2 / CLOCKS_PER_SECOND,
}


@dataclass
class Dense:
    """A dense convolution of C to C channels; sizes in bytes."""

    case: Case
    dtype: torch.dtype

    def __post_init__(self):
        batch, channels, (height, width) = self.case.batch, self.case.channels, self.case.size
        pixels = batch * height * width
        self.activations = pixels * channels * self.dtype.itemsize
        self.columns = self.activations * self.case.scope[0] ** 2
        self.grad_taps = pixels * channels * self.case.kernel[0] ** 2 * 4
        self.offsets = pixels * 2 * self.case.kernel[0] ** 2 * 4
        self.weight = channels**2 * self.case.scope[0] ** 2 * self.dtype.itemsize
        self.macs = pixels * channels**2  # of a kernel of one cell

    def product(self, cells: int, moved: int) -> float:
        """Clocks."""
        return max(self.macs * cells / PEAK[self.dtype], moved / BYTES_PER_CLOCK)

    def products(self, backward: bool) -> float:
        """Torch's, of columns in memory."""
        one = self.product(self.case.scope[0] ** 2, self.columns + self.activations)
        if backward:
            return 2 * one
        return 0 if self.case.in_registers(self.dtype) else one

    def rigid(self, backward: bool) -> float:
        one = self.product(self.case.kernel[0] ** 2, 2 * self.activations)
        return 2 * one if backward else one

    def least_bytes(self, kernel: str) -> int:
        """What all launches of a kernel must move."""
        return {
            "columns": self.activations + self.offsets + self.columns,
            "columns_backward": self.columns + self.activations + 2 * self.offsets + self.grad_taps,
            "add_taps": self.grad_taps + 2 * 4 * self.activations // self.dtype.itemsize,
            "dense_matrix": 2 * self.activations + self.offsets + self.weight,
        }[kernel]


@dataclass
class Busy:
    """Of all launches of a kernel, clocks: see costs.Row."""

    issue: float = 0
    tensor: float = 0
    exchange: float = 0
    floor: float = 0

    @property
    def bound(self) -> float:
        return max(self.issue, self.tensor, self.exchange, self.floor)


def kernels(device: Device, dense: Dense) -> dict[str, Busy]:
    tensors = dense.case.tensors(dense.dtype)
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    shape = list(tensors["kernel_offset"].shape)
    offset = benchmark_ops().draw_offsets("trained", shape, 3, 4)
    tensors["kernel_offset"] = offset.to(dense.dtype)
    _, launches = device.call(tensors, dense.case, only=main_blocks, counting=True, races=False)
    busy: dict[str, Busy] = {}
    for launch in launches:
        name = launch.name.split("_kernel")[0]
        row = modelled(device, "", dense.case, dense.dtype, launch)
        all_launches = busy.setdefault(name, Busy(floor=dense.least_bytes(name) / BYTES_PER_CLOCK))
        all_launches.issue += row.issue
        all_launches.tensor += row.tensor
        all_launches.exchange += row.exchange[1]
    if "dense_matrix" not in busy:  # backward has made the columns again
        columns = busy["columns"]
        busy["columns"] = Busy(
            columns.issue / 2, columns.tensor / 2, columns.exchange / 2, columns.floor
        )
    return busy


def passes(busy: dict[str, Busy]) -> dict[bool, float]:
    """Clocks of our kernels, forward and (True) backward."""
    backward = busy.keys() - {"dense_matrix"}
    return {
        False: busy["dense_matrix" if "dense_matrix" in busy else "columns"].bound,
        True: sum(busy[name].bound for name in backward),
    }


def microseconds(clocks: float) -> str:
    return f"{clocks / CLOCKS_PER_SECOND * 1e6:.0f}"


def dense_tables() -> str:
    """Of all passes, and of the kernel that makes no columns in memory."""
    os.environ["DK_EMULATED_PROCESSORS"] = str(PROCESSORS)
    torch.manual_seed(0)
    names = ("columns_float", "columns_bfloat16", "dense_bfloat16")
    device = Device([p for p in kernel_sources() if p.stem in names])
    lines, matrix_lines = [], []
    for w in benchmark_ops().stages(1, 800, 1216):
        case = Case(
            batch=1, channels=w.c // 2, out_channels=w.c // 2, groups=1, size=(w.h, w.w), bias=False
        )
        for dtype in PEAK:
            dense = Dense(case, dtype)
            busy = kernels(device, dense)
            for backward, clocks in passes(busy).items():
                products, rigid = dense.products(backward), dense.rigid(backward)
                name = "backward" if backward else "forward"
                over = f"{(clocks + products) / rigid:.1f}"
                times = map(microseconds, (clocks, products, rigid))
                lines.append([w.name, str(dtype)[6:], name, *times, over])
            if matrix := busy.get("dense_matrix"):
                parts = [matrix.issue, matrix.tensor, matrix.exchange, matrix.floor]
                matrix_lines.append([w.name, *map(microseconds, parts)])
    header = ["stage", "", "", "kernels, µs", "torch's products, µs", "rigid, µs", "over rigid"]
    parts = ["issue", "tensor", "exchange", "bytes"]
    return "\n\n".join(
        tabulate(table, names, tablefmt="github", disable_numparse=True)
        for table, names in (
            (lines, header),
            (matrix_lines, ["stage", *(f"{part}, µs" for part in parts)]),
        )
    )

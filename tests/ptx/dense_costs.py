"""A model of the dense operator on CUDA, over torch's convolution of the same size: not measured.

Its kernels (columns.cuh) are counted on their PTX as in costs.py; matrix products, ours and those
of the rigid convolution, take their multiply-adds at an H100's peak or their bytes at its memory's
full speed, whichever is longer. Columns of more than a cache travel to memory and back.
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
        self.macs = pixels * channels**2  # of a kernel of one cell

    def product(self, cells: int, moved: int) -> float:
        """Clocks."""
        return max(self.macs * cells / PEAK[self.dtype], moved / BYTES_PER_CLOCK)

    def products(self, backward: bool) -> float:
        one = self.product(self.case.scope[0] ** 2, self.columns + self.activations)
        return 2 * one if backward else one

    def rigid(self, backward: bool) -> float:
        one = self.product(self.case.kernel[0] ** 2, 2 * self.activations)
        return 2 * one if backward else one

    def least_bytes(self, kernel: str) -> int:
        """What all launches of a kernel must move."""
        return {
            "columns": self.activations + self.offsets + self.columns,
            "columns_backward": self.columns + self.activations + 2 * self.offsets + self.grad_taps,
            "add_taps": self.grad_taps + 2 * 4 * self.activations // self.dtype.itemsize,
        }[kernel]


def kernels(device: Device, dense: Dense) -> dict[bool, float]:
    """Clocks of the columns and of their gradients, forward and (True) backward."""
    tensors = dense.case.tensors(dense.dtype)
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    shape = list(tensors["kernel_offset"].shape)
    offset = benchmark_ops().draw_offsets("trained", shape, 3, 4)
    tensors["kernel_offset"] = offset.to(dense.dtype)
    _, launches = device.call(tensors, dense.case, only=main_blocks, counting=True, races=False)
    busy: dict[str, float] = {}
    for launch in launches:
        name = launch.name.split("_kernel")[0]
        row = modelled(device, "", dense.case, dense.dtype, launch)
        busy[name] = busy.get(name, 0.0) + max(row.issue, row.tensor, row.exchange[1])
    busy["columns"] /= 2  # backward has made them again
    clocks = {k: max(v, dense.least_bytes(k) / BYTES_PER_CLOCK) for k, v in busy.items()}
    return {False: clocks["columns"], True: sum(clocks.values())}


def dense_table() -> str:
    os.environ["DK_EMULATED_PROCESSORS"] = str(PROCESSORS)
    torch.manual_seed(0)
    device = Device(
        [p for p in kernel_sources() if p.stem in ("columns_float", "columns_bfloat16")]
    )
    lines = []
    for w in benchmark_ops().stages(1, 800, 1216):
        case = Case(
            batch=1, channels=w.c // 2, out_channels=w.c // 2, groups=1, size=(w.h, w.w), bias=False
        )
        for dtype in PEAK:
            dense = Dense(case, dtype)
            for backward, clocks in kernels(device, dense).items():
                products, rigid = dense.products(backward), dense.rigid(backward)
                times = [f"{c / CLOCKS_PER_SECOND * 1e6:.0f}" for c in (clocks, products, rigid)]
                name = "backward" if backward else "forward"
                over = f"{(clocks + products) / rigid:.1f}"
                lines.append([w.name, str(dtype)[6:], name, *times, over])
    header = ["stage", "", "", "columns, µs", "products, µs", "rigid, µs", "over rigid"]
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)

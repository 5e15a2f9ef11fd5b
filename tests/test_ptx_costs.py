"""Counts of what the forward kernel does that decide its speed: float32, K = 3, S = 4.

They are of nvcc's PTX, not measured; a change that raises one should know it.
"""

import shutil
from collections import defaultdict

import pytest
import torch
from conftest import Case
from ptx import build
from ptx.costs import occupancy
from ptx.device import Device

pytestmark = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("g++")), reason="needs nvcc and g++"
)

# Without padding all nine taps of every pixel read; 128 channels are 32 vectors of four.
CASE = Case(batch=1, channels=128, size=(14, 14), padding=(0, 0), bias=False)
PIXELS, VECTORS = 12 * 12, 32


@pytest.fixture(scope="module")
def costs():
    """By opcode and line, of the whole launch."""
    device = Device([build.ROOT / "csrc" / "cuda" / "forward_float.cu"])
    torch.manual_seed(0)
    tensors = CASE.tensors(torch.float32)
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)

    def forward(launch):
        return range(launch.grid if launch.name.startswith("forward") else 0)

    _, launches = device.call(tensors, CASE, only=forward, counting=True, races=False)
    assert launches[0].name == "forward_kernel<float,4,3,4,1,0>"
    return launches[0].counts.by_line(device.entry(launches[0].name))


def test_loads_of_a_pixel(costs):
    """For each vector of channels; each of these is one load of the hardware."""
    wide = defaultdict(float)
    for (opcode, _), cost in costs.items():
        if opcode.startswith("ld.") and ".v" in opcode:
            wide[opcode] += cost.threads / (PIXELS * VECTORS)
    # Of each tap: the input; where it reads; coefficients and 2x2 cells.
    assert wide == {"ld.global.v4.f32": 9, "ld.shared.v2.u32": 9, "ld.shared.v4.f32": 9 + 36}


def test_no_other_load_is_as_frequent(costs):
    """Staging and filling are shared by all channels, or by all pixels."""
    for (opcode, line), cost in costs.items():
        if opcode.startswith("ld.") and ".v" not in opcode:
            assert cost.threads / (PIXELS * VECTORS) < 3, line


def test_global_memory_is_read_and_written_by_whole_sectors(costs):
    for (opcode, line), cost in costs.items():
        if ".global." in opcode:
            assert cost.pieces == cost.fewest, line


def test_cells_are_read_without_bank_conflicts(costs):
    (cells,) = (cost for cost in costs.values() if cost.threads == 36 * PIXELS * VECTORS)
    assert cells.pieces == cells.fewest


def test_what_all_threads_of_a_pixel_read_is_one_wavefront(costs):
    """Where a tap reads, and its coefficients: the same address, if a warp is served at once."""
    found = [
        cost
        for (opcode, _), cost in costs.items()
        if ".shared." in opcode and cost.threads == 9 * PIXELS * VECTORS
    ]
    assert len(found) == 2
    for cost in found:
        assert cost.merged == cost.requests
        assert cost.pieces <= 4 * cost.requests  # if quarter warps are served one by one


@pytest.mark.parametrize(
    "registers, block, shared, expected",
    [
        (32, 256, 0, 1.0),
        (33, 256, 0, 0.75),  # 40 registers, six blocks
        (48, 256, 15360, 0.625),
        (255, 1024, 0, 0.0),  # does not fit
        (32, 256, 82944, 0.25),
    ],
)
def test_occupancy(registers, block, shared, expected):
    assert occupancy(registers, block, shared) == expected

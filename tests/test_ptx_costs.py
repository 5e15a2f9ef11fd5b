"""Counts of what the kernels do that decide their speed: float32, K = 3, S = 4.

They are of nvcc's PTX, not measured; a change that raises one should know it.
"""

import shutil

import pytest
import torch
from conftest import Case
from ptx import build
from ptx.costs import occupancy
from ptx.counts import Cost
from ptx.device import Device, plain_name

pytestmark = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("g++")), reason="needs nvcc and g++"
)

# Without padding all nine taps of every pixel read; 128 channels are 32 vectors of four; there are
# six tiles of 32 output pixels.
CASE = Case(batch=1, channels=128, size=(18, 14), padding=(0, 0), bias=False)
PIXELS, VECTORS = 16 * 12, 32
# Scopes are read as vectors of four cells, once for a tile's 32 pixels.
STAGED = 16 * 4 / 4 / 32
PASSES = {
    "forward": "forward_kernel<float,4,3,4,1,0>",
    "backward": "backward_kernel<float,4,3,4,1>",
}


@pytest.fixture(scope="module")
def device():
    return Device([build.ROOT / "csrc" / "cuda" / f"{name}_float.cu" for name in PASSES])


def count(device, name: str, tensors: dict) -> dict[tuple[str, str], Cost]:
    """By opcode and line, of the whole launch."""
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)

    def chosen(launch):
        return range(launch.grid if launch.name == PASSES[name] else 0)

    _, launches = device.call(tensors, CASE, only=chosen, counting=True, races=False)
    (launch,) = (launch for launch in launches if chosen(launch))
    return launch.counts.by_line(device.entry(launch.name))


@pytest.fixture(scope="module")
def costs(device):
    """Of forward, where neighbouring pixels read cells of their own."""
    torch.manual_seed(0)
    return count(device, "forward", CASE.tensors(torch.float32))


def same_cells() -> dict:
    """All pixels read the same cells for a tap, as good as always with small offsets."""
    tensors = CASE.tensors(torch.float32)
    tensors["kernel_offset"] *= 0.0
    return tensors


def wide(costs: dict, kind: str) -> float:
    """16-byte accesses of a kind, for each output pixel and vector of channels."""
    found = [cost.threads for (opcode, _), cost in costs.items() if opcode.startswith(kind)]
    return sum(found) / (PIXELS * VECTORS)


def test_loads_of_a_pixel(costs, device):
    """For each vector of channels; each of these is one load of the hardware."""
    # Of each tap: the input; where it reads; coefficients and 2x2 cells.
    assert wide(costs, "ld.global.v4") == 9 + STAGED
    assert wide(costs, "ld.shared.v2") == 9
    assert 9 + 24 < wide(costs, "ld.shared.v4") <= 9 + 36
    # Four neighbouring pixels share what they read of the scope.
    assert wide(count(device, "forward", same_cells()), "ld.shared.v4") == 9 + 36 / 4


def test_accesses_of_a_pixel_in_backward(device):
    costs = count(device, "backward", same_cells())
    pixels = 18 * 14 / PIXELS  # it goes by input pixels
    staged = wide(costs, "ld.global.v4") - 9 - pixels
    assert 0 < staged < 2 * STAGED
    # Cells and their sums are read and written about once for four pixels.
    assert wide(costs, "ld.shared.v2") == pytest.approx(9 * 8 * 32 / PIXELS)  # eight tiles
    assert wide(costs, "ld.shared.v4") < 34  # each tap's coefficients 9, 36 / 4 of each, ends
    assert wide(costs, "st.shared.v4") < 14
    for (opcode, line), cost in costs.items():
        if ".shared.v4" in opcode and cost.merged > cost.requests and cost.threads > 9 * 32 * 32:
            assert cost.pieces == cost.fewest, line


@pytest.mark.parametrize("name, most", [("forward", 64), ("backward", 128)])
def test_registers(name, most):
    """So many that half, and a quarter, of the threads that a multiprocessor takes are at work."""
    report = build.ptxas_report(build.ROOT / "csrc" / "cuda" / f"{name}_float.cu")
    (use,) = (use for mangled, use in report.items() if plain_name(mangled) == PASSES[name])
    assert use["spilled"] == 0 and use["registers"] <= most


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
    (cells,) = (
        cost
        for (opcode, _), cost in costs.items()
        if opcode == "ld.shared.v4.f32" and cost.merged > cost.requests
    )
    assert cells.pieces == cells.fewest


def test_what_all_threads_of_a_pixel_read_is_one_wavefront(costs):
    """Where a tap reads, and its coefficients: the same address, if a warp is served at once."""
    found = [
        cost
        for (opcode, _), cost in costs.items()
        if opcode.startswith("ld.shared") and cost.threads == 9 * PIXELS * VECTORS
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

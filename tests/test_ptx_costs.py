"""Counts of what the kernels do that decide their speed: K = 3, S = 4.

They are of nvcc's PTX, not measured; a change that raises one should know it.
"""

import math
import re
import shutil
from dataclasses import dataclass

import pytest
import torch
from conftest import Case
from ptx import build
from ptx.costs import by_space, issued, occupancy
from ptx.counts import Cost
from ptx.device import Device, Launch, plain_name

pytestmark = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("g++")), reason="needs nvcc and g++"
)

# ---- the kernels of CUDA cores ------------------------------------------------------------------

# Dilated, which tensor cores do not take. Without padding all nine taps of every pixel read; 128
# channels are 32 vectors of four; there are six tiles of 32 output pixels, and ten of the input.
CASE = Case(batch=1, channels=128, size=(20, 16), padding=(0, 0), dilation=(2, 2), bias=False)
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
    pixels = 20 * 16 / PIXELS  # it goes by input pixels
    staged = wide(costs, "ld.global.v4") - 9 - pixels
    assert 0 < staged < 2 * STAGED
    # Cells and their sums are read and written about once for four pixels.
    # Where a tap of four pixels reads: two vectors.
    assert wide(costs, "ld.shared.v4.u32") == pytest.approx(9 * 10 * 32 / PIXELS / 4 * 2)
    assert wide(costs, "ld.shared.v4.f32") < 32  # each tap's coefficients 9, 36 / 4 of each, ends
    assert wide(costs, "st.shared.v4") < 13
    for (opcode, line), cost in costs.items():
        if ".shared.v4" in opcode and cost.merged > cost.requests and cost.threads > 9 * 32 * 32:
            assert cost.pieces == cost.fewest, line


def test_the_input_gradient_is_added_by_whole_vectors(device):
    code = device.entry("backward_data_kernel<float,4,3,4,1>").code
    assert {i.opcode for i in code if i.parts[0] in ("atom", "red")} == {"red.global.add.v4.f32"}


def use_of(kernel: str) -> dict[str, int]:
    """Of registers, and bytes spilled."""
    source = f"{kernel.split('_')[0]}_{re.split('[<,]', kernel)[1]}.cu"
    report = build.ptxas_report(build.ROOT / "csrc" / "cuda" / source)
    (use,) = (use for mangled, use in report.items() if plain_name(mangled) == kernel)
    return use


@pytest.mark.parametrize("name, registers, spilled", [("forward", 64, 0), ("backward", 128, 72)])
def test_registers(name, registers, spilled):
    """So many that half, and a quarter, of the threads that a multiprocessor takes are at work.

    What backward spills is of a tile or a block; nothing is read back in the loop over taps.
    """
    use = use_of(PASSES[name])
    assert use["registers"] <= registers and use["spilled"] <= spilled


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


# ---- the kernels of tensor cores ----------------------------------------------------------------

# Whole tiles of pixels. A warp takes 16 pixels and eight vectors of 16 bytes at once: a unit.
MATRIX_CASE = Case(batch=1, channels=128, size=(16, 16), bias=False)


@dataclass
class Limits:
    """What is known of a kernel; the figures of a unit hold all nine taps.

    Attributes:
        occupancy: what it is, at least: in blocks, four in forward and three in backward.
        issued: instructions of a unit as `ptx.costs` guesses them.
        loads: of a unit, of 16 bytes from shared memory: at each tap, four vectors, and as many of
            coefficients as these have parts.
        waste: wavefronts of shared memory and sectors of global memory over the fewest.
    """

    registers: int
    spilled: int
    occupancy: float
    products: int
    loads: int
    issued: float
    waste: tuple[float, float]


# Of float32, the weights of a tap are sums of products of two parts (3 of 4 count); bfloat16 has
# but two of coefficients.
LIMITS = {
    "forward_matrix_kernel<float,4>": Limits(
        128, 64, 0.25, 9 * 4 * 3, 9 * (4 + 2), 1220, (1.10, 1.0)
    ),
    "forward_matrix_kernel<bfloat16,4>": Limits(
        128, 160, 0.25, 9 * 8 * 2, 9 * (4 + 2), 2070, (1.19, 1.0)
    ),
    "backward_matrix_kernel<bfloat16,4>": Limits(
        168, 160, 0.1875, 9 * (8 * 2 + 8 + 8), 9 * (4 + 2) + 9, 3800, (1.16, 1.27)
    ),
}
every_matrix_kernel = pytest.mark.parametrize("kernel", LIMITS)


@pytest.fixture(scope="module")
def matrix_launches() -> tuple[Device, dict[str, Launch]]:
    """In float32 and bfloat16, whole, by name."""
    names = [f"{name}_{kind}" for name in PASSES for kind in ("float", "bfloat16")]
    device = Device([build.ROOT / "csrc" / "cuda" / f"{name}.cu" for name in names])

    def chosen(launch):
        return range(launch.grid if launch.name in LIMITS else 0)

    torch.manual_seed(0)
    seen = []
    for dtype in (torch.float32, torch.bfloat16):
        tensors = MATRIX_CASE.tensors(dtype)
        tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
        options = {"only": chosen, "counting": True, "races": False}
        seen += device.call(tensors, MATRIX_CASE, **options)[1]
    return device, {launch.name: launch for launch in seen if chosen(launch)}


@every_matrix_kernel
def test_matrix_registers(kernel, matrix_launches):
    """No more than nvcc 13.0 made of them."""
    use, limits, launch = use_of(kernel), LIMITS[kernel], matrix_launches[1][kernel]
    assert use["registers"] <= limits.registers and use["spilled"] <= limits.spilled
    held = occupancy(use["registers"], launch.block, launch.shared_bytes)
    assert held >= limits.occupancy


@every_matrix_kernel
def test_instructions_of_a_unit(kernel, matrix_launches):
    device, launches = matrix_launches
    launch, limits, code = launches[kernel], LIMITS[kernel], device.entry(kernel).code
    vectors = 128 // (8 if "bfloat16" in kernel else 4)
    units = math.prod(MATRIX_CASE.size) / 16 * vectors / 8
    warps = launch.counts.warps.items()
    assert sum(n for i, n in warps if code[i].parts[0] == "mma") == limits.products * units
    assert sum(n * issued(code[i]) for i, n in warps) <= limits.issued * units
    loads = [
        cost.requests
        for (opcode, _), cost in launch.counts.by_line(device.entry(kernel)).items()
        if opcode.startswith("ld.shared.v4")
    ]
    assert sum(loads) <= limits.loads * units


@every_matrix_kernel
def test_matrix_kernels_waste_little(kernel, matrix_launches):
    device, launches = matrix_launches
    costs = by_space(device, launches[kernel])
    shared, sectors = (costs[space].pieces / costs[space].fewest for space in ("shared", "global"))
    most_shared, most_sectors = LIMITS[kernel].waste
    assert shared <= most_shared and sectors <= most_sectors


@every_matrix_kernel
def test_images_and_coefficients_without_bank_conflicts(kernel, matrix_launches):
    """All that a warp reads for a tap, and copies; what is stored there at random is not."""
    device, launches = matrix_launches
    for (opcode, line), cost in launches[kernel].counts.by_line(device.entry(kernel)).items():
        if opcode.startswith("ld.shared.v4") or opcode == "cp.shared":
            assert cost.pieces == cost.fewest, line


# ---- the kernel that makes columns in registers ------------------------------------------------

DENSE_CASE = Case(batch=1, channels=16, out_channels=64, groups=1, size=(16, 16), bias=False)
DENSE_KERNEL = "dense_matrix_kernel<bfloat16,1>"
CHANNELS_OF_WARPS = 16 * 16 // 32 * 16  # a warp takes 32 pixels and 64 outputs


@pytest.fixture(scope="module")
def dense_launch() -> tuple[Device, Launch]:
    device = Device([build.ROOT / "csrc" / "cuda" / "dense_bfloat16.cu"])

    def chosen(launch):
        return range(launch.grid if launch.name == DENSE_KERNEL else 0)

    torch.manual_seed(0)
    tensors = DENSE_CASE.tensors(torch.bfloat16)
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    _, launches = device.call(tensors, DENSE_CASE, only=chosen, counting=True, races=False)
    (launch,) = (launch for launch in launches if chosen(launch))
    return device, launch


def test_dense_registers(dense_launch):
    """Three blocks at once."""
    use, launch = use_of(DENSE_KERNEL), dense_launch[1]
    assert use["registers"] <= 168 and use["spilled"] <= 96
    assert occupancy(use["registers"], launch.block, launch.shared_bytes) == 3 * 4 / 64


def test_instructions_of_a_dense_channel(dense_launch):
    """Pixels that taps of several rows read are loaded once; nothing else is done for a channel."""
    device, launch = dense_launch
    entry = device.entry(DENSE_KERNEL)
    counted = dict.fromkeys(("mma", "fma"), 0)
    for number, warps in launch.counts.warps.items():
        name = entry.code[number].parts[0]
        if name == "mma" or entry.code[number].opcode == "fma.rn.bf16x2":
            counted[name] += warps
    assert counted == {"mma": 16 * CHANNELS_OF_WARPS, "fma": 4 * 9 * 2 * CHANNELS_OF_WARPS}
    issue = sum(n * issued(entry.code[i]) for i, n in launch.counts.warps.items())
    assert issue / CHANNELS_OF_WARPS < 300  # with what is done once for all channels


def test_what_a_dense_channel_reads_of_shared_memory(dense_launch):
    """Six rows of pixels, three at a time, for two channels; weights; without bank conflicts."""
    device, launch = dense_launch
    requests = {"ld.shared.u32": 0, "ld.shared.v2.u32": 0}
    for (opcode, line), cost in launch.counts.by_line(device.entry(DENSE_KERNEL)).items():
        if opcode in requests and cost.requests >= CHANNELS_OF_WARPS:
            requests[opcode] += cost.requests
            assert cost.pieces == cost.fewest, line
    expected = {"ld.shared.u32": 6 * 3 / 2, "ld.shared.v2.u32": 8}
    assert requests == {opcode: n * CHANNELS_OF_WARPS for opcode, n in expected.items()}


# ---- the model ----------------------------------------------------------------------------------


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

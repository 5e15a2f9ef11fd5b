"""What nvcc makes of every CUDA kernel, run without a GPU, against the CPU operators.

docs/testing_cuda_without_a_gpu.md says how. While it runs, every access is checked: bounds,
alignment, unwritten bytes, races; and so is every barrier (tests/test_ptx_machine.py).

Two of the four types, to stay below two minutes; all of them if DK_TEST_PTX is set (make ptx).
"""

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import DENSE, ODD, Case, assert_close_to_exact, double
from emulation import plugin
from ptx import build
from ptx.device import Device
from ptx.memory import Fault
from ptx.parser import TYPES as REGISTER_TYPES
from ptx.parser import Instruction

pytestmark = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("g++")), reason="needs nvcc and g++"
)


@dataclass(frozen=True)
class Plan:
    """A case, and how it is run.

    Attributes:
        processors: of the device. Few: a block has several tiles of pixels and of channels. Many:
            one each, and the weight's gradient has many summands.
        offsets: "knots" are on cells and pixels; all parts of "fine" ones' coefficients count; of a
            number, two are that.
    """

    case: Case
    layout: str = "channels_last"
    processors: int = 2
    deterministic: bool = False
    offsets: str = "plain"

    def __str__(self):
        words = [str(self.case), self.layout, f"{self.processors} processors"]
        words += ["deterministic"] * self.deterministic
        words += [self.offsets] * (self.offsets != "plain")
        return " ".join(words)

    def tensors(self, dtype) -> dict:
        torch.manual_seed(0)
        tensors = self.case.tensors(dtype)
        if self.layout == "channels_last":
            tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
        for name in ("kernel_offset", "data_offset"):
            if tensors[name] is None or self.offsets == "plain":
                continue
            if self.offsets == "knots":
                tensors[name] = (tensors[name] * 2).round() / 2  # a scope of 4 rests between cells
            elif self.offsets == "fine":
                tensors[name] += torch.rand_like(tensors[name]) / 64
            else:
                tensors[name][0, 5, 2, 3] = tensors[name][1, 8, 0, 0] = float(self.offsets)
        return tensors


def offset_plans(kernel: bool, data: bool) -> list[Plan]:
    """Every kernel for channels_last with these offsets."""
    which = {"kernel_offset": kernel, "data_offset": data}
    odd = ODD | which
    scope = (4, 2) if kernel else (2, 3)
    plans = [
        Plan(Case(channels=40, scope=(3, 3), **which)),
        Plan(Case(channels=72, kernel=(2, 3), scope=scope, clip=not data, **odd)),
        Plan(Case(channels=13, bias=False, scope=(3, 3), **odd)),
    ]
    if kernel:
        plans += [
            Plan(Case(channels=72, padding=(0, 0), **which), processors=1),
            Plan(Case(channels=72, dilation=(1, 2), padding=(0, 1), **which), processors=1),
            # In 16 bits a scope of 3 goes by tensor cores if it is not dilated.
            Plan(Case(channels=40, dilation=(2, 1), scope=(3, 3), clip=False, **which)),
            Plan(Case(channels=128, scope=(5, 5), clip=False, **which), processors=132),
        ]
    # Dense and grouped, by vectors of channels and one by one.
    dense = Case(channels=40, out_channels=6, groups=2, **which)
    single = replace(dense, channels=6)
    sizes = (3, 4, 5) if kernel else (3,)
    plans += [Plan(replace(case, scope=(s, s))) for case in (dense, single) for s in sizes]
    dense = Case(channels=8, out_channels=4, groups=1, kernel=(2, 3), scope=scope, **odd)
    plans += [Plan(dense), Plan(replace(dense, channels=5), processors=1)]
    if kernel:
        pointwise = {"kernel": (1, 1), "scope": (2, 2), "padding": (0, 0)}
        plans += [Plan(replace(case, **pointwise, dilation=(1, 1))) for case in (dense, single)]
    if kernel or data:
        modulated = Case(channels=40, scope=(3, 3), modulated=True, **which)
        plans += [Plan(replace(modulated, channels=13, stride=(2, 1)))]
        plans += [Plan(modulated), Plan(replace(modulated, out_channels=6, groups=2))]
    if not data:
        return plans
    # What gathers the input's gradient asks for neither the processors nor the scope's size.
    gathered = [plan for plan in plans if plan.processors == 2 and plan.case.scope != (5, 5)]
    return plans + [replace(plan, deterministic=True) for plan in gathered]


def matrix_plans() -> list[Plan]:
    """More for the kernels on tensor cores: images that end within a tile, and tiles of channels.

    Of each scope, in one half of the types, with 8, 16 and 32 lanes.
    """
    small, three = {"size": (5, 3)}, {"scope": (3, 3)}
    cases = [
        Case(batch=3, channels=8, size=(5, 17), padding=(2, 0), clip=False, **three),
        Case(channels=8, size=(17, 9), padding=(1, 2)),
        Case(batch=3, channels=136, size=(5, 7), padding=(0, 2)),  # several tiles of channels
        Case(channels=200, padding=(2, 2), **small, **three),
        Case(channels=64, size=(3, 11), padding=(0, 0), clip=False),
        Case(channels=128, padding=(1, 0), **small),
    ]
    plans = [Plan(case, processors=1) for case in cases]
    return plans + [Plan(replace(cases[2], **three), processors=8)]


def all_plans() -> list[Plan]:
    """What reaches every kernel of one type."""
    plans = [plan for k in (False, True) for d in (False, True) for plan in offset_plans(k, d)]
    plans += matrix_plans()
    plans += [Plan(case) for case in DENSE]
    for size in (3, 4, 5):
        case = Case(channels=35, scope=(size, size), padding=(size - 3, 1), clip=size < 5)
        plans.append(Plan(case, "contiguous"))
    plans.append(Plan(Case(channels=35, modulated=True), "contiguous"))
    plans.append(Plan(Case(batch=3, size=(20, 19), channels=8), processors=132))
    for size, scope in [((1, 9), (4, 1)), ((9, 1), (1, 4))]:
        plans.append(Plan(Case(batch=5, channels=8, size=size, scope=scope, data_offset=True)))
    for data in (False, True):  # a tile's other places have no pixel to read instead
        plans.append(Plan(Case(batch=1, channels=8, size=(1, 1), data_offset=data)))
    for data in (False, True):  # shared memory has room for few warps
        plans.append(Plan(Case(channels=40, size=(5, 4), scope=(9, 9), data_offset=data)))
    for offsets in ("knots", "nan", "inf", "-inf", "1e30"):
        plans.append(Plan(Case(channels=8), offsets=offsets))
        plans.append(Plan(Case(channels=8, stride=(2, 1)), offsets=offsets))
        plans.append(Plan(Case(channels=8), "contiguous", offsets=offsets))
        plans.append(Plan(DENSE[0], offsets=offsets))
        for deterministic in (False, True):
            for groups in (8, 2):
                case = Case(channels=8, groups=groups, data_offset=True)
                plans.append(Plan(case, deterministic=deterministic, offsets=offsets))
    return plans


TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One of 4-byte and one of 2-byte accesses; the others are other instances of the same templates.
QUICK_TYPES = TYPES[:2]
every_type = pytest.mark.parametrize(
    "dtype",
    TYPES if "DK_TEST_PTX" in os.environ else QUICK_TYPES,
    ids=lambda dtype: str(dtype)[6:],
)


@pytest.fixture(scope="module")
def ptx():
    return Device(build.kernel_sources())


@contextmanager
def settings(plan: Plan, monkeypatch):
    monkeypatch.setenv("DK_EMULATED_PROCESSORS", str(plan.processors))
    torch.use_deterministic_algorithms(plan.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # unwritten bytes are to show
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


@every_type
@pytest.mark.parametrize("plan", all_plans(), ids=str)
def test_results(plan, dtype, ptx, monkeypatch):
    tensors = plan.tensors(dtype)
    expected = plugin.call("dk_detectron", double(tensors), plan.case)
    with settings(plan, monkeypatch):
        actual, launches = ptx.call(tensors, plan.case)
    names = " ".join(launch.name for launch in launches)
    assert ("backward_matrix_kernel" in names) == plan.case.on_tensor_cores(dtype)
    assert ("dense_matrix_kernel" in names) == plan.case.in_registers(dtype)
    if plan.offsets == "nan":
        # Which pixels a NaN location smears its gradient over is nobody's promise, nor over which
        # cells of a dense weight what it has read.
        for gradients in actual, expected:
            del gradients["grad_input"]
            if not plan.case.depthwise:
                del gradients["grad_weight"]
    assert_close_to_exact(actual, expected, plan.case)


def test_no_entry_is_forgotten(ptx, monkeypatch):
    planned = set()
    for plan in all_plans():
        for dtype in TYPES:
            with settings(plan, monkeypatch):
                planned |= {launch.name for launch in ptx.planned(plan.tensors(dtype), plan.case)}
    assert planned == set(ptx.entries)


# ---- faults in the real kernels -----------------------------------------------------------------

NOTHING = Instruction("mov.pred", ("%nothing", "0"))
RACE = r"^(forward|backward|columns|dense|tiles|matrix|mma)\w*\.cuh:\d+.* race: "
# On one processor, a block of the backward kernels has all tiles of channels, and there are more
# tiles of pixels than blocks.
SEVERAL_TILES = {"channels": 68, "size": (12, 11)}


@contextmanager
def changed(entry, number: int, instruction: Instruction, monkeypatch):
    """While it lasts, another instruction stands in place of one."""
    with monkeypatch.context() as patch:
        patch.setitem(entry.registers, "%nothing", REGISTER_TYPES["pred"])
        code = [*entry.code[:number], instruction, *entry.code[number + 1 :]]
        patch.setattr(entry, "code", code)
        yield


@pytest.mark.parametrize(
    "name, options",
    [
        ("forward_kernel<float,4,3,4,1,0>", {"stride": (1, 2)}),
        ("forward_matrix_kernel<float,4>", {}),
        ("forward_kernel<float,4,3,4,1,1>", {"data_offset": True}),
        ("forward_nchw_kernel<float,3,4>", {}),
        ("backward_kernel<float,4,3,4,1>", {"stride": (1, 2)}),
        ("backward_matrix_kernel<bfloat16,4>", {"channels": 136, "size": (9, 9)}),
        ("backward_data_kernel<float,4,3,4,1>", {"data_offset": True}),
        ("sum_weight_kernel<float>", {}),
        ("columns_kernel<float,4,4,1,0>", {"channels": 64, "groups": 2}),
        (
            "columns_backward_kernel<float,4,1,1>",
            {"channels": 64, "groups": 2, "data_offset": True},
        ),
        ("dense_matrix_kernel<bfloat16,1>", {"channels": 24, "groups": 1}),
    ],
)
def test_every_barrier_is_missed(name, options, ptx, monkeypatch):
    """Without any one of them there is a race, and it is seen at a line of csrc."""
    layout = "contiguous" if "nchw" in name else "channels_last"
    plan = Plan(Case(**SEVERAL_TILES | options), layout, processors=1)
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    entry = ptx.entry(name)
    barriers = [i for i, instruction in enumerate(entry.code) if instruction.parts[0] == "bar"]
    assert barriers
    for number in barriers:
        with settings(plan, monkeypatch), changed(entry, number, NOTHING, monkeypatch):
            with pytest.raises(Fault, match=RACE):
                ptx.call(plan.tensors(dtype), plan.case)


def products_to_lose(entry) -> dict[int, Instruction]:
    """Of every 50th product that is added to a sum, and every 7th of matrices, what is left of it.

    A product of matrices takes up to three of their parts: over and over, another one is lost.
    """
    numbers = {"fma": [], "mma": []}
    for number, instruction in enumerate(entry.code):
        numbers.get(instruction.parts[0], []).append(number)
    left = {}
    for number in numbers["fma"][::50]:
        target, _, _, total = entry.code[number].operands
        left[number] = Instruction("mov.f32", (target, total))
    for number in numbers["mma"][::7]:
        target, _, _, total = entry.code[number].operands
        assert target == total
        left[number] = NOTHING
    return left


@pytest.mark.parametrize(
    "name, case",
    [
        ("forward_kernel<float,4,3,4,1,0>", Case(**SEVERAL_TILES, modulated=True)),
        ("backward_kernel<float,4,3,4,1>", Case(**SEVERAL_TILES)),
        ("backward_kernel<float,4,0,0,1>", Case(**SEVERAL_TILES, modulated=True)),
        ("forward_matrix_kernel<float,4>", Case(batch=1, channels=20, size=(9, 8))),
    ],
)
def test_a_lost_product_is_seen(name, case, ptx, monkeypatch):
    plan = Plan(case, processors=1, offsets="fine")
    tensors = plan.tensors(torch.float32)
    expected = plugin.call("dk_detectron", double(tensors), case)
    entry = ptx.entry(name)
    for number, left in products_to_lose(entry).items():
        with settings(plan, monkeypatch), changed(entry, number, left, monkeypatch):
            actual, _ = ptx.call(tensors, case)
        with pytest.raises(AssertionError, match="Mismatched elements"):
            assert_close_to_exact(actual, expected, case)


@pytest.mark.parametrize(
    "name, case",
    [
        # Every product has some channels, or outputs.
        ("backward_matrix_kernel<half,4>", Case(batch=1, channels=128, size=(9, 8))),
        ("dense_matrix_kernel<half,1>", Case(batch=1, channels=64, groups=1, size=(9, 8))),
    ],
)
def test_every_product_of_float16_counts(name, case, ptx, monkeypatch):
    """Where the loss of one is smaller than the tolerance."""
    plan = Plan(case, processors=1, offsets="fine")
    tensors = plan.tensors(torch.float16)
    entry = ptx.entry(name)
    with settings(plan, monkeypatch):
        whole, _ = ptx.call(tensors, plan.case)
    for number, left in products_to_lose(entry).items():
        with settings(plan, monkeypatch), changed(entry, number, left, monkeypatch):
            actual, _ = ptx.call(tensors, plan.case)
        assert not all(torch.equal(actual[name], whole[name]) for name in whole)


def test_torch_frees_what_it_allocates_afterwards(ptx):
    """oneDNN keeps bare pointers, which the arena, now torch's allocator, must be able to free."""
    with ptx.taking():
        pass
    image, weight = torch.randn(1, 16, 8, 12), torch.randn(16, 4, 3, 5)
    with torch.no_grad():
        output = torch.nn.functional.conv2d(image, weight, padding="same", groups=4)
    assert output.shape == image.shape

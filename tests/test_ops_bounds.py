"""The operators at their bounds: no pixels, ends of groups, sizes that just do not fit."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import Case, assert_close, double, every_offset, every_path, run

from dk_detectron.ops import deform_kernel_conv2d, dispatch, rest_kernel
from dk_detectron.ops.composed import composed_per_image_conv2d

compiled = torch.ops.dk_detectron.deform_kernel_conv2d


def check_against_oracle(case: Case, dtype: torch.dtype) -> None:
    tensors = case.tensors(dtype)
    expected = run(reference.deform_kernel_conv2d, double(tensors), case.arguments)
    summands = dtype if dtype == torch.float32 else None
    assert_close(run(deform_kernel_conv2d, tensors, case.arguments), expected, summands)


# ---- pixels and cells ----------------------------------------------------------------------------


@every_path
@every_offset
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_an_image_without_pixels(size, bias, which, groups, deterministic):
    """Every tap lies in the padding: nothing but the bias, which has the only gradient."""
    case = Case(size=size, padding=(2, 2), scope=(3, 3), groups=groups, bias=bias, **which)
    tensors = case.tensors(torch.float32)
    found = run(deform_kernel_conv2d, tensors, case.arguments)
    output = torch.zeros(2, 3, *case.output_size)
    assert output.numel()
    if bias:
        output += tensors["bias"].view(-1, 1, 1)
        assert found.pop("grad_bias").any()
    assert torch.equal(found.pop("output"), output)
    for gradient in found.values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


SCOPES = [(1, 1), (1, 2), (3, 1), (2, 2), (1, 5), (2, 4), (3, 3), (4, 4), (1, 17), (3, 11)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("fan_in", [1, 2, 5])
@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_cells_of_neighbouring_groups(scope, fan_in, dtype):
    """Of any number of cells, those of a group's last channel end where the next group begins."""
    sizes = {"channels": 3 * fan_in, "out_channels": 6, "groups": 3, "size": (3, 4)}
    check_against_oracle(Case(scope=scope, **sizes), dtype)


@every_path
@every_offset
@pytest.mark.parametrize("kernel", [(1, 5), (5, 1)], ids=str)
def test_long_kernels(kernel, which, groups):
    case = Case(groups=groups, kernel=kernel, scope=kernel, padding=(2, 2), **which)
    check_against_oracle(case, torch.float64)


LAYOUT_CASES = [
    Case(),
    Case(stride=(2, 3), padding=(0, 3)),
    Case(dilation=(3, 2), padding=(2, 5), clip=False),
    Case(kernel=(2, 5), scope=(3, 6), stride=(3, 1), dilation=(2, 1), modulated=True),
    Case(kernel=(1, 1), scope=(2, 2), stride=(2, 2), padding=(0, 0), bias=False),
    Case(kernel=(5, 3), scope=(5, 5), dilation=(4, 1), padding=(9, 0)),
    Case(dilation=(40, 1), padding=(40, 1)),
    Case(data_offset=True, modulated=True),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_layouts_have_the_same_results(case, dtype):
    """Bit for bit: in NCHW the CPU's kernels transpose tiles of what they read and write."""
    case = replace(case, channels=147, size=(9, 37))
    tensors = case.tensors(dtype)
    results = []
    for layout in torch.contiguous_format, torch.channels_last:
        tensors["input"] = tensors["input"].contiguous(memory_format=layout)
        results.append(run(deform_kernel_conv2d, tensors, case.arguments))
        assert results[-1]["grad_input"].is_contiguous(memory_format=layout)
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@pytest.mark.parametrize("clip, others", [(True, 5), (False, 0)], ids=["clip", "open"])
def test_taps_at_rest_outside_a_smaller_scope(clip, others):
    cell = torch.full((1, 1, 1, 1), 5.0)
    expected = torch.full((1, 1, 3, 3), float(others))
    expected[..., 1, 1] = 5
    assert torch.equal(rest_kernel(cell, (3, 3), clip), expected)
    assert torch.equal(rest_kernel(cell, (3, 3)), torch.full((1, 1, 3, 3), 5.0))


@pytest.mark.parametrize("stride", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize(
    "shape", [(6, 6, 6), (6, 8, 2), (6, 5, 1)], ids=["depthwise", "grouped", "dense"]
)
def test_composed_per_image_convolutions(shape, stride):
    """What torch.compile and ONNX get, one convolution per image: output and gradients."""
    channels, out_channels, groups = shape
    settings = stride, (1, 3), (1, 2), groups  # padding, dilation
    tensors = {
        "input": torch.randn(3, channels, 9, 11, dtype=torch.float64),
        "kernels": torch.randn(3, out_channels, channels // groups, 3, 5, dtype=torch.float64),
    }

    def one_by_one(input, kernels):
        pairs = zip(input.split(1), kernels, strict=True)
        return torch.cat([F.conv2d(image, kernel, None, *settings) for image, kernel in pairs])

    def composed(input, kernels):
        return composed_per_image_conv2d(input, kernels, *settings)

    assert_close(run(composed, tensors, {}), run(one_by_one, tensors, {}))


# ---- sizes that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("function", [deform_kernel_conv2d, compiled], ids=["checked", "direct"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_the_kernel_may_be_as_large_as_the_padded_image(axis, stride, function):
    """But not by a pixel larger."""
    dilation = tuple(3 if a == axis else 1 for a in range(2))
    for size, fits in (5, True), (4, False):
        size = tuple(size if a == axis else 6 for a in range(2))
        case = Case(size=size, dilation=dilation, stride=(stride, stride))
        if fits:
            assert function(**case.tensors(), **case.arguments).shape[2 + axis] == 1
            continue
        with pytest.raises((ValueError, RuntimeError), match="is smaller than the"):
            function(**case.tensors(), **case.arguments)


# ---- which kernels run ---------------------------------------------------------------------------


@pytest.mark.parametrize("device, cure", [("cuda", True), ("xpu", False)])
def test_what_helps_where_there_are_no_kernels(device, cure, monkeypatch):
    monkeypatch.setattr(dispatch, "DEVICES", {"meta", "cpu"})
    told = dispatch.why_composed(SimpleNamespace(device=torch.device(device)))
    assert told.startswith(f"dk_detectron has been built without kernels for {device}")
    assert ("FORCE_CUDA=1" in told) == cure


def test_no_build_helps_on_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    told = dispatch.why_composed(SimpleNamespace(device=torch.device("cuda")))
    assert told == "dk_detectron has no kernels for ROCm"


def sums_of_channels() -> str:
    """A hash."""
    torch.manual_seed(0)
    case = Case(channels=64, bias=False)
    given = {name: t for name, t in case.tensors().items() if t is not None}
    # Not randn, whose values depend on the instruction set.
    given = {name: torch.randint(-999, 999, t.shape) / 997 for name, t in given.items()}
    found = run(deform_kernel_conv2d, given, case.arguments)
    return hashlib.sha256(found["grad_kernel_offset"].numpy().tobytes()).hexdigest()


def test_instruction_sets_are_those_asked_for():
    """Vectors of another length add in another order, which shows in the last bits."""
    levels = ["DEFAULT", "AVX2", "AVX512"]
    native = torch.backends.cpu.get_cpu_capability()
    if native not in levels[1:]:
        pytest.skip(f"one instruction set: {native}")
    found = [sums_of_channels()]
    program = "import test_ops_bounds; print(test_ops_bounds.sums_of_channels())"
    for level in levels[: levels.index(native)]:
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent,
            env=os.environ | {"ATEN_CPU_CAPABILITY": level.lower()},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(result.stdout.strip())
    assert len(set(found)) == len(found)

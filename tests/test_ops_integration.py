"""The operators inside PyTorch: autograd, autocast, compile, export, threads, instruction sets."""

import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Case, assert_close, every_offset, every_path, run
from torch import nn

from dk_detectron.ops import deform_kernel_conv2d, library, sample_kernel

ROOT = Path(__file__).parents[1]
compiled = torch.ops.dk_detectron.deform_kernel_conv2d
compiled_backward = torch.ops.dk_detectron.deform_kernel_conv2d_backward


def require_gradients(tensors):
    return {name: t if t is None else t.requires_grad_() for name, t in tensors.items()}


# ---- torch.library -------------------------------------------------------------------------------

OPCHECK_CASES = [
    {},
    {"clip": False, "bias": False, "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"batch": 0},
    {"channels": 1},
    {"groups": 1, "out_channels": 5},
    {"channels": 4, "groups": 2, "stride": (2, 1), "clip": False, "bias": False},
]


@every_offset
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("geometry", OPCHECK_CASES, ids=lambda geometry: str(Case(**geometry)))
def test_opcheck(geometry, layout, which, device):
    case = Case(scope=(3, 3), **geometry, **which)
    tensors = case.tensors(torch.float32, device)
    tensors["input"] = tensors["input"].contiguous(memory_format=layout)
    torch.library.opcheck(compiled, tuple(require_gradients(tensors).values()), case.arguments)


@every_offset
@every_path
@pytest.mark.parametrize(
    "layout, batch",
    [(torch.contiguous_format, 2), (torch.channels_last, 2), (torch.channels_last, 0)],
    ids=str,
)
def test_opcheck_backward(layout, batch, groups, which, device):
    case = Case(batch=batch, groups=groups, scope=(3, 3), bias=False, **which)
    tensors = {
        name: None if t is None else t.to(memory_format=layout)
        for name, t in case.tensors(torch.float32, device).items()
    }
    del tensors["bias"]
    grad_output = torch.randn(batch, 3, *case.output_size, device=device)
    mask = [tensor is not None for tensor in tensors.values()]
    for output_mask in mask, [False, *mask[1:]]:
        torch.library.opcheck(
            compiled_backward,
            (grad_output, *tensors.values()),
            case.arguments | {"output_mask": output_mask},
        )


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "open"])
def test_opcheck_sample_kernel(clip, device):
    weight = torch.randn(4, 2, 3, 5, device=device, requires_grad=True)
    offset = torch.randn(3, 12, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.dk_detectron.sample_kernel, (weight, offset, (2, 3)), {"clip": clip}
    )


# ---- autocast ------------------------------------------------------------------------------------


@every_offset
@every_path
def test_autocast_rounds_all_but_the_offsets(groups, which, device):
    """As if the activations, weights and bias had been given in bfloat16, bit for bit."""
    case = Case(groups=groups, scope=(3, 3), **which)
    tensors = case.tensors(torch.float32, device)
    rounded = dict(tensors)
    for name, tensor in tensors.items():
        if tensor is not None and "offset" in name:
            tensor += 1e-3  # lost in bfloat16
            assert not torch.equal(tensor, tensor.bfloat16().float())
        elif tensor is not None:
            rounded[name] = tensor.bfloat16()

    with torch.autocast(device, torch.bfloat16):
        actual = run(deform_kernel_conv2d, tensors, case.arguments)
    expected = run(deform_kernel_conv2d, rounded, case.arguments)
    assert actual["output"].dtype == torch.bfloat16
    assert torch.equal(actual["output"], expected["output"])
    for name in expected.keys() - {"output"}:
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], expected[name].float())


@every_offset
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_autocast_types_of_any_grouping(bias, which, device):
    """Those of a convolution under autocast."""
    case = Case(groups=1, bias=bias, **which)
    tensors = case.tensors(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        actual = run(deform_kernel_conv2d, tensors, case.arguments)
    assert actual.pop("output").dtype == torch.bfloat16
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_autocast_leaves_different_is_named_as_it_was_given(name):
    """Double stays double, the others do not."""
    case = Case(bias=True)
    tensors = case.tensors(torch.float64) | {name: case.tensors(torch.float32)[name]}
    message = f"{name}: expected type torch.float64 like input, got torch.float32"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
        deform_kernel_conv2d(**tensors, **case.arguments)


# ---- compile and export --------------------------------------------------------------------------


def convolution(case):
    def function(input, weight, bias, kernel_offset, data_offset):
        return deform_kernel_conv2d(
            input, weight, bias, kernel_offset, data_offset, **case.arguments
        )

    return function


SIZES = [{"batch": 2, "size": (6, 7)}, {"batch": 3, "size": (9, 5)}, {"batch": 5, "size": (4, 8)}]


@pytest.mark.parametrize(
    "which",
    [
        pytest.param({"data_offset": True}, id="depthwise"),
        pytest.param({"groups": 1}, id="dense"),
    ],
)
def test_compile_with_dynamic_shapes(which, device):
    """One graph without breaks, compiled once for all sizes."""
    torch._dynamo.reset()
    function = convolution(Case(**which))
    graph = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in SIZES:
            tensors = Case(**which, **sizes).tensors(device=device)
            assert_close(run(graph, tensors, {}), run(function, tensors, {}))


@every_path
def test_compile_with_inductor(groups, device):
    """Its code asserts the strides that the fake kernels promise."""
    torch._dynamo.reset()
    case = Case(groups=groups, data_offset=True)
    tensors = case.tensors(device=device)
    graph = torch.compile(convolution(case), fullgraph=True)
    assert_close(run(graph, tensors, {}), run(convolution(case), tensors, {}))


def test_compile_sample_kernel(device):
    torch._dynamo.reset()
    graph = torch.compile(sample_kernel, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in 2, 5:
            tensors = {
                "weight": torch.randn(4, 3, 5, 5, device=device),
                "kernel_offset": torch.randn(batch, 18, device=device),
            }
            arguments = {"kernel_size": (3, 3)}
            assert_close(run(graph, tensors, arguments), run(sample_kernel, tensors, arguments))


class Layer(nn.Module):
    def __init__(self, case, tensors):
        super().__init__()
        self.arguments = case.arguments
        self.weight = nn.Parameter(tensors["weight"])
        self.bias = nn.Parameter(tensors["bias"])

    def forward(self, input, kernel_offset, data_offset):
        return deform_kernel_conv2d(
            input, self.weight, self.bias, kernel_offset, data_offset, **self.arguments
        )


@every_path
def test_export_round_trip(groups, device, tmp_path):
    """Exported at one size, saved, loaded, and run at another."""
    names = "input", "kernel_offset", "data_offset"
    cases = [Case(groups=groups, data_offset=True, **sizes) for sizes in SIZES]
    tensors = cases[0].tensors(torch.float32, device)
    layer = Layer(cases[0], tensors)
    dims = {0: torch.export.Dim("N"), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
    program = torch.export.export(
        layer, tuple(tensors[name] for name in names), dynamic_shapes=dict.fromkeys(names, dims)
    )
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for case in cases:
        tensors = case.tensors(torch.float32, device)
        arguments = [tensors[name] for name in names]
        assert_close(loaded(*arguments), layer(*arguments))


# ---- threads, instruction sets, crashes ----------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_offset
def test_results_do_not_depend_on_threads(which, threads):
    """Nor on the run: the first count comes twice. Bit for bit."""
    case = Case(batch=3, channels=130, size=(33, 20), **which)
    tensors = case.tensors(torch.float32)
    results = []
    for count in 1, 1, 2, 3:
        threads(count)
        results.append(run(deform_kernel_conv2d, tensors, case.arguments))
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(other[name], expected), name


@every_offset
def test_dense_results_repeat(which, threads):
    """On as many threads. On others, the matrix product is free to sum in another order."""
    case = Case(batch=3, channels=66, out_channels=40, groups=1, size=(33, 20), **which)
    tensors = case.tensors(torch.float32)
    for count in 1, 2:
        threads(count)
        first, again = (run(deform_kernel_conv2d, tensors, case.arguments) for _ in range(2))
        for name, expected in first.items():
            assert torch.equal(again[name], expected), name


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


LEVELS = ["DEFAULT", "AVX2", "AVX512"]


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lower_instruction_sets(level):
    """All other tests run on the highest that the processor has; vectors and tails differ below."""
    native = torch.backends.cpu.get_cpu_capability()
    if native not in LEVELS or LEVELS.index(level) >= LEVELS.index(native):
        pytest.skip(f"not below {native}")
    result = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider",
        "tests/test_ops.py", "-k",
        "cpu and (test_channels or test_low_precision_channels or test_oracle_of_dense)",
        ATEN_CPU_CAPABILITY=level.lower(),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


HOSTILE_CALLS = """
import torch
from dk_detectron.ops import deform_kernel_conv2d

backward = torch.ops.dk_detectron.deform_kernel_conv2d_backward
offset, sizes = torch.ones(1, 18, 5, 5), dict(
    kernel_size=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1], clip=True
)

def survive(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (RuntimeError, ValueError):
        pass

for channels, mask in (2, [True] * 4), (0, [True, True, True, False]):
    image, scope = torch.ones(1, channels, 5, 5), torch.ones(channels, 1, 4, 4)
    survive(backward, image, image, scope, offset, None, groups=channels, output_mask=mask, **sizes)
for channels, out_channels, groups in (4, 6, 2), (4, 6, 0), (4, 6, 3), (0, 3, 1), (3, 0, 1):
    image, scope = torch.ones(1, channels, 5, 5), torch.ones(out_channels, channels // 2, 4, 4)
    sizes["groups"] = groups
    survive(torch.ops.dk_detectron.deform_kernel_conv2d, image, scope, None, offset, None, **sizes)
    survive(backward, image, image, scope, offset, None, output_mask=[True] * 3 + [False], **sizes)
for size in (0, 5), (5, 0), (0, 0):
    image, scope = torch.ones(1, 64, *size), torch.ones(64, 1, 3, 3)
    offset = torch.ones(1, 18, size[0] + 2, size[1] + 2)
    for offsets in (offset, None), (None, offset), (offset, offset):
        survive(deform_kernel_conv2d, image, scope, None, *offsets,
                kernel_size=3, padding=2, groups=64)
"""


@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "depthwise"])
def test_no_memory_for_a_kernel_is_an_error(groups, capfd):
    """Tables of 400 million taps, with room for a gibibyte."""
    case = Case(
        batch=1, channels=2, groups=groups, size=(1, 1), scope=(1, 1), kernel=(20000, 20000)
    )
    case = replace(case, padding=(10000, 10000), stride=(2, 2))
    tensors = replace(case, kernel=(1, 1), padding=(0, 0)).tensors(torch.float32)
    tensors["kernel_offset"] = torch.zeros(()).expand(1, 2 * 20000**2, 1, 1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))
    try:
        with pytest.raises(RuntimeError) as error:
            compiled(**tensors, **case.arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    said = f"{error.value} {capfd.readouterr().err}"  # where torch 2.10 has what a thread threw
    assert re.search("bytes of memory .* got none: use fewer threads", said)


def test_no_call_kills_the_interpreter():
    """A gradient of an absent offset, no channels, an empty image: an error or a result.

    In a process of its own, so that a crash is a failed test.
    """
    result = python("-c", HOSTILE_CALLS)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"


# ---- tensors without values ----------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4])
@every_offset
def test_the_meta_device(which, groups):
    """Which has no autocast to ask for. Shapes and formats go through the operator there."""
    case = Case(channels=4, groups=groups, **which)
    tensors = case.tensors(torch.float32)
    results = [
        deform_kernel_conv2d(
            **{name: t if t is None else t.to(device) for name, t in tensors.items()},
            **case.arguments,
        )
        for device in ("cpu", "meta")
    ]
    assert results[1].is_meta
    assert results[0].shape == results[1].shape and results[0].stride() == results[1].stride()


# ---- an extension that does not load -------------------------------------------------------------


class Installed:
    """A distribution, of which ``explain`` asks where its package is."""

    def __init__(self, folder: Path):
        self.folder = folder

    def locate_file(self, name: str) -> Path:
        return self.folder / name


@pytest.mark.parametrize("compiled", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_what_is_wrong_with_an_extension(place, compiled, tmp_path, monkeypatch):
    """A clone hides an installation only if that is elsewhere, and has operators."""
    package = tmp_path / place / "dk_detectron"
    package.mkdir(parents=True)
    if compiled:
        (package / "_C.abi3.so").touch()
    monkeypatch.setattr(library, "PACKAGE", (tmp_path / "here" / "dk_detectron").resolve())
    monkeypatch.setattr(library, "distributions", lambda name: [Installed(package.parent)])
    told = library.explain(ImportError("no such symbol"))
    if compiled and place == "elsewhere":
        assert f"hides the installed {package.resolve()}: start Python in another folder" in told
    else:
        assert told.startswith("dk_detectron._C, the compiled operators, is missing, or does not")
        assert "no such symbol. Build it" in told

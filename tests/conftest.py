"""What every operator test shares: devices, seed, tolerances, and random configurations."""

import math
import re
from dataclasses import dataclass, fields

import extension  # noqa: F401  (first: it may stand in for dk_detectron._C)
import fuzzing
import pytest
import torch
from torch import Tensor

fuzzing.register_profiles()

_CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)


DEVICES = ["cpu", _CUDA]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


# Files of more than half a minute, from the longest on. Processes share whole files and start with
# these, so that none is left alone with one in the end.
LONG = (
    "csrc_ptx ops engine export modeling engine_classification engine_faults ops_integration "
    "csrc_emulated layers_compiled engine_divergence weights layers_start commands "
    "engine_prediction ops_derivatives"
).split()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """In what the fixtures of a file compute as well: with two, sums round differently."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Long files first. Spares the emulated kernels the tests that never call them."""
    without_kernel = re.compile("composed|sample_kernel|neither")
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items[:] = sorted(
        (
            item
            for item in items
            if "emulated-" not in item.name or not without_kernel.search(item.name)
        ),
        key=lambda item: order.get(item.path.stem, len(LONG)),
    )


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    torch.manual_seed(0)
    # The tensors are small: on a busy machine, threads would mostly wait for each other.
    torch.set_num_threads(1)
    # TF32 has ten bits of mantissa, which no float32 tolerance forgives.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def deterministic(request):
    """As asked of torch: every sum in one order, and what nothing has written to is NaN.

    An indirect parameter of False: not.
    """
    torch.use_deterministic_algorithms(getattr(request, "param", True))
    yield
    torch.use_deterministic_algorithms(False)


# The offsets of a Case, and the two paths of the compiled operator for its three channels:
# depthwise has direct kernels, dense goes through a matrix product.
NEITHER = {"kernel_offset": False, "data_offset": False}
KERNEL = {"kernel_offset": True, "data_offset": False}
DATA = {"kernel_offset": False, "data_offset": True}
BOTH = {"kernel_offset": True, "data_offset": True}
every_offset = pytest.mark.parametrize(
    "which", [KERNEL, DATA, BOTH], ids=["kernel", "data", "both"]
)
every_path = pytest.mark.parametrize("groups", [3, 1], ids=["depthwise", "dense"])

# (rtol, atol): the defaults of torch.testing.assert_close.
TOLERANCES = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}
# The composed operator rounds columns and coefficients to the type of the activations, as the CUDA
# kernels round columns, and so do the gradients, also those of float32 offsets: two units in the
# last place of the largest value. In float32, four, for sums over many channels that cancel.
ROUNDED_SUMMANDS = {torch.float16: 2 * 2**-10, torch.bfloat16: 2 * 2**-7, torch.float32: 4 * 2**-22}
# What tensor cores sum (csrc/cuda/backward_matrix.cuh) is of bfloat16. Products of the activations
# and their gradients are rounded to one such number if they are of bfloat16, to two, which have 16
# bits, if they are of float16: twice the error of that, again of the largest value.
MATRIX_SUMMANDS = {torch.float16: 2 * 2**-17, torch.bfloat16: 2 * 2**-9}


def assert_close(actual, expected, summands: torch.dtype | float | None = None) -> None:
    """Compares tensors or dicts of them, at the tolerance of the actual one's type.

    Args:
        summands: the type that the operator rounds its summands to, if they are not exact; or what
            may be lost of the largest value.
    """
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for name in actual:
            try:
                assert_close(actual[name], expected[name], summands)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        return
    rtol, atol = TOLERANCES[actual.dtype]
    if summands is not None and expected.numel():
        share = summands if isinstance(summands, float) else ROUNDED_SUMMANDS[summands]
        atol = share * expected.nan_to_num().abs().max().item()
    torch.testing.assert_close(
        actual, expected.to(actual.dtype), rtol=rtol, atol=atol, equal_nan=True
    )


def assert_close_to_exact(actual: dict, expected: dict, case: "Case") -> None:
    """Of the CUDA kernels' results: at the tolerance that the kernel needs."""
    dtype = actual["output"].dtype
    if not case.depthwise and dtype in ROUNDED_SUMMANDS:
        return assert_close(actual, expected, summands=dtype)
    usual = {"output", "grad_input"} if dtype == torch.bfloat16 else {"output"}
    if not case.on_tensor_cores(dtype):
        usual = set(actual)
    assert_close(*({name: r[name] for name in usual & r.keys()} for r in (actual, expected)))
    others = ({name: r[name] for name in r.keys() - usual} for r in (actual, expected))
    assert_close(*others, summands=MATRIX_SUMMANDS.get(dtype))


def off_knot_offset(shape, spread: float = 3.0, **options) -> Tensor:
    """Uniform in ±spread, on odd multiples of 1/32.

    Every type down to bfloat16 holds them exactly and no location falls on a cell, where a rounding
    error would choose the other side's derivative.
    """
    steps = int(16 * spread)
    return (torch.randint(-steps, steps, shape) + 0.5).div(16).to(**options)


@dataclass(frozen=True)
class Case:
    """One configuration of deform_kernel_conv2d, depthwise unless `groups` says otherwise."""

    batch: int = 2
    channels: int = 3
    out_channels: int | None = None
    groups: int | None = None
    size: tuple[int, int] = (6, 7)
    scope: tuple[int, int] = (4, 4)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    clip: bool = True
    bias: bool = True
    kernel_offset: bool = True
    data_offset: bool = False
    modulated: bool = False

    def __str__(self) -> str:
        """Only what is not the default: a test's id."""
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "default"

    @property
    def arguments(self) -> dict:
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.channels if self.groups is None else self.groups,
            "clip": self.clip,
        }

    @property
    def depthwise(self) -> bool:
        return self.groups in (None, self.channels) and self.out_channels in (None, self.channels)

    def in_registers(self, dtype: torch.dtype) -> bool:
        """Whether the CUDA kernel makes columns there."""
        offsets = self.kernel_offset and not self.data_offset
        outputs = self.out_channels or self.channels
        vectors = dtype.itemsize == 2 and self.channels % 8 == 0 and outputs % 8 == 0
        sizes = math.prod(self.kernel) <= 9 and max(self.scope) <= 4
        factors = not self.modulated or dtype == torch.bfloat16  # some are too small for float16
        return self.groups == 1 and offsets and vectors and sizes and factors

    def on_tensor_cores(self, dtype: torch.dtype) -> bool:
        """Whether the CUDA kernels of the gradients are those, if all tensors are aligned."""
        unit = ((1, 1), (1, 1)) == (self.stride, self.dilation)
        offsets = self.kernel_offset and not self.data_offset and not self.modulated
        vectors = self.channels % 8 == 0 and dtype.itemsize == 2
        sizes = self.kernel == (3, 3) and self.scope in [(3, 3), (4, 4)]
        return self.depthwise and unit and offsets and vectors and sizes

    @property
    def output_size(self) -> tuple[int, int]:
        return tuple(
            (self.size[a] + 2 * self.padding[a] - self.dilation[a] * (self.kernel[a] - 1) - 1)
            // self.stride[a]
            + 1
            for a in range(2)
        )

    def tensors(self, dtype=torch.float64, device="cpu") -> dict[str, Tensor | None]:
        options = {"dtype": dtype, "device": device}
        out_channels = self.out_channels or self.channels
        fan_in = self.channels // self.arguments["groups"]
        taps = self.kernel[0] * self.kernel[1]

        def offset(factors: bool = True) -> Tensor:
            moved = off_knot_offset((self.batch, 2 * taps, *self.output_size), **options)
            if not (self.modulated and factors):
                return moved
            factors = off_knot_offset((self.batch, taps, *self.output_size), 1.5, **options)
            return torch.cat([moved, factors], 1)

        return {
            "input": torch.randn(self.batch, self.channels, *self.size).to(**options),
            "weight": torch.randn(out_channels, fan_in, *self.scope).to(**options),
            "bias": torch.randn(out_channels).to(**options) if self.bias else None,
            "kernel_offset": offset(not self.data_offset) if self.kernel_offset else None,
            "data_offset": offset() if self.data_offset else None,
        }


ODD = {"size": (8, 9), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
# In 16 bits, columns that are never in memory: tiles of outputs and of pixels that are not full,
# and several of each; every size of scope, other taps than 3x3.
DENSE = [
    Case(channels=8, out_channels=8, groups=1),
    Case(batch=3, channels=24, out_channels=72, groups=1, size=(9, 17), padding=(0, 2)),
    Case(channels=16, out_channels=64, groups=1, scope=(3, 3), clip=False, bias=False),
    Case(channels=8, out_channels=136, groups=1, scope=(2, 4), size=(5, 3)),
    Case(channels=16, out_channels=24, groups=1, modulated=True, size=(8, 9)),
    Case(channels=8, out_channels=8, groups=1, scope=(4, 2), kernel=(2, 3), clip=False, **ODD),
    Case(channels=16, out_channels=8, groups=1, scope=(2, 2), kernel=(1, 1), padding=(0, 0)),
    Case(channels=8, out_channels=16, groups=1, scope=(1, 4), kernel=(1, 9), padding=(0, 4)),
    Case(channels=8, out_channels=8, groups=1, size=(9, 10), stride=(4, 5), padding=(3, 4)),
]


def run(function, tensors, arguments, grad_output=None) -> dict[str, Tensor]:
    """The output of a call and the gradient of each tensor in it.

    The default `grad_output` is random, the same for every call, and exact in every type.
    """
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_()
        for name, tensor in tensors.items()
    }
    output = function(**leaves, **arguments)
    if grad_output is None:
        generator = torch.Generator().manual_seed(1)
        grad_output = torch.randint(-8, 9, output.shape, generator=generator).to(output) / 4
    present = {f"grad_{name}": leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(
        output, list(present.values()), grad_output, materialize_grads=True
    )
    return {"output": output.detach(), **dict(zip(present, gradients, strict=True))}


def double(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.double() for name, t in tensors.items()}

"""The operator on whatever shapes, types and offsets: the oracle's values, or an error of ours."""

import math
import re
import traceback

import numpy as np
import reference
import torch
from conftest import Case, assert_close, double, run
from fuzzing import ANYTHING, OPERATORS, PACKAGE, cases
from hypothesis import event, find
from hypothesis import strategies as st

from dk_detectron.ops import deform_kernel_conv2d

HALVES = torch.float16, torch.bfloat16
LAYOUTS = {
    "NCHW": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}
HOSTILE = [-1e9, 1e9, math.inf, -math.inf, math.nan, 0.0, -0.0, 65504.0, 1e-7]


def pairs(low: int, high: int):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def configurations(draw) -> Case:
    """Also those whose output is empty."""
    groups, fan_in, fan_out = (draw(st.integers(1, most)) for most in (5, 3, 2))
    if draw(st.booleans()):
        fan_in = fan_out = 1  # depthwise
    kernel, dilation, padding = draw(pairs(1, 4)), draw(pairs(1, 3)), draw(pairs(0, 3))
    reach = [dilation[a] * (kernel[a] - 1) + 1 - 2 * padding[a] for a in range(2)]
    size = tuple(max(1, reach[a]) + draw(st.integers(0, 5)) for a in range(2))
    has_kernel_offset = draw(st.booleans())
    return Case(
        batch=draw(st.integers(0, 3)),
        channels=groups * fan_in,
        out_channels=groups * fan_out,
        groups=groups,
        size=size,
        # Without offsets the scope is the kernel.
        scope=draw(pairs(1, 6)) if has_kernel_offset else kernel,
        kernel=kernel,
        stride=draw(pairs(1, 3)),
        padding=padding,
        dilation=dilation,
        clip=draw(st.booleans()),
        bias=draw(st.booleans()),
        kernel_offset=has_kernel_offset,
        data_offset=draw(st.booleans()) or not has_kernel_offset,
        modulated=draw(st.booleans()),
    )


@cases(
    OPERATORS,
    0.9,
    case=configurations(),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, *HALVES]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    hostile=st.lists(st.tuples(st.sampled_from(HOSTILE), st.integers(0, 10**6)), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients(case, dtype, layout, hostile, seed):
    torch.manual_seed(seed)
    tensors = case.tensors(dtype)
    tensors["input"] = LAYOUTS[layout](tensors["input"])
    offsets = [t for name, t in tensors.items() if "offset" in name and t is not None and t.numel()]
    for value, place in hostile if offsets else ():
        # Of an infinite factor nothing is promised, as of an infinite weight.
        moved = offsets[place % len(offsets)][:, : 2 * case.kernel[0] * case.kernel[1]]
        moved[np.unravel_index(place % moved.numel(), moved.shape)] = value
    depthwise = case.groups == case.channels == case.out_channels
    event(f"{'depthwise' if depthwise else 'dense or grouped'}, {dtype}")
    actual = run(deform_kernel_conv2d, tensors, case.arguments)
    expected = run(reference.deform_kernel_conv2d, double(tensors), case.arguments)
    if any(t.isnan().any() for t in offsets):  # whose gradients mean nothing
        actual, expected = ({"output": found["output"]} for found in (actual, expected))
    assert_close(actual, expected, summands=dtype if dtype in HALVES else None)


SIZES = "kernel_size", "stride", "padding", "dilation", "groups"
SHAPES = st.lists(st.integers(0, 5), max_size=5)


def check_refused(error: Exception) -> None:
    """It is ours, and says which argument it is about."""
    event("refused")
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    assert raised_in.startswith(PACKAGE), repr(error)
    assert re.match(r"[a-z_]+(, [a-z_]+)*: ", str(error)), repr(error)


@cases(
    OPERATORS,
    0.05,
    name=st.sampled_from(SIZES),
    value=st.sampled_from([0, -1, 2**31, 2**62, 1.5, (1, 2, 3), (2**40, 1), (0, 1)]) | ANYTHING,
)
def test_sizes_of_any_kind(name, value):
    case = Case(batch=1, size=(4, 4))
    try:
        output = deform_kernel_conv2d(**{**case.tensors(), **case.arguments, name: value})
    except (TypeError, ValueError) as error:
        check_refused(error)
        return
    event("computed")
    assert output.dim() == 4 and len(output) == 1


@cases(
    OPERATORS,
    0.05,
    name=st.sampled_from(["input", "weight", "bias", "kernel_offset", "data_offset"]),
    shape=SHAPES,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.int64, torch.bool]),
)
def test_tensors_of_any_shape(name, shape, dtype):
    case = Case(size=(4, 4), data_offset=True)
    tensors = {**case.tensors(), name: torch.zeros(shape, dtype=dtype)}
    try:
        output = deform_kernel_conv2d(**tensors, **case.arguments)
    except (TypeError, ValueError) as error:
        check_refused(error)
        return
    event("computed")
    assert output.shape[1] == 3


def test_the_configurations_have_every_kind():
    """Of those that `make test` draws: what the property is about does occur."""
    find(configurations(), lambda c: c.groups == c.channels and 0 in (c.batch, *c.output_size))
    find(configurations(), lambda c: c.groups < c.channels and c.data_offset and c.kernel_offset)

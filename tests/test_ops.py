"""The operators against the oracle, known identities, their stated conventions, and bad input."""

import itertools
import random
import warnings
from functools import cache

import pytest
import reference
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    BOTH,
    DATA,
    DEVICES,
    KERNEL,
    NEITHER,
    Case,
    assert_close,
    double,
    every_offset,
    every_path,
    off_knot_offset,
    run,
)
from emulation import plugin

from dk_detectron.ops import (
    composed_deform_kernel_conv2d,
    deform_kernel_conv2d,
    dispatch,
    implementation,
    sample_kernel,
)

compiled = torch.ops.dk_detectron.deform_kernel_conv2d
compiled_backward = torch.ops.dk_detectron.deform_kernel_conv2d_backward

INFINITY = float("inf")

every_implementation = pytest.mark.parametrize(
    "function",
    [
        pytest.param(deform_kernel_conv2d, id="compiled"),
        pytest.param(composed_deform_kernel_conv2d, id="composed"),
    ],
)
every_offset_or_none = pytest.mark.parametrize(
    "which", [NEITHER, KERNEL, DATA, BOTH], ids=["neither", "kernel", "data", "both"]
)
every_clip = pytest.mark.parametrize("clip", [True, False], ids=["clip", "open"])
# Depthwise, one group, some groups, and a channel multiplier, which is depthwise in name only.
GROUPINGS = [
    {"channels": 4},
    {"channels": 4, "out_channels": 5, "groups": 1},
    {"channels": 4, "out_channels": 6, "groups": 2},
    {"channels": 3, "out_channels": 6, "groups": 3},
]
every_grouping = pytest.mark.parametrize(
    "grouping", GROUPINGS, ids=["depthwise", "dense", "grouped", "multiplier"]
)


@pytest.fixture(
    params=[*DEVICES, *(pytest.param(order, id=f"emulated-{order}") for order in plugin.ORDERS)]
)
def device(request):
    """Also the CUDA sources, emulated for tensors of the CPU in every order of their threads."""
    if request.param not in plugin.ORDERS:
        yield request.param
        return
    with plugin.emulated_cuda(request.param):
        yield "cpu"


# For hundreds of calls, or sums of thousands, whose claim is none of the order's.
in_one_order = pytest.mark.parametrize(
    "device",
    [*DEVICES, pytest.param(plugin.ORDERS[0], id=f"emulated-{plugin.ORDERS[0]}")],
    indirect=True,
)


@pytest.fixture
def same_sums(device, request):
    """Bit for bit the same also where, on CUDA, atomics would add in any order."""
    if device == "cuda":
        request.getfixturevalue("deterministic")


ASYMMETRIC = {"size": (8, 9), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def scope_locations(kernel_offset, case):
    """Where the taps of a Case lie in its scope, and the last cell there: both [N, 2*K, ...]."""
    taps = list(itertools.product(*map(range, case.kernel)))
    rest = [(case.scope[a] - case.kernel[a]) / 2 + tap[a] for tap in taps for a in range(2)]
    last = [case.scope[a] - 1 for _ in taps for a in range(2)]
    shape = [-1] + [1] * (kernel_offset.dim() - 2)
    rest, last = (torch.tensor(t).to(kernel_offset).view(shape) for t in (rest, last))
    return kernel_offset + rest, last.expand_as(kernel_offset)


def folded_inside(kernel_offset, case):
    """An offset like the given one whose taps all lie inside the scope: nothing is clipped."""
    location, last = scope_locations(kernel_offset, case)
    return kernel_offset - location + location % last


@cache
def known_on_cpu(case, dtype, seed, moved):
    torch.manual_seed(seed)
    tensors = case.tensors(dtype) if moved is None else with_one_offset(case, *moved, "cpu")
    return tensors, run(reference.deform_kernel_conv2d, double(tensors), case.arguments)


def known(case, dtype, device, seed=0, moved=None):
    """Tensors, and what the oracle makes of them, once for all devices and orders of threads.

    Args:
        moved: an offset, as of :func:`with_one_offset`.
    """
    return (
        {name: None if t is None else t.to(device) for name, t in given.items()}
        for given in known_on_cpu(case, dtype, seed, moved)
    )


def check_against_oracle(
    case, dtype=torch.float64, device="cpu", function=deform_kernel_conv2d, summands=None, seed=0
):
    tensors, expected = known(case, dtype, device, seed)
    assert_close(run(function, tensors, case.arguments), expected, summands)


# ---- by hand -------------------------------------------------------------------------------------


@every_implementation
def test_kernel_offset_by_hand(function, device):
    """Four pixels read a 2x2 scope at its first cell, last cell, centre, and clipped at row 1."""
    options = {"dtype": torch.float64, "device": device}
    tensors = {
        "input": torch.tensor([[[[1, 2], [3, 4]]]], **options),
        "weight": torch.tensor([[[[10, 20], [30, 40]]]], **options),
        "bias": torch.tensor([1000], **options),
        "kernel_offset": torch.tensor([[[[-0.5, 0.5], [0, 9]], [[-0.5, 0.5], [0, 0]]]], **options),
        "data_offset": None,
    }
    expected = {
        "output": [[[[1010, 1080], [1075, 1140]]]],
        "grad_input": [[[[10, 40], [25, 35]]]],
        "grad_weight": [[[[1.75, 0.75], [2.75, 4.75]]]],
        "grad_bias": [4],
        "grad_kernel_offset": [[[[20, 40], [60, 80]], [[10, 20], [30, 40]]]],
    }
    arguments = Case(channels=1, kernel=(1, 1), padding=(0, 0)).arguments
    ones = torch.ones(1, 1, 2, 2, **options)
    assert_close(
        run(function, tensors, arguments, ones),
        {name: torch.tensor(value, **options) for name, value in expected.items()},
    )


@every_implementation
def test_data_offset_by_hand(function, device):
    """Four pixels read between two rows, past the right edge, half past the left, and in place."""
    options = {"dtype": torch.float64, "device": device}
    tensors = {
        "input": torch.tensor([[[[1, 2], [3, 4]]]], **options),
        "weight": torch.tensor([[[[2]]]], **options),
        "bias": None,
        "kernel_offset": None,
        "data_offset": torch.tensor([[[[0.5, 0], [-0.5, 0]], [[0, 1], [-0.5, 0]]]], **options),
    }
    expected = {
        "output": [[[[4, 0], [2, 8]]]],
        "grad_input": [[[[1.5, 0], [1.5, 2]]]],
        "grad_weight": [[[[7]]]],
        "grad_data_offset": [[[[4, 0], [2, -8]], [[2, 0], [4, -8]]]],
    }
    arguments = Case(channels=1, kernel=(1, 1), padding=(0, 0)).arguments
    ones = torch.ones(1, 1, 2, 2, **options)
    assert_close(
        run(function, tensors, arguments, ones),
        {name: torch.tensor(value, **options) for name, value in expected.items()},
    )


# ---- identities ----------------------------------------------------------------------------------


def convolve(tensors, case, kernel):
    arguments = {k: v for k, v in case.arguments.items() if k not in ("kernel_size", "clip")}
    return F.conv2d(tensors["input"], kernel, tensors["bias"], **arguments)


@every_implementation
@every_offset_or_none
@every_grouping
def test_zero_offset_and_scope_of_kernel_size_is_a_convolution(function, which, grouping, device):
    case = Case(scope=(3, 2), kernel=(3, 2), **which, **grouping, **ASYMMETRIC)
    tensors = case.tensors(device=device)
    for name in "kernel_offset", "data_offset":
        if tensors[name] is not None:
            tensors[name].zero_()
    assert_close(function(**tensors, **case.arguments), convolve(tensors, case, tensors["weight"]))


@every_grouping
@pytest.mark.parametrize("which", [NEITHER, KERNEL], ids=["absent", "zero"])
def test_rest_positions_of_four_by_four_average_two_by_two(which, grouping, device):
    case = Case(**which, **grouping)
    tensors = case.tensors(device=device)
    if tensors["kernel_offset"] is not None:
        tensors["kernel_offset"].zero_()
    average = F.avg_pool2d(tensors["weight"], 2, stride=1)
    assert_close(
        deform_kernel_conv2d(**tensors, **case.arguments), convolve(tensors, case, average)
    )


@every_implementation
@every_grouping
def test_integer_kernel_offset_picks_cells(function, grouping, device):
    case = Case(scope=(5, 7), **grouping)
    tensors = case.tensors(device=device)
    row, column = torch.randint(5, (9,)), torch.randint(7, (9,))
    tap = torch.arange(9)
    offset = torch.stack([row - 1 - tap // 3, column - 2 - tap % 3], 1).flatten()
    tensors["kernel_offset"] = (
        offset.to(tensors["input"]).view(1, 18, 1, 1).expand_as(tensors["kernel_offset"])
    )
    picked = tensors["weight"][:, :, row, column].unflatten(2, (3, 3))
    assert_close(function(**tensors, **case.arguments), convolve(tensors, case, picked))


@every_implementation
@every_grouping
@pytest.mark.parametrize("integer", [False, True], ids=["fractional", "integer"])
def test_data_offset_alone_is_torchvision(function, grouping, integer, device):
    """All gradients too, also at integer locations and across the border of the image."""
    case = Case(scope=(3, 2), kernel=(3, 2), **DATA, **grouping, **ASYMMETRIC)
    tensors = case.tensors(device=device)
    tensors["data_offset"] = 2 * tensors["data_offset"]
    if integer:
        tensors["data_offset"].floor_()

    def torchvision_conv2d(input, weight, bias, kernel_offset, data_offset):
        return torchvision.ops.deform_conv2d(
            input, data_offset, weight, bias, case.stride, case.padding, case.dilation
        )

    expected = run(torchvision_conv2d, tensors, {})
    assert_close(run(function, tensors, case.arguments), expected)


@every_clip
@every_implementation
@every_grouping
def test_global_kernel_is_the_local_one_with_one_offset(function, grouping, clip, device):
    """One image: sample_kernel and a convolution, or the offset repeated at every location."""
    case = Case(batch=1, scope=(4, 6), clip=clip, **grouping, **ASYMMETRIC)
    tensors = case.tensors(device=device)
    tensors["kernel_offset"] = off_knot_offset((1, 18)).to(tensors["input"])

    def global_kernel(input, weight, bias, kernel_offset, data_offset):
        kernel = sample_kernel(weight, kernel_offset, case.kernel, clip=clip)[0]
        return convolve({"input": input, "bias": bias}, case, kernel)

    def local_kernel(kernel_offset, **others):
        everywhere = kernel_offset[..., None, None].expand(-1, -1, *case.output_size)
        return function(kernel_offset=everywhere, **others, **case.arguments)

    actual, expected = run(local_kernel, tensors, {}), run(global_kernel, tensors, {})
    if clip:  # Clipped taps differ: the sum over the locations decides, or each of them for itself.
        location, last = scope_locations(tensors["kernel_offset"], case)
        outside = (location < 0) | (location > last)
        assert 0 < outside.sum() < outside.numel()
        for gradients in actual, expected:
            gradients["grad_kernel_offset"][outside] = 0
    assert_close(actual, expected)


# ---- the oracle ----------------------------------------------------------------------------------

GEOMETRIES = [
    {"batch": 0},
    {"batch": 1, "bias": False},
    {"batch": 33, "size": (3, 4)},
    {"size": (5, 37)},
    # Enough pixels per cell for many blocks of the weight gradient.
    {"batch": 3, "size": (20, 11), "scope": (2, 1), "kernel": (1, 1), "padding": (0, 0)},
    {"scope": (3, 3)},
    {"scope": (2, 1)},
    {"scope": (9, 5)},
    {"scope": (2, 2), "kernel": (1, 1), "padding": (0, 0)},
    {"scope": (1, 3), "kernel": (1, 1), "padding": (2, 0)},
    {"scope": (6, 4), "kernel": (5, 3), "padding": (2, 0)},
    {"scope": (8, 7), "kernel": (5, 5), "size": (7, 5), "padding": (1, 4)},
    {"scope": (2, 6), "kernel": (1, 5), "padding": (0, 2)},
    {"scope": (3, 4), "kernel": (2, 3), **ASYMMETRIC},
    {"size": (12, 8), "stride": (3, 2), "padding": (0, 5), "dilation": (2, 3)},
    {"size": (1, 1), "padding": (4, 3), "stride": (1, 2)},
]


@every_clip
@every_offset_or_none
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: str(Case(**geometry)))
def test_oracle(geometry, which, clip, device):
    check_against_oracle(Case(clip=clip, **which, **geometry), device=device)


@every_clip
@every_implementation
@every_offset
@every_grouping
@pytest.mark.parametrize("geometry", [{}, {"batch": 0}, ASYMMETRIC], ids=["same", "empty", "odd"])
def test_groupings(geometry, grouping, which, function, clip, device):
    scope = (4, 5) if which["kernel_offset"] else (3, 3)
    case = Case(scope=scope, clip=clip, **which, **grouping, **geometry)
    check_against_oracle(case, device=device, function=function)


@every_clip
@every_offset_or_none
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: str(Case(**geometry)))
def test_oracle_of_dense_convolutions(geometry, which, clip, device):
    check_against_oracle(
        Case(out_channels=4, groups=1, clip=clip, **which, **geometry), device=device
    )


# ---- factors of the taps -------------------------------------------------------------------------


@every_clip
@every_implementation
@every_offset
@every_grouping
@pytest.mark.parametrize(
    "geometry", [{}, {"size": (5, 19)}, ASYMMETRIC], ids=["same", "wide", "odd"]
)
def test_modulation(geometry, grouping, which, function, clip, device):
    scope = (4, 5) if which["kernel_offset"] else (3, 3)
    case = Case(scope=scope, clip=clip, modulated=True, **which, **grouping, **geometry)
    check_against_oracle(case, device=device, function=function)


@every_offset
@pytest.mark.parametrize("channels", [(17, 17, 17), (130, 130, 130), (20, 7, 1)], ids=str)
def test_modulated_channels(channels, which, device):
    names = "channels", "out_channels", "groups"
    case = Case(modulated=True, **dict(zip(names, channels, strict=True)), **which)
    check_against_oracle(case, torch.float32, device, summands=torch.float32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@every_path
@every_offset
def test_factors_of_one_and_zero(which, groups, layout, device, same_sums):
    """Of one: bit for bit as without. Of zero: nothing but the bias, and no gradient but theirs."""
    case = Case(groups=groups, **which)
    tensors = case.tensors(torch.float32, device)
    tensors["input"] = tensors["input"].contiguous(memory_format=layout)
    names = [name for name in ("kernel_offset", "data_offset") if which[name]]
    plain = run(deform_kernel_conv2d, tensors, case.arguments)

    def with_factors(value):
        factors = torch.full_like(tensors[names[0]][:, :9], value)
        given = {names[-1]: torch.cat([tensors[names[-1]], factors], 1)}
        return run(deform_kernel_conv2d, tensors | given, case.arguments)

    ones, zeros = with_factors(1.0), with_factors(0.0)
    for name in names:
        assert torch.equal(ones[f"grad_{name}"][:, :18], plain[f"grad_{name}"])
        assert not zeros[f"grad_{name}"][:, :18].any()
    assert torch.equal(ones["output"], plain["output"])
    assert torch.equal(ones["grad_input"], plain["grad_input"])
    assert torch.equal(ones["grad_weight"], plain["grad_weight"])
    bias = tensors["bias"].view(-1, 1, 1).expand_as(zeros["output"])
    assert torch.equal(zeros["output"], bias)
    assert not zeros["grad_input"].any() and not zeros["grad_weight"].any()


def test_modulated_data_is_torchvision(device):
    case = Case(channels=4, groups=2, out_channels=6, scope=(3, 3), modulated=True, **DATA)
    tensors = case.tensors(device=device)
    offset, mask = tensors["data_offset"][:, :18], tensors["data_offset"][:, 18:]
    expected = torchvision.ops.deform_conv2d(
        tensors["input"], offset, tensors["weight"], tensors["bias"], padding=1, mask=mask
    )
    assert_close(deform_kernel_conv2d(**tensors, **case.arguments), expected)


# ---- offset groups -------------------------------------------------------------------------------


@every_offset
@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize(
    "groups", [(8, 8, 2), (8, 8, 8), (8, 6, 1), (8, 4, 4)], ids=lambda g: "-".join(map(str, g))
)
def test_offset_groups(groups, modulated, which):
    """As the oracle, where every input channel is a convolution of its own with its offsets."""
    channels, out_channels, conv_groups = groups
    names = {"channels": channels, "out_channels": out_channels, "groups": conv_groups}
    # Open, since all channels of a group decide together whether a clipped tap may come back.
    case = Case(scope=(3, 3), clip=False, modulated=modulated, **which, **names)
    tensors, other = case.tensors(), case.tensors()
    for name in "kernel_offset", "data_offset":
        if tensors[name] is not None:
            tensors[name] = torch.cat([tensors[name], other[name]], 1)

    def by_hand(input, weight, bias, kernel_offset, data_offset, **arguments):
        fan_in, fan_out = channels // conv_groups, out_channels // conv_groups
        output = bias[:, None, None].repeat(len(input), 1, *case.output_size)
        for c in range(channels):
            group = 2 * c // channels
            offsets = [
                None if o is None else o.chunk(2, 1)[group] for o in (kernel_offset, data_offset)
            ]
            first = c // fan_in * fan_out
            part = reference.deform_kernel_conv2d(
                input[:, c : c + 1], weight[first : first + fan_out, c % fan_in, None], None,
                *offsets, **{**arguments, "groups": 1},
            )  # fmt: skip
            output = torch.cat(
                [
                    output[:, :first],
                    output[:, first : first + fan_out] + part,
                    output[:, first + fan_out :],
                ],
                1,
            )
        return output

    expected = run(by_hand, tensors, case.arguments)
    for layout in torch.contiguous_format, torch.channels_last:
        tensors["input"] = tensors["input"].contiguous(memory_format=layout)
        found = run(deform_kernel_conv2d, tensors, case.arguments | {"offset_groups": 2})
        assert_close(found, expected)
        output = deform_kernel_conv2d(**tensors, **case.arguments, offset_groups=2)
        assert output.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset_groups": 3}, "offset_groups: expected a divisor of the 8 input channels, got 3"),
        ({"offset_groups": 0}, "offset_groups: expected a divisor of the 8 input channels, got 0"),
        ({"offset_groups": 8}, "offset_groups: expected a divisor of the 4 groups, got 8"),
        ({"weight": torch.zeros(7, 2, 4, 4)}, "weight: 7 output channels do not divide into 4"),
        ({"bias": torch.zeros(7)}, r"bias: expected \[8\], got \[7\]"),
        ({"kernel_offset": torch.zeros(2, 19, 6, 7)}, r"kernel_offset: .* got \[2, 19, 6, 7\]"),
        ({"kernel_offset": torch.zeros(2, 18, 6, 7)}, r"kernel_offset: .* got \[2, 9, 6, 7\]"),
    ],
)
def test_bad_offset_groups(change, message):
    case = Case(channels=8, groups=4)
    tensors = case.tensors(torch.float32)
    call = {**tensors, "kernel_offset": torch.zeros(2, 36, 6, 7), **case.arguments}
    with pytest.raises(ValueError, match=message):
        deform_kernel_conv2d(**call | {"offset_groups": 2} | change)


# ---- channels ------------------------------------------------------------------------------------


# In, out, groups: vectors, fours and single channels, within a group and across blocks of 64 and
# 128; output channels across panels of 64, and more than a product takes at once.
CHANNELS_OF_GROUPS = [
    (1, 3, 1), (8, 8, 1), (17, 5, 1), (130, 7, 1), (144, 8, 2), (192, 12, 6), (60, 60, 20),
    (261, 6, 3), (70, 67, 1), (20, 260, 2), (3, 530, 1),
]  # fmt: skip


@every_offset
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels", CHANNELS_OF_GROUPS, ids=str)
def test_channels_of_groups(channels, dtype, which, device):
    names = "channels", "out_channels", "groups"
    case = Case(size=(3, 18), **dict(zip(names, channels, strict=True)), **which)
    rounded = dtype if dtype == torch.float32 else None
    check_against_oracle(case, dtype, device, summands=rounded)


@every_offset
def test_more_pixels_than_a_tile(which, device):
    """Tiles that end within a row and within an image; few pixels, and many cells, in one."""
    check_against_oracle(Case(batch=3, groups=1, size=(17, 23), **which), device=device)
    scope = (19, 23) if which["kernel_offset"] else (3, 3)
    sizes = {"channels": 64, "out_channels": 3, "groups": 1, "size": (9, 11), "scope": scope}
    check_against_oracle(Case(**sizes, **which), device=device)


@every_offset
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 64, 200, 1, (7, 5)),
        (2, 70, 3, 1, (31, 33)),
        (1, 24, 24, 3, (3, 260)),
        (1, 3, 9, 3, (2, 3)),
    ],
    ids=["few pixels", "many", "rows", "fewer than threads"],
)
def test_dense_by_several_threads(sizes, which):
    """The same bits, however the threads share pixels and output channels on a CPU."""
    names = "batch", "channels", "out_channels", "groups", "size"
    case = Case(**dict(zip(names, sizes, strict=True)), **which)
    check_against_oracle(case, torch.float32, summands=torch.float32)
    tensors = case.tensors(torch.float32)
    alone = run(deform_kernel_conv2d, tensors, case.arguments)
    for threads in 2, 3, 8:
        torch.set_num_threads(threads)  # back to one before the next test: conftest.py
        for name, tensor in run(deform_kernel_conv2d, tensors, case.arguments).items():
            assert torch.equal(tensor, alone[name]), f"{name} by {threads} threads"


@every_offset
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 32, 130, 144, 261])
def test_channels(channels, dtype, which, device):
    """Every mixture of vectors, single channels and blocks of them; more than a tile of pixels."""
    check_against_oracle(Case(channels=channels, size=(3, 18), **which), dtype, device)


@every_path
@pytest.mark.parametrize("which", [KERNEL, BOTH], ids=["kernel", "both"])
@pytest.mark.parametrize("scope", [(4, 4), (1, 2), (9, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_wide_kernel_offsets(dtype, scope, which, groups, device):
    """Most taps are clipped, along one axis or both, and some of them get a gradient."""
    case = Case(groups=groups, scope=scope, **which)
    tensors = case.tensors(dtype, device)
    tensors["kernel_offset"] *= 7  # still off the cells
    location, last = scope_locations(tensors["kernel_offset"], case)
    outside = (location < 0) | (location > last)
    assert outside.sum() > 0.5 * outside.numel()
    expected = run(reference.deform_kernel_conv2d, double(tensors), case.arguments)
    turned = expected["grad_kernel_offset"][outside & (last > 0)] != 0
    assert 0.1 < turned.double().mean() < 0.9
    assert_close(run(deform_kernel_conv2d, tensors, case.arguments), expected)


@every_clip
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("scope", [(4, 4), (1, 2), (9, 5)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 5)], ids=str)
def test_sample_kernel(kernel, scope, batch, clip, device):
    options = {"dtype": torch.float64, "device": device}
    tensors = {
        "weight": torch.randn(4, 3, *scope, **options),
        "kernel_offset": off_knot_offset((batch, 2 * kernel[0] * kernel[1]), **options),
    }
    arguments = {"kernel_size": kernel, "clip": clip}
    assert_close(
        run(sample_kernel, tensors, arguments), run(reference.sample_kernel, tensors, arguments)
    )


def random_case(seed: int) -> Case:
    rng = random.Random(seed)

    def pair(low, high):
        return rng.randint(low, high), rng.randint(low, high)

    kernel, padding, dilation = pair(1, 5), pair(0, 4), pair(1, 3)
    smallest = [max(1, dilation[a] * (kernel[a] - 1) + 1 - 2 * padding[a]) for a in range(2)]
    channels = rng.randint(1, 40)
    groups = rng.choice([channels, channels, *(g for g in (1, 2, 3) if channels % g == 0)])
    return Case(
        batch=rng.randint(0, 3),
        channels=channels,
        out_channels=groups * rng.randint(1, 3) if groups < channels else None,
        groups=groups,
        size=(smallest[0] + rng.randint(0, 6), smallest[1] + rng.randint(0, 20)),
        scope=pair(1, 9),
        kernel=kernel,
        stride=pair(1, 3),
        padding=padding,
        dilation=dilation,
        clip=rng.random() < 0.5,
        bias=rng.random() < 0.5,
        kernel_offset=rng.random() < 0.8,
        data_offset=rng.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(60))
def test_fuzz(seed, device):
    case = random_case(seed)
    print(f"torch.manual_seed({seed}); {case!r}")  # what pytest shows if it fails
    check_against_oracle(case, torch.float32 if seed % 2 else torch.float64, device, seed=seed)


# ---- derivatives ---------------------------------------------------------------------------------


def gradcheck(check, function, case, tensors, frozen=()):
    names, tensors = zip(*tensors.items(), strict=True)
    leaves = [
        None if tensor is None else tensor.requires_grad_(name not in frozen)
        for name, tensor in zip(names, tensors, strict=True)
    ]
    assert check(lambda *t: function(**dict(zip(names, t, strict=True)), **case.arguments), leaves)


@in_one_order
@every_clip
@every_implementation
@every_offset
@pytest.mark.parametrize("groups", [2, 1], ids=["depthwise", "dense"])
def test_gradcheck(groups, which, function, clip, device):
    """Where nothing is clipped: there, the gradient of a kernel offset is the derivative."""
    scope = (4, 5) if which["kernel_offset"] else (3, 2)
    sizes = {"size": (3, 4), "scope": scope, "kernel": (3, 2)}
    case = Case(batch=1, channels=2, groups=groups, clip=clip, modulated=True, **sizes, **which)
    tensors = case.tensors(device=device)
    if clip and which["kernel_offset"]:
        tensors["kernel_offset"][:, :12] = folded_inside(tensors["kernel_offset"][:, :12], case)
    gradcheck(torch.autograd.gradcheck, function, case, tensors)


@in_one_order
@every_implementation
@pytest.mark.parametrize("which", [KERNEL, BOTH], ids=["kernel", "both"])
def test_gradcheck_of_all_but_clipped_offsets(which, function, device):
    case = Case(batch=1, channels=2, size=(3, 4), scope=(4, 5), kernel=(3, 2), **which)
    tensors = case.tensors(device=device)
    gradcheck(torch.autograd.gradcheck, function, case, tensors, frozen=["kernel_offset"])


@every_offset
def test_composed_gradgradcheck(which, device):
    scope = (2, 3) if which["kernel_offset"] else (1, 2)
    case = Case(
        batch=1, channels=2, out_channels=3, groups=1,
        size=(2, 3), scope=scope, kernel=(1, 2), padding=(0, 0), modulated=True, **which,
    )  # fmt: skip
    tensors = case.tensors(device=device)
    if which["kernel_offset"]:
        tensors["kernel_offset"][:, :4] = folded_inside(tensors["kernel_offset"][:, :4], case)
    gradcheck(torch.autograd.gradgradcheck, composed_deform_kernel_conv2d, case, tensors)


@every_clip
def test_sample_kernel_gradcheck(clip, device):
    options = {"dtype": torch.float64, "device": device}
    weight, offset = torch.randn(3, 2, 3, 4, **options), off_knot_offset((2, 12), **options)
    if clip:
        offset = folded_inside(offset, Case(scope=(3, 4), kernel=(3, 2)))
    leaves = [weight.requires_grad_(), offset.requires_grad_()]

    def function(*tensors):
        return sample_kernel(*tensors, (3, 2), clip=clip)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def sample_points(function, weight, location, clip=True):
    """What a 1x1 kernel reads at locations [2, points] of scopes [C, S_h, S_w]: [C, points]."""
    channels, *size = weight.shape
    weight = weight.unsqueeze(1)
    offset = location - (location.new_tensor(size).unsqueeze(1) - 1) / 2
    if function is sample_kernel:
        return sample_kernel(weight, offset.t(), 1, clip=clip).flatten(1).t()
    image = weight.new_ones(1, channels, 1, location.shape[1])
    case = Case(channels=channels, kernel=(1, 1), padding=(0, 0), clip=clip)
    offset = offset[None, :, None]
    return function(image, weight, None, offset, None, **case.arguments)[0, :, 0]


def sample_axis(function, cells, location, axis, clip=True):
    """The same along one axis of square scopes, the other axis at rest: cells [..., S]."""
    size = cells.shape[-1]
    weight = cells.view(-1, 1, size).expand(-1, size, size)
    rest = torch.full_like(location, (size - 1) / 2)
    if axis == 0:
        return sample_points(function, weight.mT, torch.stack([location, rest]), clip).squeeze(0)
    return sample_points(function, weight, torch.stack([rest, location]), clip).squeeze(0)


every_sampler = pytest.mark.parametrize(
    "function",
    [
        pytest.param(deform_kernel_conv2d, id="compiled"),
        pytest.param(composed_deform_kernel_conv2d, id="composed"),
        pytest.param(sample_kernel, id="sample_kernel"),
    ],
)
every_axis = pytest.mark.parametrize("axis", [0, 1], ids=["row", "column"])


@every_sampler
@every_axis
@every_clip
def test_derivative_at_knots(function, axis, clip, device):
    """Towards the next cell; at the last cell, from the one before."""
    cells = torch.randn(5, dtype=torch.float64, device=device)
    location = torch.arange(-2.0, 8.0).to(cells).requires_grad_()
    (actual,) = torch.autograd.grad(
        sample_axis(function, cells, location, axis, clip).sum(), location
    )
    inside = [*cells.diff(), cells[4] - cells[3]]
    left, right = [0, cells[0]], [0, 0, 0]
    if clip:  # the edge's, unless descent would follow it further out
        left, right = [min(inside[0], 0)] * 2, [max(inside[-1], 0)] * 3
    assert_close(actual, torch.tensor([*left, *inside, *right]).to(cells))


@every_sampler
@every_axis
@pytest.mark.parametrize(
    "grad, expected", [(1, [0] * 4 + [1] * 9), (-1, [-1] * 9 + [0] * 4)], ids=["down", "up"]
)
def test_clipped_derivative(grad, expected, function, axis, device):
    """A scope whose cells hold their own index returns the clipped location, with a slope of 1.

    Where nothing is clipped, edges included, which newer versions of torch.clamp leave out: the
    outer taps of a scope of kernel size start on them. Outside, if descent then leads inwards.
    """
    cells = torch.arange(5.0, dtype=torch.float64, device=device)
    location = [-INFINITY, -9, -1, -0.25, 0, 0.25, 1, 3.75, 4, 4.25, 5, 9, INFINITY]
    location = torch.tensor(location).to(cells).requires_grad_()
    value = sample_axis(function, cells, location, axis)
    assert_close(value, location.clamp(0, 4))
    (actual,) = torch.autograd.grad(value, location, torch.full_like(value, grad))
    assert_close(actual, torch.tensor(expected).to(cells))


@every_sampler
@pytest.mark.parametrize(
    "grad, rows, columns",
    [(1, [0, 0, 4, 1], [0, 1, -2, 0]), (-1, [-4, -1, 0, 0], [-1, 0, 0, 2])],
    ids=["down", "up"],
)
def test_clipped_corners_by_hand(grad, rows, columns, function, device):
    """Four taps beyond the corners of a 2x2 scope: each axis for itself."""
    weight = torch.tensor([[[1, 2], [5, 3]]], dtype=torch.float64, device=device)
    location = torch.tensor([[-1, -9, 1.5, 9], [-0.5, 2, -9, 9]]).to(weight).requires_grad_()
    value = sample_points(function, weight, location)
    assert_close(value, torch.tensor([[1, 2, 5, 3]]).to(weight))
    (actual,) = torch.autograd.grad(value, location, torch.full_like(value, grad))
    assert_close(actual, torch.tensor([rows, columns]).to(weight))


@every_sampler
@every_axis
@pytest.mark.parametrize("channels", [2, 17, 300])
def test_all_channels_decide_together(channels, function, axis, device):
    """Whether a clipped tap goes back is a matter of the sum, not of a channel, nor of a block."""
    slope = torch.zeros(channels, 1, dtype=torch.float64, device=device)
    slope[0], slope[-1] = 3, -5
    location = torch.tensor([-1, 0.25, 2]).to(slope).requires_grad_()
    for sign, expected in (1, [-2, -2, 0]), (-1, [0, 2, 2]):
        cells = sign * slope * torch.arange(2).to(slope)
        value = sample_axis(function, cells, location, axis)
        (actual,) = torch.autograd.grad(value.sum(), location)
        assert_close(actual, torch.tensor(expected).to(slope))


@pytest.mark.parametrize("function", [composed_deform_kernel_conv2d, sample_kernel])
@every_axis
def test_gradient_of_clipped_offsets_is_differentiable(axis, function, device):
    """It is a difference of the edge's cells where it leads inside, and constant where not."""
    for sign, expected in (1, [-10, -90, 100]), (-1, [0, 0, 0]):
        cells = torch.tensor([3, 1, 4], dtype=torch.float64, device=device)
        cells = (sign * cells).requires_grad_()
        location = torch.tensor([-1, 3]).to(cells).requires_grad_()
        value = sample_axis(function, cells, location, axis)
        (slope,) = torch.autograd.grad(value.sum(), location, create_graph=True)
        assert_close(slope, torch.tensor([-2, 3] if sign > 0 else [0, 0]).to(cells))
        (actual,) = torch.autograd.grad(slope @ torch.tensor([10, 100]).to(cells), cells)
        assert_close(actual, torch.tensor(expected).to(cells))


@every_sampler
@every_axis
def test_descent_brings_a_tap_back(function, axis):
    """To where a scope of 0, 1, 2, 3, 4 reads 3, from anywhere."""
    cells = torch.arange(5.0, dtype=torch.float64)
    location = torch.tensor([-7, -0.01, 0, 1, 4, 4.01, 9]).to(cells).requires_grad_()
    optimizer = torch.optim.SGD([location], lr=0.2)
    for _ in range(50):
        optimizer.zero_grad()
        (sample_axis(function, cells, location, axis) - 3).square().sum().backward()
        optimizer.step()
    assert_close(location, torch.full_like(location, 3))


@every_implementation
def test_zero_offsets_are_not_stuck(function, device):
    """With a scope of kernel size, every tap starts on a cell and yet moves on the first step."""
    case = Case(scope=(3, 3), padding=(0, 0))
    tensors = case.tensors(device=device)
    tensors["kernel_offset"].zero_()
    gradient = run(function, tensors, case.arguments)["grad_kernel_offset"]
    assert (gradient != 0).all()


# ---- far, infinite and missing locations ---------------------------------------------------------


def fenced(tensor):
    """The same values, channels_last, with NaN before and after them in memory."""
    batch, *shape = tensor.shape
    buffer = tensor.new_full((batch + 2, *shape), float("nan"))
    buffer = buffer.contiguous(memory_format=torch.channels_last)
    buffer[1:-1] = tensor
    return buffer[1:-1]


def with_one_offset(case, name, axis, value, tap, device):
    """Random tensors in which one tap of one output location, (1, 1) of image 1, is moved."""
    tensors = case.tensors(device=device)
    tensors[name][1, 2 * tap + axis, 1, 1] = value
    return tensors | {"input": fenced(tensors["input"])}


@every_clip
@every_implementation
@every_path
@every_axis
@pytest.mark.parametrize("name", ["kernel_offset", "data_offset"])
@pytest.mark.parametrize("location", [-2, -1, 0, "last", "size", 1e9, -1e9, INFINITY, -INFINITY])
def test_edges_and_beyond(location, name, axis, groups, function, clip, device):
    """Read the clipped edge of the scope or zero, never another pixel; all gradients are finite."""
    case = Case(groups=groups, clip=clip, **BOTH)
    tap = 5
    size, rest = case.size[axis], (tap // 3, tap % 3)[axis]  # of the output at (1, 1), padding 1
    if name == "kernel_offset":
        size, rest = case.scope[axis], rest + 0.5
    location = {"last": size - 1, "size": size}.get(location, location)
    moved = name, axis, location - rest, tap
    tensors, expected = known(case, torch.float64, device, moved=moved)
    tensors["input"] = fenced(tensors["input"])
    assert all(tensor.isfinite().all() for tensor in expected.values())
    assert_close(run(function, tensors, case.arguments), expected)


@every_implementation
@every_path
@pytest.mark.parametrize("location", [0, 3], ids=["first", "last"])
def test_a_tap_on_the_edge_is_inside(location, groups, function, device):
    """Its gradient is that of the cells there, also where descent leads out of the scope."""
    case = Case(groups=groups, **KERNEL)
    tensors = case.tensors(device=device)
    tensors["kernel_offset"][:, :2] = location - 0.5  # where the first tap rests
    expected = run(reference.deform_kernel_conv2d, double(tensors), case.arguments)
    gradient = expected["grad_kernel_offset"][:, :2]
    assert (gradient > 0).any() and (gradient < 0).any()
    assert_close(run(function, tensors, case.arguments), expected)


@every_clip
@every_implementation
@every_path
@every_axis
@pytest.mark.parametrize("padding", [0, 2], ids=["inside", "in-padding"])
@pytest.mark.parametrize("name", ["kernel_offset", "data_offset"])
def test_nan_shows_in_its_output_location_only(name, padding, axis, groups, function, clip, device):
    case = Case(groups=groups, padding=(padding, padding), clip=clip, **BOTH)
    if name == "kernel_offset":  # a rigid grid, whose taps may lie in the padding
        case = Case(groups=groups, padding=(padding, padding), clip=clip)
    tensors = with_one_offset(case, name, axis, float("nan"), 0, device)
    actual = run(function, tensors, case.arguments)
    missing = torch.zeros_like(actual["output"], dtype=torch.bool)
    missing[1, :, 1, 1] = True
    assert torch.equal(actual["output"].isnan(), missing)

    tensors[name] = tensors[name].nan_to_num()
    expected = run(function, tensors, case.arguments)
    assert_close(actual["output"][~missing], expected["output"][~missing])
    elsewhere = ~missing[:, :1].expand_as(tensors[name])
    for offset in actual.keys() & {"grad_kernel_offset", "grad_data_offset"}:
        assert_close(actual[offset][elsewhere], expected[offset][elsewhere])


@every_implementation
@every_path
def test_an_infinite_factor_shows_in_its_output_location_also_from_the_padding(
    groups, function, device
):
    case = Case(groups=groups, modulated=True)
    tensors = case.tensors(device=device)
    tensors["kernel_offset"][1, 18, 0, 0] = INFINITY  # of the first tap
    output = function(**tensors, **case.arguments)
    missing = torch.zeros_like(output, dtype=torch.bool)
    missing[1, :, 0, 0] = True
    assert torch.equal(output.isnan(), missing)


@every_path
@pytest.mark.parametrize(
    "deterministic", [False, True], ids=["any-order", "deterministic"], indirect=True
)
@pytest.mark.parametrize("which", [DATA, BOTH], ids=["data", "both"])
def test_an_infinite_gradient_reaches_what_was_read_only(which, groups, deterministic, device):
    """Not the pixels beside, which have a coefficient of 0."""
    case = Case(groups=groups, **which)
    tensors = case.tensors(device=device)
    tensors["data_offset"].zero_()
    tensors["data_offset"][0, :2, 3, 3] = torch.tensor([-9.0, 2.0])  # the first tap: outside
    image = tensors["input"].requires_grad_()
    output = deform_kernel_conv2d(**tensors, **case.arguments)
    grad_output = torch.zeros_like(output)
    grad_output[0, :, 3, 3] = INFINITY
    (gradient,) = torch.autograd.grad(output, image, grad_output)
    read = torch.zeros_like(image, dtype=torch.bool)
    read[0, :, 2:5, 2:5] = True
    read[0, :, 2, 2] = False
    assert torch.equal(gradient.isfinite(), ~read)


# ---- which gradients -----------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize(
    "wanted",
    [
        ("input",), ("weight",), ("bias",), ("kernel_offset",), ("data_offset",),
        ("input", "kernel_offset"), ("weight", "data_offset"),
    ],
    ids="-".join,
)  # fmt: skip
def test_frozen_tensors(wanted, groups, device, same_sums):
    """A gradient does not depend on which others are computed."""
    case = Case(groups=groups, **BOTH)
    tensors = case.tensors(device=device)
    everything = run(deform_kernel_conv2d, tensors, case.arguments)

    frozen = {name: tensor for name, tensor in tensors.items() if name not in wanted}
    trained = {name: tensors[name] for name in wanted}
    actual = run(deform_kernel_conv2d, trained, frozen | case.arguments)
    for name in actual:
        assert torch.equal(actual[name], everything[name])


@every_path
def test_constant_scope_has_zero_gradients(groups, device):
    """A clipped scope of one cell: the offsets have a gradient, of zero, which DDP relies on."""
    case = Case(groups=groups, scope=(1, 1))
    kernel_offset = case.tensors(device=device)["kernel_offset"].requires_grad_()
    tensors = case.tensors(device=device) | {"kernel_offset": kernel_offset}
    deform_kernel_conv2d(**tensors, **case.arguments).sum().backward()
    assert torch.equal(kernel_offset.grad, torch.zeros_like(kernel_offset))


def test_composed_without_kernel_offset_rests(device):
    """In a scope larger than the kernel the taps rest between cells."""
    case = Case(groups=1, kernel_offset=False, data_offset=True)
    tensors = case.tensors(device=device)
    arguments = {"function": composed_deform_kernel_conv2d, "arguments": case.arguments}
    zero = torch.zeros_like(tensors["data_offset"])
    expected = run(tensors=tensors | {"kernel_offset": zero}, **arguments)
    del expected["grad_kernel_offset"]
    assert_close(run(tensors=tensors, **arguments), expected)


@every_offset
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)), ids=str)
def test_output_mask(mask, which, device, same_sums):
    """The compiled backward returns the gradients that it is asked for, in order, and no other."""
    case = Case(scope=(3, 3), **which)
    present = (True, True, which["kernel_offset"], which["data_offset"])
    mask = [wanted and there for wanted, there in zip(mask, present, strict=True)]
    tensors = case.tensors(device=device)
    del tensors["bias"]
    grad_output = torch.randn(2, 3, *case.output_size).to(tensors["input"])
    expected = run(compiled, tensors, case.arguments | {"bias": None}, grad_output)
    options = {"output_mask": mask, "deterministic": torch.are_deterministic_algorithms_enabled()}
    actual = compiled_backward(grad_output, **tensors, **case.arguments, **options)
    names = [f"grad_{name}" for name, wanted in zip(tensors, mask, strict=True) if wanted]
    assert len(actual) == len(names)
    for gradient, name in zip(actual, names, strict=True):
        assert torch.equal(gradient, expected[name])


# ---- memory layout -------------------------------------------------------------------------------


def transposed(tensor):
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def sliced(tensor):
    """Every other column and all but the first channel of something larger."""
    batch, channels, height, width = tensor.shape
    buffer = tensor.new_full((batch, channels + 1, height, 2 * width), float("nan"))
    buffer[:, 1:, :, ::2] = tensor
    return buffer[:, 1:, :, ::2]


def expanded(tensor):
    return tensor[:, :, :1].expand_as(tensor)


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@every_path
@pytest.mark.parametrize("layout", [transposed, sliced, expanded, channels_last, fenced])
@pytest.mark.parametrize("name", ["input", "weight", "kernel_offset", "data_offset", "output"])
def test_memory_layouts(name, layout, groups, device):
    """`output` stands for its gradient, which arrives in the layout."""
    case = Case(groups=groups, **BOTH)
    tensors = case.tensors(device=device)
    grad_output = torch.randn(2, 3, *case.output_size).to(tensors["input"])
    if name == "output":
        grad_output = layout(grad_output)
    else:
        tensors[name] = layout(tensors[name])
    expected = run(reference.deform_kernel_conv2d, tensors, case.arguments, grad_output)
    assert_close(run(deform_kernel_conv2d, tensors, case.arguments, grad_output), expected)


@pytest.mark.parametrize("channels, groups", [(3, 3), (3, 1), (2, 2)], ids=str)
@every_offset_or_none
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_keeps_memory_format(layout, which, channels, groups, device):
    case = Case(channels=channels, groups=groups, **which)
    tensors = case.tensors(device=device)
    tensors["input"] = tensors["input"].contiguous(memory_format=layout)
    output = deform_kernel_conv2d(**tensors, **case.arguments)
    assert output.is_contiguous(memory_format=layout)


def test_output_keeps_memory_format_where_torch_does_not(monkeypatch):
    """A stand-in for torch's convolution in double precision on CUDA."""
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **kwargs: convolve(*args, **kwargs).contiguous())
    case = Case(**NEITHER)
    tensors = case.tensors()
    tensors["input"] = channels_last(tensors["input"])
    output = deform_kernel_conv2d(**tensors, **case.arguments)
    assert output.is_contiguous(memory_format=torch.channels_last)


# ---- low precision -------------------------------------------------------------------------------


every_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@every_half
@every_offset
@every_grouping
@pytest.mark.parametrize("offset_dtype", [torch.float32, None], ids=["float32-offset", "same"])
def test_low_precision(dtype, offset_dtype, which, grouping, device):
    """The oracle sees the same rounded numbers, so only the arithmetic is compared."""
    case = Case(scope=(3, 3), **which, **grouping)
    tensors = case.tensors(dtype, device)
    for name in "kernel_offset", "data_offset":
        if tensors[name] is not None:
            tensors[name] = tensors[name].to(offset_dtype)
    expected = run(reference.deform_kernel_conv2d, double(tensors), case.arguments)
    actual = run(deform_kernel_conv2d, tensors, case.arguments)
    assert_close(actual, expected, summands=None if grouping is GROUPINGS[0] else dtype)


@every_half
@every_path
def test_locations_are_float32(groups, dtype, device):
    """The type of an offset is storage: the image has more pixels than either type integers."""
    case = Case(groups=groups, size=(300, 10), **BOTH)
    tensors = case.tensors(dtype, device)
    widened = tensors | {name: tensors[name].float() for name in ("kernel_offset", "data_offset")}
    assert torch.equal(
        deform_kernel_conv2d(**tensors, **case.arguments),
        deform_kernel_conv2d(**widened, **case.arguments),
    )


@every_half
def test_locations_of_the_global_kernel_are_float32(dtype):
    """As those of the local one: the scope's middle takes bits that an offset has."""
    weight, offset = torch.randn(4, 1, 4, 4), torch.rand(2, 18).sub(0.5).to(dtype)
    assert torch.equal(sample_kernel(weight, offset, 3), sample_kernel(weight, offset.float(), 3))


@every_half
@pytest.mark.parametrize("channels", [17, 130])
def test_low_precision_channels(channels, dtype, device):
    check_against_oracle(Case(channels=channels, size=(3, 18), **BOTH), dtype, device)


@every_half
@pytest.mark.parametrize("channels", [(17, 5, 1), (144, 6, 3)], ids=str)
def test_low_precision_channels_of_groups(channels, dtype):
    """On a CPU columns are float32, and nothing but the results is rounded."""
    names = "channels", "out_channels", "groups"
    case = Case(size=(3, 18), **dict(zip(names, channels, strict=True)), **BOTH)
    check_against_oracle(case, dtype)


@in_one_order
@every_half
@every_offset
def test_accumulation_is_float32(dtype, which, device):
    """Sums of ones to which their own type could not add another one."""
    stall = 2 if dtype is torch.bfloat16 else 16  # 128 times that, and 1 is less than half an ulp
    case = Case(channels=1, kernel=(5, 5), scope=(5, 5), padding=(0, 0), size=(84, 84), **which)
    tensors = case.tensors(dtype, device)
    for name, tensor in tensors.items():
        if tensor is not None:
            tensor.fill_(0.0 if "offset" in name else 1.0)
    tensors["bias"].fill_(128 * stall)
    results = run(
        deform_kernel_conv2d, tensors, case.arguments, torch.ones(2, 1, 80, 80).to(tensors["input"])
    )
    assert_close(results["output"], torch.full_like(results["output"], 128 * stall + 25))
    assert_close(results["grad_weight"], torch.full_like(results["grad_weight"], 2 * 80 * 80))


# ---- bad input -----------------------------------------------------------------------------------


BAD_INPUT = [
    ("input", lambda t: t[0], ValueError, r"input: expected \[N, C_in, H, W\], got \[3, 6, 7\]"),
    ("input", lambda t: t.int(), TypeError, "input: expected a floating point type"),
    ("input", lambda t: t[:, :2], ValueError, "groups: expected a divisor of the 2 input"),
    ("input", lambda t: t[:, :0], ValueError, r"weight: expected \[C_out, 0, S_h, S_w\]"),
    ("input", lambda t: t[:, :, :1, :1], ValueError, r"kernel_offset: expected .* \[2, 18, 1, 1\]"),
    ("groups", 0, ValueError, "groups: expected a divisor of the 3 .* got 0"),
    ("groups", 2, ValueError, "groups: expected a divisor of the 3 .* got 2"),
    ("groups", 1.0, ValueError, "groups: expected a divisor of the 3 .* got 1.0"),
    ("groups", 1, ValueError, r"weight: expected \[C_out, 3, .* got \[3, 1, 4, 4\]"),
    ("weight", lambda t: t[0], ValueError, r"weight: expected \[C_out, 1, .* got \[1, 4, 4\]"),
    ("weight", lambda t: t[..., :0], ValueError, r"weight: expected .* got \[3, 1, 4, 0\]"),
    ("weight", lambda t: t[:2], ValueError, "weight: 2 output channels do not divide into 3"),
    ("weight", lambda t: t.half(), TypeError, "weight: expected type .*32 like input, got .*16"),
    ("weight", lambda t: t.to("meta"), RuntimeError, "weight: expected device cpu .* got meta"),
    ("bias", lambda t: t[:2], ValueError, r"bias: expected \[3\], got \[2\]"),
    ("bias", lambda t: t[:, None], ValueError, r"bias: expected \[3\], got \[3, 1\]"),
    ("bias", lambda t: t.double(), TypeError, "bias: expected type .*32 like input, got .*64"),
    ("kernel_offset", lambda t: t[:1], ValueError, r"kernel_offset: .* got \[1, 18, 6, 7\]"),
    ("kernel_offset", lambda t: t[:, :9], ValueError, r"kernel_offset: .* got \[2, 9, 6, 7\]"),
    ("kernel_offset", lambda t: torch.cat([t, t[:, :9]], 1), ValueError, "factors in data_offset"),
    ("kernel_offset", lambda t: t.int(), TypeError, "kernel_offset: expected a floating"),
    ("data_offset", lambda t: t[..., 1:], ValueError, r"data_offset: .* got \[2, 18, 6, 6\]"),
    ("data_offset", lambda t: t.bool(), TypeError, "data_offset: expected a floating point type"),
    ("data_offset", lambda t: t.to("meta"), RuntimeError, "data_offset: expected device cpu"),
    ("padding", (0, 0), ValueError, r"kernel_offset: .*\[2, 18, 4, 5\].* got \[2, 18, 6, 7\]"),
    ("dilation", 4, ValueError, r"input: .* smaller than the kernel .*\(4, 4\)"),
    ("kernel_size", 0, ValueError, "kernel_size: expected an integer >= 1 .* got 0"),
    ("kernel_size", (3, 3, 3), ValueError, r"kernel_size: expected .* got \(3, 3, 3\)"),
    ("kernel_size", (3, 2.5), ValueError, "kernel_size: expected an integer"),
    ("stride", 0, ValueError, "stride: expected an integer >= 1"),
    ("padding", -1, ValueError, "padding: expected an integer >= 0"),
    ("dilation", (1, 0), ValueError, "dilation: expected an integer >= 1"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, error, message", BAD_INPUT)
def test_bad_input(name, change, error, message):
    case = Case(**BOTH)
    call = case.tensors(torch.float32) | case.arguments
    call[name] = change(call[name]) if callable(change) else change
    with pytest.raises(error, match=message):
        deform_kernel_conv2d(**call)


# What a direct call could break: the compiled operator must refuse it by itself.
BAD_DIRECT_INPUT = [
    ("input", lambda t: t[0], r"input: expected \[N, C, H, W\]"),
    ("input", lambda t: t[:, :2], "groups: expected a divisor of the 2 input channels, got 3"),
    ("input", lambda t: t.int(), "input: expected a floating point type"),
    ("input", lambda t: t[:1], r"kernel_offset: expected \[1, 18, .* got \[2, 18, 6"),
    ("groups", 1, r"weight: expected \[C_out, 3, S_h, S_w\] .* got \[3, 1, 4, 4\]"),
    ("groups", 0, "groups: expected a divisor of the 3 input channels, got 0"),
    ("weight", lambda t: t[:2], "with C_out a multiple of 3 groups, got"),
    ("weight", lambda t: t.expand(3, 3, 4, 4), r"weight: expected \[C_out, 1, S_h, S_w\]"),
    ("weight", lambda t: t[:, :, :0], "scope size: expected two values from 1 to"),
    ("weight", lambda t: t.double(), "weight: expected type Float like input, got Double"),
    ("bias", lambda t: t[:2], r"bias: expected \[3\], got \[2\]"),
    ("bias", lambda t: t.half(), "bias: expected type Float like input, got Half"),
    ("kernel_offset", lambda t: t[:, :9], r"kernel_offset: expected \[2, 18, .* got \[2, 9, 6"),
    ("kernel_offset", lambda t: torch.cat([t, t[:, :9]], 1), r"kernel_offset: .* not \[2, 27, 6"),
    ("kernel_offset", lambda t: t.long(), "kernel_offset: expected a floating point type"),
    ("kernel_offset", None, "weight: without kernel_offset expected a scope of the"),
    ("data_offset", lambda t: t[:, :, :5], r"data_offset: expected \[2, 18, 6, .* got \[2, 18, 5"),
    ("data_offset", lambda t: t[..., 0], "data_offset: expected"),
    ("kernel_size", (3, 0), "kernel_size: expected two values from 1 to"),
    ("stride", (0, 1), "stride: expected two values from 1 to"),
    ("padding", (-1, 0), "padding: expected two values from 0 to"),
    ("dilation", (1, 0), "dilation: expected two values from 1 to"),
    ("kernel_size", (3, 2**32 + 3), "kernel_size: expected two values from 1 to"),
    ("dilation", (1, 2**62), "dilation: expected two values from 1 to"),
    ("padding", (2**62, 1), "padding: expected two values from 0 to"),
    ("kernel_size", (2**16, 2**16), r"taps and cells, got \[65536, 65536\] and \[4, 4\]"),
    ("dilation", (4, 1), "input: padded size 8x9 is smaller than the dilated kernel"),
]  # fmt: skip


@pytest.fixture(params=["compiled", "emulated"])
def operators(request):
    """Of the CPU, and of CUDA, whose host functions check by themselves."""
    if request.param == "compiled":
        return torch.ops.dk_detectron
    plugin.load()
    return torch.ops.dk_emulated


@pytest.mark.parametrize("name, change, message", BAD_DIRECT_INPUT)
def test_bad_direct_input(name, change, message, operators):
    case = Case(**BOTH)
    call = case.tensors(torch.float32) | case.arguments
    grad_output = torch.ones(2, 3, *case.output_size)
    call[name] = change(call[name]) if callable(change) else change
    with pytest.raises(RuntimeError, match=message):
        operators.deform_kernel_conv2d(**call)
    if name != "bias":
        del call["bias"]
        with pytest.raises(RuntimeError, match=message):
            operators.deform_kernel_conv2d_backward(grad_output, **call, output_mask=[True] * 4)


@pytest.mark.parametrize(
    "size, padding, dilation, padded",
    [((6, 7), (1, 2), (4, 1), "8x11"), ((7, 6), (2, 1), (1, 4), "11x8")],
    ids=["rows", "columns"],
)
def test_the_padded_size_has_the_padding_of_each_axis(size, padding, dilation, padded, operators):
    """It is too small by a single pixel."""
    case = Case(size=size)
    call = case.tensors(torch.float32) | case.arguments
    call |= {"padding": padding, "dilation": dilation}
    with pytest.raises(RuntimeError, match=f"input: padded size {padded} is smaller than the dil"):
        operators.deform_kernel_conv2d(**call)


@pytest.mark.parametrize("outputs", [1, 2], ids=["depthwise", "dense"])
def test_cells_have_positions_of_32_bits(outputs):
    one = torch.zeros(1, 1, 1, 1)
    call = {"kernel_size": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    tensors = one, one.expand(outputs, 1, 2048, 2048), None, torch.zeros(1, 2, 1, 1), None
    with pytest.raises(RuntimeError, match="expected a scope of at most 4194303 cells"):
        compiled(*tensors, **call, groups=1, clip=True)


@pytest.mark.parametrize("axis", [2, 3], ids=["rows", "columns"])
def test_deformed_images_have_positions_of_32_bits(axis):
    sizes = [1, 1, 1, 1]
    sizes[axis] = 2**31
    input, offset = torch.zeros(1, 1, 1, 1).expand(sizes), torch.zeros(1, 2, 1, 1)
    call = {"kernel_size": [1, 1], "stride": [2**30, 2**30], "padding": [0, 0]}
    offset = offset.expand(1, 2, *[(size - 1) // 2**30 + 1 for size in sizes[2:]])
    with pytest.raises(RuntimeError, match="expected at most 2147483647 rows and columns"):
        compiled(
            input, torch.zeros(2, 1, 1, 1), None, None, offset, **call, dilation=[1, 1], groups=1,
            clip=True,
        )  # fmt: skip


@pytest.mark.parametrize("scope", [(3, 4), (4, 3)], ids=str)
def test_without_offsets_the_scope_is_the_kernel(scope, operators):
    case = Case(scope=scope, **NEITHER)
    with pytest.raises(RuntimeError, match="without kernel_offset expected a scope of the kernel"):
        operators.deform_kernel_conv2d(**case.tensors(torch.float32), **case.arguments)


@pytest.mark.parametrize(
    "change",
    [lambda t: t[:1], lambda t: t[..., 1:], lambda t: t.double()],
    ids=["batch", "size", "type"],
)
def test_bad_grad_output(change, operators):
    case = Case(**BOTH)
    tensors = case.tensors(torch.float32)
    del tensors["bias"]
    grad_output = change(torch.ones(2, 3, *case.output_size))
    backward = operators.deform_kernel_conv2d_backward
    with pytest.raises(RuntimeError, match="grad_output: expected the output's type and size"):
        backward(grad_output, **tensors, **case.arguments, output_mask=[True] * 4)


@pytest.mark.parametrize(
    "weight, offset, kernel_size, message",
    [
        ((3, 4, 4), (2, 18), 3, r"weight: expected \[C_out, .* got \[3, 4, 4\]"),
        ((3, 1, 4, 4), (2, 9), 3, r"kernel_offset: expected \[N, 18\] for .* got \[2, 9\]"),
        ((3, 1, 4, 4), (2, 18, 1), 3, r"kernel_offset: expected \[N, 18\] .* got \[2, 18, 1\]"),
        ((3, 1, 4, 4), (2, 18), (3, 0), "kernel_size: expected an integer >= 1"),
        ((3, 1, 4, 0), (2, 18), 3, "weight: expected"),
    ],
)  # fmt: skip
def test_sample_kernel_bad_input(weight, offset, kernel_size, message):
    with pytest.raises(ValueError, match=message):
        sample_kernel(torch.zeros(weight), torch.zeros(offset), kernel_size)


# ---- which implementation runs
# ---------------------------------------------------------------------


def case_of(groups: int) -> dict:
    offset = torch.zeros(1, 18, 6, 6)
    weight = torch.randn(4, 4 // groups, 4, 4)
    return {"input": torch.randn(1, 4, 8, 8), "weight": weight, "kernel_offset": offset} | {
        "kernel_size": 3, "groups": groups,
    }  # fmt: skip


def test_the_implementation_has_a_name():
    level = torch.backends.cpu.get_cpu_capability()
    assert implementation(**case_of(4)) == f"compiled CPU {level}"
    assert implementation(**case_of(2)) == f"compiled CPU {level}"
    rest = case_of(4) | {"kernel_offset": None}
    assert implementation(**rest) == "torch.nn.functional.conv2d"
    data = {**rest, "data_offset": torch.zeros(1, 18, 6, 6), "weight": torch.randn(4, 1, 3, 3)}
    assert implementation(**data) == f"compiled CPU {level}"
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case_of(4).items()}
    assert implementation(**meta) == "compiled META"


def test_a_slow_implementation_warns_once(monkeypatch):
    monkeypatch.setattr(dispatch, "WARNED", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deform_kernel_conv2d(**case_of(4))
        assert not caught
        deform_kernel_conv2d(**case_of(2))
        assert not caught
        # As where the extension was built without CUDA.
        monkeypatch.setattr(dispatch, "DEVICES", {"meta"})
        for _ in range(2):
            expected = deform_kernel_conv2d(**case_of(4))
        (warning,) = caught
        assert "composed of PyTorch's own operators, as dk_detectron has been" in str(
            warning.message
        )
        assert "built without kernels for cpu. That takes" in str(warning.message)
        assert warning.filename == __file__
    assert expected.shape == (1, 4, 6, 6)

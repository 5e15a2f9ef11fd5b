"""Factors of the taps, and offsets for each group of channels, in layers and networks."""

import pytest
import torch
from test_engine import OPTIONS
from test_layers_compiled import SIZES, trained
from test_layers_generators import LOCAL, randomize
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dk_detectron import deform_kernel_conv2d, deformify, undeformify
from dk_detectron.analysis.kernels import view_scope
from dk_detectron.analysis.offsets import observe
from dk_detectron.engine.monitoring import OffsetMonitor
from dk_detectron.engine.optimizer import parameter_groups
from dk_detectron.export import export
from dk_detectron.layers import DeformConv2d, LocalDeformKernel2d
from dk_detectron.model_zoo import load_config
from dk_detectron.modeling import mobilenet_v2

every_local = pytest.mark.parametrize("kind", LOCAL)
every_grouping = pytest.mark.parametrize(
    ("groups", "offset_groups"), [(8, 1), (8, 2), (4, 4), (1, 1), (1, 2)]
)


def make(kind, groups=8, offset_groups=2, **options) -> nn.Module:
    layer = kind(8, 8, 3, padding=1, groups=groups, modulated=True, offset_groups=offset_groups)
    return layer.double()


@every_local
@every_grouping
def test_a_layer_starts_rigid_and_then_learns(kind, groups, offset_groups):
    rigid = nn.Conv2d(8, 8, 3, padding=1, groups=groups).double()
    layer = make(kind, groups, offset_groups)
    layer.load_state_dict(rigid.state_dict())
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), rigid(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.rigid_weight(), rigid.weight, rtol=1e-10, atol=1e-12)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@every_local
@every_grouping
def test_the_operator_by_hand(kind, groups, offset_groups):
    """Each group's offsets, then its factors: twice the sigmoid of what is predicted."""
    layer = randomize(make(kind, groups, offset_groups))
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    factors = 2 / (1 + torch.exp(-layer.mask_offset_generator(x)))
    offsets = {"kernel_offset": None, "data_offset": None}
    for name in offsets:
        if hasattr(layer, f"{name}_generator"):
            offsets[name] = getattr(layer, f"{name}_generator")(x)
    last = "kernel_offset" if offsets["data_offset"] is None else "data_offset"
    packed = []
    for g in range(offset_groups):
        packed += [offsets[last][:, 18 * g : 18 * (g + 1)], factors[:, 9 * g : 9 * (g + 1)]]
    expected = deform_kernel_conv2d(
        x, layer.weight, layer.bias, **offsets | {last: torch.cat(packed, 1)},
        kernel_size=3, padding=1, groups=groups, offset_groups=offset_groups,
    )  # fmt: skip
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@every_local
def test_factors_that_scale_are_no_rigid_convolution(kind):
    layer = make(kind)
    nn.init.constant_(layer.mask_offset_generator.bias, 0.1)
    with pytest.raises(ValueError, match="weight: expected factors of 1, got some that scale"):
        layer.rigid_weight()


@every_local
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 8, "offset_groups": 3}, "offset_groups: expected a divisor of the 8 groups"),
        ({"offset_groups": 3}, "offset_groups: expected a divisor of the 8 in_channels, got 3"),
        ({"groups": 2, "offset_groups": 4}, "offset_groups: expected a divisor of the 2 groups"),
        ({"offset_groups": 0}, "offset_groups: expected a divisor of the 8 in_channels, got 0"),
    ],
)
def test_groups_that_do_not_divide(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(8, 8, 3, **arguments)


@every_local
def test_weights_without_factors_load_and_say_what_they_lack(kind):
    plain = randomize(kind(8, 8, 3, padding=1, groups=8))
    layer = kind(8, 8, 3, padding=1, groups=8, modulated=True)
    missing = layer.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["mask_offset_generator.weight", "mask_offset_generator.bias"]
    x = torch.randn(2, 8, 7, 9)
    assert torch.equal(layer(x), plain(x))


def test_a_smaller_scope_lies_in_a_larger_one():
    small, large = (
        LocalDeformKernel2d(
            8, 8, 3, padding=1, groups=8, modulated=True, offset_groups=2, scope_size=size
        ).double()
        for size in (4, 5)
    )
    large.load_state_dict(randomize(small).state_dict())
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(large(x), small(x), rtol=1e-10, atol=1e-12)


def test_sensitivity_of_two_groups_is_that_of_their_layers():
    layer = randomize(make(LocalDeformKernel2d))
    halves = []
    for half in range(2):
        part = LocalDeformKernel2d(4, 4, 3, groups=4).double()
        part.weight.data = layer.weight.data.chunk(2)[half]
        part.kernel_offset_generator.bias.data = layer.kernel_offset_generator.bias.data.chunk(2)[
            half
        ]
        halves.append(part.weight.new_tensor(part.sensitivity()))
    assert min(halves) < layer.sensitivity() < max(halves)


@every_local
def test_one_graph_for_all_sizes(kind):
    torch._dynamo.reset()
    layer = randomize(make(kind).float(), 0.1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for size in SIZES:
        x = torch.randn(2, 8, *size)
        found, expected = trained(compiled, layer, x), trained(layer, layer, x)
        for actual, other in zip(found, expected, strict=True):
            # Sums over thousands of places, in another order.
            torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-6 * other.abs().max())
    assert counter.frame_count == 1


@every_local
def test_onnx(kind, tmp_path):
    pytest.importorskip("onnxruntime")
    layer = randomize(make(kind).float(), 0.1)
    found = export(layer.eval(), torch.randn(1, 8, 12, 16), tmp_path / "layer.onnx")
    assert found.differences["output"] < 1e-5


def test_generators_of_factors_learn_as_those_of_offsets():
    groups = parameter_groups(nn.Sequential(make(DeformConv2d)), 1.0, 0.1, offset_lr_factor=0.5)
    rates = {name: g["lr"] for g in groups for name in g["param_names"]}
    assert rates["0.mask_offset_generator.weight"] == rates["0.data_offset_generator.bias"] == 0.5


def test_deformify_and_back():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3)
    ).double()
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    expected = model(x)
    report = deformify(model, modulated=True, offset_groups=2)
    assert report.changed == ["1", "2"] and "modulated=True, offset_groups=2" in str(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    undeformify(model)
    assert type(model[1]) is nn.Conv2d
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_a_configured_network_is_looked_at():
    """What analysis and the monitor read of a layer is the first of its groups, or all of them."""
    opts = ["MODEL.DEFORM_KERNEL.MODULATED", "True", "MODEL.DEFORM_KERNEL.OFFSET_GROUPS", "2"]
    cfg = load_config("COCO-Detection/faster_rcnn_MNV2_FPN_dcn_dk_l3_1x.yaml", [*OPTIONS, *opts])
    kernels = cfg.MODEL.DEFORM_KERNEL
    assert kernels.MODULATED and kernels.OFFSET_GROUPS == 2
    model = mobilenet_v2(conv3x3="local", modulated=True, offset_groups=2, out_features=["res2"])
    for layer in model.modules():
        if isinstance(layer, LocalDeformKernel2d):
            randomize(layer, 0.1)
    seen = observe(model, torch.rand(3, 48, 64))
    name, observation = next((n, o) for n, o in seen.items() if "kernel_offset" in o.values)
    assert observation.values["kernel_offset"].shape[0] == 36
    view = view_scope(observation, (2, 3))
    bias = observation.layer.kernel_offset_generator.bias.detach().double()
    move = view.places - view.rest
    there = observation.values["kernel_offset"][:18, 2, 3].double() - bias[:18]
    torch.testing.assert_close(torch.from_numpy(move), there.view(9, 2), rtol=0, atol=1e-6)
    monitor = OffsetMonitor(model)
    monitor.watch()
    model(torch.rand(1, 3, 48, 64))
    (offsets,) = monitor.stop()
    assert (
        name in [layer.layer for layer in offsets.layers]
        and 0 < offsets.scalars()["kernel_offset/mean"]
    )

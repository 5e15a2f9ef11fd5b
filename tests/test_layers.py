"""The layers: drop-in for nn.Conv2d, rigid at the start, adaptive once their generators move."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dk_detectron.layers import (
    CondConv2d,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
    lift_to_scope,
    msra_fill,
    spread_offset,
)
from dk_detectron.ops import deform_kernel_conv2d, per_image_conv2d, sample_kernel

DATA = Path(__file__).parent / "data"

LAYERS = [
    LocalDeformKernel2d,
    GlobalDeformKernel2d,
    DeformConv2d,
    DeformKernelConv2d,
    CondConv2d,
]
SCOPED = [LocalDeformKernel2d, GlobalDeformKernel2d, DeformKernelConv2d]
# in, out, kernel, stride, padding, dilation, groups
SHAPES = [
    pytest.param((6, 6, 3, 1, 1, 1, 6), id="depthwise"),
    pytest.param((6, 6, (3, 5), (2, 1), (1, 3), (1, 2), 6), id="depthwise-asymmetric"),
    pytest.param((6, 8, 3, 2, 1, 1, 2), id="grouped"),
    pytest.param((6, 10, 3, 1, 1, 1, 1), id="dense"),
    pytest.param((6, 10, 1, 1, 0, 1, 1), id="pointwise"),
    pytest.param((6, 10, 1, 2, 0, 1, 1), id="pointwise-stride"),
]


def randomize_generators(layer: nn.Module, scale: float = 0.3) -> None:
    for name, module in layer.named_children():
        if name.endswith("generator"):
            nn.init.normal_(module.weight, std=scale)
            nn.init.normal_(module.bias, std=scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_starts_as_the_rigid_convolution(layer, shape):
    """Same positional arguments as nn.Conv2d, and the same outputs from the same weight."""
    rigid = nn.Conv2d(*shape).double()
    adaptive = layer(*shape).double()
    adaptive.set_rigid_weight(rigid.weight.detach())
    adaptive.bias.data.copy_(rigid.bias.data)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(adaptive(x), rigid(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_parameter_learns_and_moves_the_output(layer, shape):
    layer = layer(*shape).double()
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    before = layer(x)
    before.square().sum().backward()
    for name, parameter in layer.named_parameters():
        # Zero generators get gradients too: training is not stuck at the start. At rest on the last
        # pixel before the padding there is nothing to learn, but never everywhere.
        assert parameter.grad.abs().sum() > 0, name
    randomize_generators(layer)
    assert (layer(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", LAYERS)
def test_an_empty_batch_gives_gradients_of_zeros(layer, shape):
    """As in nn.Conv2d: DistributedDataParallel waits for every gradient of every process."""
    layer = layer(*shape)
    x = torch.zeros(0, 6, 9, 11, requires_grad=True)
    y = layer(x)
    assert y.shape == nn.Conv2d(*shape)(x).shape
    y.sum().backward()
    for tensor in x, *layer.parameters():
        assert tensor.grad is not None and not tensor.grad.any()


@pytest.mark.parametrize("options", [{}, {"groups": 6, "padding": 1, "dilation": 2}])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_image_smaller_than_the_kernel_is_named(layer, options):
    layer = layer(6, 6, 3, **options)
    with pytest.raises(ValueError, match=r"input: \[2, 6, 2, 9\] .* smaller than the kernel"):
        layer(torch.zeros(2, 6, 2, 9))


@pytest.mark.parametrize("layer", LAYERS)
def test_generators_start_at_zero_and_are_configured_as_the_target(layer):
    layer = layer(6, 6, (3, 5), (2, 1), (1, 3), (1, 2), 6)
    generators = {n: m for n, m in layer.named_children() if n.endswith("generator")}
    assert generators
    for generator in generators.values():
        assert not generator.weight.any() and not generator.bias.any()
        if isinstance(generator, nn.Conv2d):
            assert generator.out_channels == 2 * 15 and generator.groups == 1
            for key in "kernel_size", "stride", "padding", "dilation":
                assert getattr(generator, key) == getattr(layer, key)


def test_local_layer_calls_the_operator_with_its_offsets():
    layer = LocalDeformKernel2d(4, 4, 3, padding=1, groups=4, scope_size=(4, 5))
    randomize_generators(layer)
    x = torch.randn(2, 4, 6, 7)
    expected = deform_kernel_conv2d(
        x, layer.weight, layer.bias, layer.kernel_offset_generator(x),
        kernel_size=3, padding=1, groups=4,
    )  # fmt: skip
    torch.testing.assert_close(layer(x), expected)


def test_combined_layer_learns_both_offsets_separately():
    layer = DeformKernelConv2d(4, 4, 3, padding=1, groups=4)
    randomize_generators(layer)
    x = torch.randn(2, 4, 6, 7)
    expected = deform_kernel_conv2d(
        x, layer.weight, layer.bias,
        layer.kernel_offset_generator(x), layer.data_offset_generator(x),
        kernel_size=3, padding=1, groups=4,
    )  # fmt: skip
    torch.testing.assert_close(layer(x), expected)
    assert layer.kernel_offset_generator is not layer.data_offset_generator


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [*SHAPES, (6, 10, 1, 1, (1, 0), 1, 1), (6, 10, 1, 1, (0, 1), 1, 1)]
)
def test_per_image_conv_is_one_convolution_per_image(shape, memory_format):
    cin, cout, kernel, stride, padding, dilation, groups = shape
    size = nn.Conv2d(*shape).weight.shape
    x = torch.randn(3, cin, 9, 11, dtype=torch.float64).to(memory_format=memory_format)
    kernels = torch.randn(3, *size, dtype=torch.float64)
    bias = torch.randn(cout, dtype=torch.float64)
    got = per_image_conv2d(x, kernels, bias, stride, padding, dilation, groups)
    expected = torch.cat([
        F.conv2d(x[i : i + 1], kernels[i], bias, stride, padding, dilation, groups)
        for i in range(3)
    ])  # fmt: skip
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous(memory_format=memory_format)
    assert per_image_conv2d(x[:0], kernels[:0], bias, stride, padding, dilation, groups).shape == (
        0, *expected.shape[1:],
    )  # fmt: skip


def test_global_layer_samples_each_image_once():
    layer = GlobalDeformKernel2d(4, 4, 3, padding=1, groups=4)
    randomize_generators(layer)
    x = torch.randn(2, 4, 6, 7)
    offset = layer.kernel_offset_generator(x.mean((2, 3)))
    expected = deform_kernel_conv2d(
        x, layer.weight, layer.bias, offset[:, :, None, None].expand(-1, -1, 6, 7),
        kernel_size=3, padding=1, groups=4,
    )  # fmt: skip
    torch.testing.assert_close(layer(x), expected)


def test_conditional_layer_mixes_experts_that_differ():
    layer = CondConv2d(4, 6, 3, padding=1, num_experts=3)
    randomize_generators(layer)
    x = torch.randn(2, 4, 6, 7)
    gates = layer.gate_generator(x.mean((2, 3))).sigmoid()
    kernels = torch.einsum("ne,eoikl->noikl", gates, layer.weight)
    torch.testing.assert_close(layer(x), per_image_conv2d(x, kernels, layer.bias, padding=1))
    for e in range(1, 3):
        assert (layer.weight[e] - layer.weight[0]).abs().mean() > 1e-3


# ---- the start
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (2, 3)])
@pytest.mark.parametrize("extra", [(0, 0), (1, 1), (2, 1), (6, 6)])
def test_spread_taps_read_the_lifted_kernel_exactly(kernel_size, extra):
    scope_size = tuple(k + e for k, e in zip(kernel_size, extra, strict=True))
    weight = torch.randn(5, 2, *kernel_size, dtype=torch.float64)
    offset = spread_offset(scope_size, kernel_size).unsqueeze(0)
    sampled = sample_kernel(lift_to_scope(weight, scope_size), offset, kernel_size)
    torch.testing.assert_close(sampled[0], weight, rtol=1e-12, atol=1e-12)


def test_lift_by_hand():
    """Linear between the taps where they lie on cells; else of the least squared differences."""
    row = torch.tensor([[[[1.0, 2.0, 6.0]]]])
    expected = {4: [1, 2 - 5 / 6, 2 + 5 / 6, 6], 5: [1, 1.5, 2, 4, 6]}
    for size, cells in expected.items():
        torch.testing.assert_close(
            lift_to_scope(row, (1, size)), torch.tensor([[[cells]]], dtype=torch.float32)
        )
    assert spread_offset((1, 4), (1, 3)).tolist() == [0, -0.5, 0, 0, 0, 0.5]
    assert (lift_to_scope(torch.full((1, 1, 1, 1), 3.0), 2) - 3).abs().max() < 1e-6


@pytest.mark.parametrize("scope_size", [3, 4, 5, 9, (4, 7)])
@pytest.mark.parametrize("layer", SCOPED)
def test_a_given_rigid_weight_is_met_exactly_at_every_scope(layer, scope_size):
    """Whatever the generators have learnt before."""
    rigid = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False).double()
    adaptive = layer(6, 6, 3, 2, 1, groups=6, bias=False, scope_size=scope_size).double()
    randomize_generators(adaptive)
    adaptive.set_rigid_weight(rigid.weight.detach())
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(adaptive(x), rigid(x), rtol=1e-10, atol=1e-12)


def _change(layer: nn.Module, offsets: torch.Tensor) -> float:
    """Relative change of a layer's kernels when its taps move by ``offsets`` from their start."""
    rest = layer.kernel_offset_generator.bias.detach().unsqueeze(0)
    before = sample_kernel(layer.weight.detach(), rest, layer.kernel_size)
    after = sample_kernel(layer.weight.detach(), rest + offsets, layer.kernel_size)
    return float((after - before).norm() / before.expand_as(after).norm())


@pytest.mark.parametrize("scope_size", range(3, 10))
@pytest.mark.parametrize("layer", SCOPED)
def test_a_fifth_of_a_cell_changes_a_fresh_kernel_by_half_at_most(layer, scope_size):
    """Scopes that are rough make training chaotic: the pseudo-inverse's kernels change by 100 %."""
    layer = layer(256, 256, 3, padding=1, groups=256, scope_size=scope_size)
    msra_fill(layer)
    corners = 0.2 * torch.randint(0, 2, (16, 18)).mul(2).sub(1)  # a fifth along both axes
    assert _change(layer, corners) < 0.55
    # sensitivity() is the same for all taps together, along one axis.
    together = 0.2 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).repeat(1, 9)
    assert layer.sensitivity() == pytest.approx(_change(layer, together), rel=1e-5)


def test_rough_rigid_kernels_become_scopes_that_are_not_rougher():
    """Alternating kernels, such as real networks have; the pseudo-inverse made changes of 80 %."""
    rough = torch.tensor([1.0, -1, 1]).outer(torch.tensor([1.0, -1, 1])).expand(4, 1, 3, 3)
    layer = LocalDeformKernel2d(4, 4, 3, padding=1, groups=4)
    layer.set_rigid_weight(rough)
    assert layer.weight.abs().max() <= 1 + 1e-6
    assert layer.sensitivity() < 0.25


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_version_0_1_give_the_outputs_that_they_gave(layer):
    content = torch.load(DATA / "layers_0.1.pth", weights_only=True)
    stored = content[layer.__name__]
    layer = layer(4, 4, 3, padding=1, groups=4)
    layer.load_state_dict(stored["model"])
    torch.testing.assert_close(layer(content["input"]), stored["output"])


@pytest.mark.parametrize("layer", LAYERS)
def test_msra_fill_has_the_rigid_scale(layer):
    """A fresh kernel has He et al.'s variance, whatever the scope or the experts."""
    torch.manual_seed(0)
    layer = layer(64, 64, 3, padding=1, bias=False)
    msra_fill(layer)
    unit = torch.zeros(1, 64, 3, 3)
    unit[0, :, 1, 1] = 1
    kernel_sums = layer(unit)[0, :, 1, 1]  # Σ over inputs of the centre tap: 64 draws
    expected = (2 / (64 * 9)) ** 0.5 * 64**0.5
    assert 0.6 < kernel_sums.std() / expected < 1.5


def test_norm_and_activation_follow():
    norm = nn.BatchNorm2d(4).eval()
    norm.running_mean.fill_(1.0)
    layer = LocalDeformKernel2d(4, 4, 3, padding=1, groups=4, norm=norm, activation=F.relu6)
    plain = LocalDeformKernel2d(4, 4, 3, padding=1, groups=4)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "norm" not in k})
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(layer(x), F.relu6(norm(plain(x))))


@pytest.mark.parametrize("layer", LAYERS)
def test_repr_tells_the_arguments(layer):
    text = repr(layer(4, 4, 3, stride=2, padding=1, groups=2, bias=False))
    assert "4, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False" in text
    if layer in (LocalDeformKernel2d, GlobalDeformKernel2d, DeformKernelConv2d):
        assert "scope_size=(4, 4)" in text
    if layer is CondConv2d:
        assert "num_experts=8" in text


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="groups: expected a divisor of the 4 in_channels, got 3"):
        LocalDeformKernel2d(4, 4, 3, groups=3)
    with pytest.raises(ValueError, match="padding_mode: expected 'zeros', got 'reflect'"):
        DeformConv2d(4, 4, 3, padding_mode="reflect")
    for size in 0, 2, (4, 2):
        with pytest.raises(
            ValueError, match=r"scope_size: .*(at least the kernel_size|an integer >= 1)"
        ):
            LocalDeformKernel2d(4, 4, 3, scope_size=size)
    with pytest.raises(ValueError, match="num_experts: expected an integer >= 1, got 0"):
        CondConv2d(4, 4, 3, num_experts=0)
    with pytest.raises(ValueError, match=r"weight: expected \[4, 1, 3, 3\], got \[4, 1, 4, 4\]"):
        LocalDeformKernel2d(4, 4, 3, groups=4).set_rigid_weight(torch.zeros(4, 1, 4, 4))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_channels": 0}, "in_channels: expected an integer >= 1, got 0"),
        ({"out_channels": 4.0}, "out_channels: expected an integer >= 1, got 4.0"),
        ({"kernel_size": 0}, "kernel_size: expected an integer >= 1 .* got 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size: expected an integer >= 1 or two of them"),
        ({"stride": 0}, "stride: expected an integer >= 1 .* got 0"),
        ({"dilation": 1.5}, "dilation: expected an integer >= 1 .* got 1.5"),
        ({"padding": -1}, "padding: expected an integer >= 0 .* got -1"),
        ({"padding": "reflect"}, "padding: expected pixels, 'same' or 'valid', got 'reflect'"),
        ({"padding": "same", "stride": 2}, "padding: .* 'same' needs a stride of 1"),
        ({"padding": "same", "kernel_size": 4}, "padding: .* an even dilation"),
        ({"groups": 0}, "groups: expected a divisor of the 4 in_channels, got 0"),
        ({"out_channels": 6, "groups": 4}, "groups: expected a divisor of the 6 out_channels"),
    ],
)
def test_layers_check_their_arguments(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3} | arguments)


@pytest.mark.parametrize("layer", LAYERS)
def test_an_image_without_a_batch_is_refused(layer):
    layer = layer(4, 4, 3, padding=1)
    with pytest.raises(ValueError, match=r"input: expected \[N, C_in, H, W\], got \[4, 8, 8\]"):
        layer(torch.zeros(4, 8, 8))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("padding, dilation", [("same", (1, 2)), ("same", 1), ("valid", 1)])
def test_padding_by_name_is_that_of_conv2d(layer, padding, dilation):
    shape = {"kernel_size": (3, 5), "padding": padding, "dilation": dilation, "groups": 2}
    rigid = nn.Conv2d(4, 4, **shape).double()
    adaptive = layer(4, 4, **shape).double()
    adaptive.set_rigid_weight(rigid.weight.detach())
    adaptive.bias.data.copy_(rigid.bias.data)
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(adaptive(x), rigid(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"kernels": (3, 4, 2, 3, 3)}, ValueError, r"kernels: expected \[2, C_out, 2, .* got \[3"),
        ({"kernels": (2, 4, 4, 3, 3)}, ValueError, r"kernels: expected \[2, C_out, 2, .* got"),
        ({"kernels": (4, 2, 3, 3)}, ValueError, "kernels: expected"),
        ({"input": (4, 8, 8)}, ValueError, r"input: expected \[N, C_in, H, W\], got \[4, 8, 8\]"),
        ({"kernels": (2, 3, 2, 3, 3)}, ValueError, "kernels: 3 output channels do not divide into"),
        ({"groups": 3}, ValueError, "groups: expected a divisor of the 4 input channels, got 3"),
        ({"stride": 0}, ValueError, "stride: expected an integer >= 1"),
        ({"dilation": 0}, ValueError, "dilation: expected an integer >= 1"),
        ({"bias": (1,)}, ValueError, r"bias: expected \[4\], got \[1\]"),
        ({"bias": (2, 2)}, ValueError, r"bias: expected \[4\], got \[2, 2\]"),
    ],
)
def test_per_image_convolutions_check_their_arguments(change, error, message):
    """One kernel too many used to convolve images with one another's kernels."""
    call = {"input": (2, 4, 8, 8), "kernels": (2, 4, 2, 3, 3), "groups": 2} | change
    for name in {"input", "kernels", "bias"} & call.keys():
        call[name] = torch.zeros(call[name])
    with pytest.raises(error, match=message):
        per_image_conv2d(**call)


def test_integers_are_not_rounded_in_silence():
    offset = torch.full((1, 18), 0.5)
    with pytest.raises(TypeError, match="weight: expected a floating point type, got torch.int64"):
        sample_kernel(torch.arange(16).view(1, 1, 4, 4), offset, 3)
    with pytest.raises(TypeError, match="kernel_offset: expected a floating point type"):
        sample_kernel(torch.zeros(1, 1, 4, 4), offset.int(), 3)
    with pytest.raises(TypeError, match="input: expected a floating point type, got torch.int64"):
        per_image_conv2d(torch.ones(1, 1, 3, 3).long(), torch.ones(1, 1, 1, 1, 1))


@pytest.mark.parametrize("kind", [LocalDeformKernel2d, GlobalDeformKernel2d, DeformKernelConv2d])
def test_perturbations_of_single_taps_are_in_proportion_to_the_weight(kind):
    layer = kind(64, 64, 1, scope_size=2)
    for scale in 1.0, 1e-3:
        weight = scale * torch.randn(64, 64, 1, 1)
        layer.set_rigid_weight(weight)
        # Of four cells, all but their mean, which the tap reads.
        noise = (layer.weight - weight).std() / weight.std()
        assert noise.item() == pytest.approx(0.5 * 0.75**0.5, rel=0.05)


@pytest.mark.parametrize("kind", [LocalDeformKernel2d, GlobalDeformKernel2d])
def test_msra_fill_zeroes_the_bias(kind):
    layer = kind(4, 4, 3, groups=4)
    assert layer.bias.any()
    msra_fill(layer)
    assert not layer.bias.any()


perturbed = pytest.mark.parametrize(
    "kind, kernel",
    [(CondConv2d, 3), (LocalDeformKernel2d, (1, 3)), (GlobalDeformKernel2d, 1)],
)


@perturbed
def test_a_layer_that_starts_at_zero_learns_to_adapt(kind, kernel):
    """As the last convolutions of diffusion models do: equal experts or cells would never part."""
    torch.manual_seed(0)
    layer, x = kind(4, 6, kernel, bias=False), torch.randn(3, 4, 6, 7)
    layer.set_rigid_weight(torch.zeros(layer.rigid_shape))
    torch.testing.assert_close(layer(x), torch.zeros_like(layer(x)), rtol=0, atol=1e-6)
    layer(x).sin().add(1).square().sum().backward()
    (generator,) = layer.generators
    parts = generator.weight.grad.flatten(1)
    assert not torch.allclose(parts, parts[:1].expand_as(parts), rtol=1e-3, atol=0)


@perturbed
@pytest.mark.parametrize("value", [0.1, 1e-6])
def test_a_layer_of_a_constant_starts_as_it_and_learns_to_adapt(kind, kernel, value):
    """A multiplication of all pixels by little, for example, which noise of its own would drown."""
    layer = kind(4, 6, kernel, bias=False)
    weight = torch.full(layer.rigid_shape, value)
    layer.set_rigid_weight(weight)
    torch.testing.assert_close(layer.rigid_weight(), weight, rtol=1e-5, atol=0)
    assert layer.weight.std() > 0.01 * value


@pytest.mark.parametrize("num_experts", [2, 8])
def test_experts_of_zeros_part_as_far_as_those_of_a_drawn_weight(num_experts):
    layer = CondConv2d(16, 16, 3, num_experts=num_experts)
    drawn = (layer.weight - layer.weight.mean(0)).std()
    layer.set_rigid_weight(torch.zeros(layer.rigid_shape))
    torch.testing.assert_close(layer.weight.std(), drawn, rtol=0.05, atol=0)

"""Offsets made of features that the layers of a stage share."""

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dk_detectron import deformify, undeformify
from dk_detectron.analysis.ablation import generators
from dk_detectron.engine.optimizer import build_optimizer, parameter_groups
from dk_detectron.layers import KINDS, SHARED_FEATURES, LocalConv2d
from dk_detectron.layers.costs import count_multiply_adds, count_parameters
from dk_detectron.model_zoo import load_config
from dk_detectron.modeling import mobilenet_v2, resnet_dw
from dk_detectron.weights import convert

LOCAL = "local", "dcn", "dcn+local"
SHARED = {"conv3x3": "local", "offset_generator": "shared"}
FAMILIES = {
    "MNV2": mobilenet_v2,
    "R_50_DW": lambda **options: resnet_dw(
        width=4, stem_channels=8, res2_channels=16, norm="FrozenBN", **options
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def learnt(model: nn.Module) -> nn.Module:
    """Its offsets follow the input."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_generator." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def calls(modules: dict[str, nn.Module]) -> list[str]:
    """Names, in the order in which they run from now on."""
    seen = []
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    return seen


def shared(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n.endswith("shared_offset_generator")}


def with_gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    outputs = model(x)
    inputs = {"input": x, **dict(model.named_parameters())}
    loss = sum(output.square().sum() for output in outputs.values())
    found = torch.autograd.grad(loss, list(inputs.values()))
    return {**outputs, **dict(zip(inputs, found, strict=True))}


@pytest.mark.parametrize("kind", LOCAL)
def test_a_layer_makes_its_offsets_of_the_features(kind):
    """As of those that a full generator has for the same offsets everywhere."""
    arguments = {"stride": 2, "padding": 1, "groups": 3, "modulated": True, "offset_groups": 3}
    layer = learnt(KINDS[kind](6, 6, 3, offset_generator="shared", **arguments).double())
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    features = torch.randn(2, SHARED_FEATURES, 5, 6, dtype=torch.float64)

    class Given(nn.Module):
        def __init__(self, generator):
            super().__init__()
            self.generator = generator

        def forward(self, _):
            weight, bias = self.generator.weight.flatten(1), self.generator.bias
            return torch.einsum("of,nfhw->nohw", weight, features) + bias.view(-1, 1, 1)

    full = KINDS[kind](6, 6, 3, **arguments).double()
    full.weight, full.bias = layer.weight, layer.bias
    for name, generator in list(layer.named_children()):
        setattr(full, name, Given(generator))
    torch.testing.assert_close(layer(x, features), full(x), rtol=1e-10, atol=1e-12)
    assert "offset_generator=shared" in repr(layer)


def test_features_are_given_where_they_are_shared_and_only_there():
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="features: expected those that layers share, as offset_"):
        KINDS["local"](4, 4, 3, padding=1, groups=4, offset_generator="shared")(x)
    with pytest.raises(ValueError, match=r"features: expected None, .*'full', got .*\[1, 32, 8, 8"):
        KINDS["local"](4, 4, 3, padding=1, groups=4)(x, torch.randn(1, SHARED_FEATURES, 8, 8))


@every_family
@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_a_network_starts_as_the_rigid_one(family, stride_in_1x1):
    """With odd sizes, DCN in a stage, and 1x1 convolutions, which have generators of their own."""
    if family == "MNV2" and stride_in_1x1:
        pytest.skip("MobileNet-V2 has its strides in the 3x3")
    more = {"stride_in_1x1": stride_in_1x1} if family == "R_50_DW" else {}
    rigid = FAMILIES[family](**more).double().eval()
    model = FAMILIES[family](
        **SHARED, conv1x1={"res3": "local"}, data_offset=[False, True, False, False],
        modulated=True, **more,
    ).double().eval()  # fmt: skip
    found = model.load_state_dict(rigid.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("_generator." in name for name in found.missing_keys)
    x = torch.randn(2, 3, 91, 75, dtype=torch.float64)
    for name, expected in rigid(x).items():
        torch.testing.assert_close(model(x)[name], expected, rtol=1e-9, atol=1e-9)


@every_family
def test_each_stage_predicts_its_features_once(family):
    model = learnt(FAMILIES[family](**SHARED))
    first = [f"{stage}.0" for stage in ("res2", "res3", "res4", "res5")]
    first = ["stem.block"] * (family == "MNV2") + first
    assert list(shared(model)) == [f"{block}.shared_offset_generator" for block in first]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LocalConv2d)}
    assert len(layers) == (17 if family == "MNV2" else 16)
    ran = calls(shared(model) | {n: m.kernel_offset_generator for n, m in layers.items()})
    model(torch.randn(1, 3, 64, 96))
    stages = [name.rpartition(".conv2")[0] for name in layers]
    expected = []
    for block, layer in zip(stages, layers, strict=True):
        expected += [f"{block}.shared_offset_generator"] * (block in first) + [layer]
    assert ran == expected
    assert not shared(FAMILIES[family](conv3x3="local", offset_generator="separable"))
    assert not shared(FAMILIES[family](offset_generator="shared"))  # nothing local


@every_family
def test_all_of_it_learns_from_the_second_step_on(family):
    model = FAMILIES[family](**SHARED)
    groups = parameter_groups(model, 0.01, 0.1, offset_lr_factor=0.5)
    rates = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["param_names"]}
    name = "res3.0.shared_offset_generator"
    assert [rates[f"{name}.{part}"] for part in ("depthwise.weight", "weight", "bias")] == [
        (0.005, 0.1), (0.005, 0.1), (0.005, 0.0),
    ]  # fmt: skip
    optimizer = build_optimizer(groups, lr=0.01, clip_offset_gradients=0.05)
    x = torch.randn(2, 3, 64, 96)
    for _ in range(2):
        optimizer.zero_grad()
        sum(output.square().mean() for output in model(x).values()).backward()
        optimizer.step()
    for name, generator in shared(model).items():
        gradients = [p.grad for p in generator.parameters()]
        assert all(gradient.any() for gradient in gradients), name
        assert torch.cat([g.flatten() for g in gradients]).norm() <= 0.05 * 1.001


@every_family
def test_gradient_checkpointing_gives_the_same_bits(family):
    plain = learnt(FAMILIES[family](**SHARED))
    spared = FAMILIES[family](**SHARED, gradient_checkpointing=True)
    spared.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 96)
    expected, found = (with_gradients(model, x) for model in (plain, spared))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_what_it_costs():
    """By hand, of MobileNet-V2's res3 of 3 blocks, its input of 24 channels, at 4 x 6 places."""
    one, two = (mobilenet_v2(conv3x3={"res3": "local"}, offset_generator=g, out_features=["res3"])
                for g in ("full", "shared"))  # fmt: skip
    full = [9 * 18 * channels for channels in (144, 192, 192)]
    features = 24 * (9 + SHARED_FEATURES)
    head = SHARED_FEATURES * 18
    saved = count_parameters(one) - count_parameters(two)
    assert saved == sum(full) - features - SHARED_FEATURES - 3 * head
    x = torch.randn(1, 3, 32, 48)
    costs = [sum(count_multiply_adds(model, x).values()) for model in (one, two)]
    assert costs[0] - costs[1] == 24 * (sum(full) - features - 3 * head)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_compiles_to_one_graph_for_all_sizes(checkpointing):
    torch._dynamo.reset()
    model = learnt(resnet_dw(
        width=2, stem_channels=4, res2_channels=8, norm="FrozenBN", out_features=["res2"],
        gradient_checkpointing=checkpointing, **SHARED,
    ))  # fmt: skip
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in (64, 96), (48, 80):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x)["res2"], model(x)["res2"], rtol=1e-4, atol=1e-5)
        gradients = [
            torch.autograd.grad(m(x)["res2"].square().sum(), list(model.parameters()))
            for m in (compiled, model)
        ]
        for found, expected in zip(*gradients, strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(scale, 1))
    assert counter.frame_count == 1


def test_by_the_key_frozen_and_converted():
    opts = ["MODEL.DEFORM_KERNEL.OFFSET_GENERATOR", "shared", "MODEL.BACKBONE.FREEZE_AT", 2]
    model = build_backbone(load_config("ImageNet/MNV2_dk_l3.yaml", opts))
    learn = {n: all(p.requires_grad for p in m.parameters()) for n, m in shared(model).items()}
    assert list(learn.values()) == [False, False, True, True, True]
    rigid = build_backbone(load_config("ImageNet/MNV2.yaml"))
    holder = nn.ModuleDict({"backbone": model})
    converted, report = convert(rigid.state_dict(), holder)
    report.check()
    holder.load_state_dict(holder.state_dict() | converted)
    x = torch.randn(1, 3, 64, 96)
    for name, expected in rigid.eval()(x).items():
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(model.eval()(x)[name], expected, rtol=0, atol=1e-5 * scale)
    full = build_backbone(load_config("ImageNet/MNV2_dk_l3.yaml"))
    _, report = convert(full.state_dict(), holder)
    assert any("expected shape [18, 32, 1, 1], got [18" in line for line in report.unexpected)


def test_other_networks_hand_nothing_on():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="offset_generator: expected 'full' or 'separable' in a"):
        deformify(model, offset_generator="shared")
    assert type(model[0]) is nn.Conv2d
    opts = ["MODEL.DEFORM_KERNEL.OFFSET_GENERATOR", "shared"]
    cfg = load_config("COCO-Detection/faster_rcnn_R_50_FPN_dk_l3_1x.yaml", opts)
    with pytest.raises(ValueError, match="MODEL.DEFORM_KERNEL.OFFSET_GENERATOR: expected 'full'"):
        build_backbone(cfg)


@every_family
def test_made_rigid_again_nothing_is_left(family):
    torch.manual_seed(0)
    model, rigid = FAMILIES[family](**SHARED).eval(), FAMILIES[family]().eval()
    x = torch.randn(1, 3, 64, 96)
    before = model(x)
    assert all(".conv2" in name for name in undeformify(model))
    assert model.state_dict().keys() == rigid.state_dict().keys()
    for name, tensor in model(x).items():
        scale = float(tensor.detach().abs().max())
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5 * scale)


def test_what_is_shared_is_no_convolution_to_change_and_predicts_no_offsets():
    model = mobilenet_v2(conv3x3={"res3": "local"}, offset_generator="shared")
    report = deformify(model)  # the rigid 3x3 of the other stages
    assert not any("generator" in name for name in [*report.changed, *report.kept])
    assert len(generators(model)) == 17 and not set(generators(model)) & {*shared(model).values()}

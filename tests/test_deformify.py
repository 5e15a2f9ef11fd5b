"""Any network made deformable in place: the same outputs, names, hooks and weights, and back."""

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

from dk_detectron import deformify, undeformify
from dk_detectron.layers import (
    KINDS,
    AdaptiveConv2d,
    CondConv2d,
    DeformConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
    SeparableConv2d,
)
from dk_detectron.layers.costs import count_multiply_adds, count_parameters
from dk_detectron.model_zoo import CONFIGS, load_config
from dk_detectron.modeling import adapt_resnet
from dk_detectron.weights import convert

pytestmark = pytest.mark.filterwarnings("ignore:deform_kernel_conv2d runs composed")


class UNet(nn.Module):
    """Dense, grouped, strided, dilated, transposed, reflecting, tied: one convolution of each."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.inner = nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, (3, 5), padding="same", groups=4), nn.SiLU()
        )
        self.dilated = nn.Conv2d(2 * channels, 2 * channels, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.mirrored = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.tied = nn.Conv2d(channels, channels, 3, padding=1)
        self.tied_too = nn.Conv2d(channels, channels, 3, padding=1)
        self.tied_too.weight = self.tied.weight
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Conv2d(channels, 2, 1)
        self.again = [self.dilated]  # as detectron2's FPN keeps its convolutions

    def forward(self, x):
        x = self.stem(x)
        deep = self.inner(self.down(x))
        up = self.up(self.again[0](self.dilated(deep)))
        return self.head(self.norm(self.tied_too(self.tied(self.mirrored(up + x)))))


NETWORKS = {
    "ResNet-50": (torchvision.models.resnet50, 16),
    "MobileNet-V2": (torchvision.models.mobilenet_v2, 17),
    "MobileNet-V3": (torchvision.models.mobilenet_v3_small, 11),
    "ConvNeXt": (torchvision.models.convnext_tiny, 18),
    "EfficientNet": (torchvision.models.efficientnet_b0, 16),
    "U-Net": (UNet, 3),
    "detectron2's ResNet-50 FPN": (
        lambda: build_backbone(
            load_config(
                CONFIGS / "COCO-Detection" / "faster_rcnn_R_50_FPN_dk_l3_1x.yaml",
                ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"],
            )
        ),
        20,  # those of the pyramid too
    ),
}


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    found = list(found.values()) if isinstance(found, dict) else [found]
    return torch.cat([tensor.flatten() for tensor in found])


def randomize_norms(model: nn.Module) -> None:
    """Statistics that are not those of a fresh network, whose features vanish."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_the_same_before_and_after_and_back(name):
    """In float64, where what lifting a kernel into a scope rounds is 1e-16."""
    make, count = NETWORKS[name]
    model = make().eval().double()
    randomize_norms(model)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    names, classes = list(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    published = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = outputs(model, x)
        scale = float(expected.abs().max())
        close = {"rtol": 1e-9, "atol": 1e-9 * scale}
        report = deformify(model)
        assert len(report.changed) == count
        assert all(isinstance(model.get_submodule(n), LocalDeformKernel2d) for n in report.changed)
        torch.testing.assert_close(outputs(model, x), expected, **close)
        assert [key for key in model.state_dict() if "_generator." not in key] == names

        # Weights of the rigid network, loaded afterwards, and strictly.
        with_weights = copy.deepcopy(model)
        for parameter in with_weights.parameters():
            parameter.normal_(std=0.01)
        with_weights.load_state_dict(published)
        torch.testing.assert_close(outputs(with_weights, x), expected, **close)

        for layer in map(model.get_submodule, report.changed):
            layer.kernel_offset_generator.weight.normal_(std=0.1)
        # ConvNeXt adds a millionth of each block.
        assert (outputs(model, x) - expected).abs().max() > 1e-7 * scale
        with pytest.raises(ValueError, match=f"got {count} of {count} layers that follow"):
            undeformify(model)
        assert undeformify(with_weights) == report.changed
        torch.testing.assert_close(outputs(with_weights, x), expected, **close)
    assert list(with_weights.state_dict()) == names
    plain = {n: nn.Conv2d if c is Conv2d else c for n, c in classes.items()}
    for key, module in with_weights.named_modules():
        assert type(module) in (plain[key], Conv2d), key


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_with_the_same_outputs(kind):
    model = UNet().eval().double()
    x = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    expected = model(x)
    report = deformify(model, kind)
    assert {type(model.get_submodule(n)) for n in report.changed} == {KINDS[kind]}
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    for parameter in model.parameters():
        assert parameter.requires_grad
    undeformify(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_what_stays_and_why():
    report = deformify(UNet())
    assert report.changed == ["down", "inner.0", "dilated"]
    assert report.kept == {
        "stem": "a stem: it sees the picture itself",
        "up": "a ConvTranspose2d, of which there is no adaptive kind",
        "mirrored": "padding_mode: expected 'zeros', got 'reflect'",
        "tied": "another module has the same weight",
        "tied_too": "another module has the same weight",
        "head": "1x1",
    }
    text = str(report)
    assert "| now LocalDeformKernel2d " in text and "| kept: 1x1 " in text


def test_costs_of_the_change():
    model, x = UNet().train(), torch.randn(1, 3, 16, 24)
    rigid = copy.deepcopy(model)
    report = deformify(model, inputs=(x,), offset_generator="separable")
    assert report.parameters == (count_parameters(rigid), count_parameters(model))
    costs = [sum(count_multiply_adds(m, x).values()) for m in (rigid, model)]
    assert report.multiply_adds == tuple(costs) and costs[0] < costs[1]
    assert model.training and model.inner.training and rigid.training
    before, after = report.parameters
    assert f"parameters: {before:,} + {after - before:,} = {after:,}" in str(report)


def test_where():
    def chosen(where):
        return deformify(UNet(), where=where).changed

    assert chosen("d*") == ["down", "dilated"]
    assert chosen(["inner.*", "head", "dil*"]) == ["inner.0", "dilated"]  # the head is 1x1
    assert chosen(lambda name, conv: conv.kernel_size == (1, 1)) == ["head"]
    for where, message in (
        ("layer1.*", "where: expected patterns of .* names, such as stem, .* got 'layer1.*'"),
        (["down", "x"], "got 'x'"),
        ("head", "where: expected convolutions to change, got none:\n(?s:.*)kept: 1x1"),
        (lambda name, conv: name == "up", "a ConvTranspose2d, of which"),
    ):
        model = UNet()
        with pytest.raises(ValueError, match=message):
            deformify(model, where=where)
        assert not any(isinstance(m, AdaptiveConv2d) for m in model.modules())


def test_bad_arguments_leave_the_model_as_it_was():
    model = UNet()
    with pytest.raises(ValueError, match="kind: expected one of local, .* got 'lokal'"):
        deformify(model, "lokal")
    with pytest.raises(TypeError, match="scop_size"):
        deformify(model, scop_size=5)
    with pytest.raises(ValueError, match="offset_generator: expected one of full, separable"):
        deformify(model, offset_generator="cheap")
    message = r"^scope_size: expected at least the kernel_size .* got 2:\n(?s:.*)3 \| down"
    with pytest.raises(ValueError, match=message):
        deformify(model, scope_size=2)
    assert not any(isinstance(m, AdaptiveConv2d) for m in model.modules())


@pytest.mark.parametrize(
    "wrapper", [nn.parallel.DistributedDataParallel, FullyShardedDataParallel, FSDPModule]
)
def test_wrapped_networks_would_not_know_the_new_parameters(wrapper):
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model.__class__ = type("Wrapped", (wrapper, nn.Sequential), {})  # as fully_shard does
    for change in deformify, undeformify:
        for wrapped in model, nn.Sequential(model):
            with pytest.raises(ValueError, match="deformify, or undeformify, before wrapping"):
                change(wrapped)
    assert not any(isinstance(m, AdaptiveConv2d) for m in model.modules())


def test_a_convolution_of_its_own_way_is_left_alone():
    class Same(nn.Conv2d):  # as timm's Conv2dSame
        def forward(self, x):
            return super().forward(nn.functional.pad(x, [0, 1, 0, 1]))

    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)

    class Doubled(Conv2d):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = nn.Sequential(*(c(8, 8, 3) for c in (nn.Conv2d, Same, Standardised, Doubled)))
    for method in "forward", "_conv_forward":
        patched = nn.Conv2d(8, 8, 3)
        setattr(patched, method, lambda x, *_: x)
        model.append(patched)
    report = deformify(model)
    assert report.changed == ["0"]
    kinds = ["Same", "Standardised", "Doubled", "Conv2d", "Conv2d"]
    assert list(report.kept.values()) == [
        f"a {k}, which convolves in a way of its own" for k in kinds
    ]
    with pytest.raises(ValueError, match="uninitialized parameter"):
        deformify(nn.Sequential(nn.LazyConv2d(8, 3)))


@pytest.mark.parametrize(
    "name, make, remove",
    [
        ("weight", parametrizations.weight_norm, parametrize.remove_parametrizations),
        ("weight", parametrizations.spectral_norm, parametrize.remove_parametrizations),
        ("weight", nn.utils.weight_norm, nn.utils.remove_weight_norm),
        ("weight", nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        ("weight", prune.identity, prune.remove),
        ("bias", prune.identity, prune.remove),
    ],
)
def test_a_tensor_that_is_made_anew_is_left_alone_until_its_maker_is_removed(name, make, remove):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), make(nn.Conv2d(8, 8, 3), name))
    state = {key: tensor.clone() for key, tensor in model[1].state_dict().items()}
    report = deformify(model)
    assert report.changed == ["0"]
    for key, tensor in model[1].state_dict().items():  # spectral_norm's change if it is asked
        assert torch.equal(tensor, state[key])
    assert report.kept["1"].startswith(f"its {name} is made by a parametrization or by pruning")
    x = torch.randn(1, 8, 9, 9)
    remove(model[1], name)
    expected = model(x)
    assert deformify(model).changed == ["1"]
    torch.testing.assert_close(model(x), expected)


def test_weights_that_no_adaptive_layer_can_have():
    with torch.inference_mode():
        fixed = nn.Conv2d(8, 8, 3)
    report = deformify(
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, dtype=torch.complex64), fixed)
    )
    assert report.changed == ["0"]
    assert report.kept == {
        "1": "weight: expected a floating point type, got torch.complex64",
        "2": "its weight was made in torch.inference_mode: make the network outside of it",
    }


def test_what_is_made_in_inference_mode_can_be_trained():
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3)), torch.randn(1, 8, 9, 9)
    for change in deformify, undeformify:
        with torch.inference_mode():
            change(model)
        model(x).sum().backward()


def test_scripted_convolutions_are_left_alone():
    scripted, plain = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3))), nn.Conv2d(8, 8, 3)
    traced = torch.jit.trace(nn.Conv2d(8, 8, 3), torch.randn(1, 8, 9, 9))
    report = deformify(nn.Sequential(scripted, traced, plain))
    reason = "scripted: deformify before torch.jit.script or trace"
    assert report.changed == ["2"] and report.kept == {"0.0": reason, "1": reason}
    with pytest.raises(ValueError, match=f"got none:\n(?s:.*)kept: {reason}"):
        deformify(scripted)


@pytest.mark.parametrize(
    "name, attached",
    [
        ("norm", nn.BatchNorm2d(8)),
        ("activation", nn.ReLU()),
        ("activation", nn.functional.relu),
        ("gain", nn.Parameter(torch.ones(()))),
        ("scale", nn.Buffer(torch.ones(()))),
        ("activation_post_process", nn.Identity()),  # as torch.ao attaches an observer
    ],
)
def test_what_an_adaptive_layer_cannot_hold(name, attached):
    """The module around a convolution may use it, as ``conv.norm(conv(x))``."""
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(2)))
    setattr(model[1], name, attached)
    report = deformify(model)
    assert report.changed == ["0"]
    assert report.kept["1"].startswith(f"it holds {name}, which a layer of another kind")
    assert getattr(model[1], name) is attached


def prune_weight(layer: nn.Module) -> None:
    prune.identity(layer, "weight")


@pytest.mark.parametrize(
    "attach, message",
    [
        (prune_weight, "got 0: its weight is made by .* prune.remove"),
        (nn.utils.weight_norm, "got 0: its weight is made by"),
        (parametrizations.weight_norm, "got 0: its weight is made by"),
        (lambda layer: layer.register_buffer("scale", torch.ones(())), "got 0: it holds scale"),
    ],
)
def test_what_a_rigid_convolution_cannot_hold(attach, message):
    """Its maker's hook would look for it in the next forward pass, long after."""
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False)), torch.randn(1, 8, 9, 9)
    deformify(model)
    attach(model[0])
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        undeformify(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_of_others_stay(kind):
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model[0].tag = 3
    attributes = list(vars(model[0]))
    deformify(model, kind)
    assert model[0].tag == 3 and not hasattr(model[0], "transposed")
    undeformify(model)
    assert model[0].tag == 3 and sorted(vars(model[0])) == sorted(attributes)


def test_hooks_norms_training_and_gradients_stay():
    norm = nn.BatchNorm2d(8)
    conv = Conv2d(8, 8, 3, padding=1, norm=norm, activation=nn.functional.relu)
    conv.weight.requires_grad_(False)
    conv.eval()
    norm.train()
    model = nn.Sequential(conv)
    seen = []
    handle = conv.register_forward_hook(lambda *_: seen.append("forward"))
    conv.register_state_dict_post_hook(lambda *_: seen.append("state"))
    bias, x = conv.bias, torch.randn(1, 8, 6, 6)
    expected = copy.deepcopy(model).requires_grad_(False)(x)
    seen.clear()
    deformify(model, "dcn+local")
    assert model[0] is conv and conv.norm is norm and conv.bias is bias
    assert not conv.training and norm.training
    assert [n for n, p in conv.named_parameters() if p.requires_grad] == [
        "bias", "norm.weight", "norm.bias",
    ]  # fmt: skip
    torch.testing.assert_close(model(x), expected)
    model.state_dict()
    assert seen == ["forward", "state"]
    handle.remove()
    model(x)
    assert seen == ["forward", "state"]


def test_generators_are_no_convolutions_to_change():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 5))
    deformify(model, where="0", offset_generator="separable")
    report = deformify(model, "dcn")
    assert report.changed == ["1"] and report.kept == {}
    assert isinstance(model[0].kernel_offset_generator, SeparableConv2d)
    with pytest.raises(ValueError, match="where: expected convolutions to change, got none"):
        deformify(model)


@pytest.mark.parametrize("name", ["gate_generator", "shared_offset_generator"])
def test_modules_of_others_that_have_the_names_of_generators(name):
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    model.add_module(name, nn.Conv2d(8, 8, 3))
    assert deformify(model).changed == ["0", name]
    assert undeformify(model) == ["0", name]
    assert type(model.get_submodule(name)) is nn.Conv2d


@pytest.mark.parametrize("where", ["b", lambda name, conv: name == "b"])
def test_a_shared_convolution_is_found_under_any_of_its_names(where):
    conv = nn.Conv2d(8, 8, 3)
    model = nn.ModuleDict({"a": conv, "b": conv, "c": nn.Conv2d(8, 8, 3)})
    report = deformify(model, where=where)
    assert report.changed == ["a"] and report.kept == {"c": "not chosen by where"}


def test_undeformify_knows_what_is_rigid():
    """Offsets that are the same for every input make a rigid kernel; moved data do not."""
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    for layer in (
        LocalDeformKernel2d(6, 6, 3, groups=6).double(),
        GlobalDeformKernel2d(6, 4, 3, groups=2).double(),
        CondConv2d(6, 4, 3, groups=2).double(),
    ):
        (generator,) = layer.generators
        nn.init.normal_(generator.bias)
        model = nn.Sequential(layer)
        expected = model(x)
        undeformify(model)
        assert type(model[0]) is nn.Conv2d
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    moved = DeformConv2d(6, 6, 3, groups=6)
    nn.init.normal_(moved.data_offset_generator.bias)
    with pytest.raises(ValueError, match="got 1 of 1 layers that follow their input: 0. Load"):
        undeformify(nn.Sequential(moved))


def test_layers_of_one_weight_are_not_untied():
    model = nn.Sequential(*(LocalDeformKernel2d(6, 6, 3, groups=6) for _ in range(2)))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="become rigid, got 0: another module has the same weight"):
        undeformify(model)
    assert model[0].weight is model[1].weight and type(model[0]) is LocalDeformKernel2d


# ---- detectron2's ResNet
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["R_50", "X_50_32x4d"])
def test_the_configured_resnet_is_detectron2s_with_other_3x3s(name):
    """Loaded from torchvision's weights as published, before and after, it gives its features."""
    zoo = {"R_50": torchvision.models.resnet50, "X_50_32x4d": torchvision.models.resnext50_32x4d}
    theirs = zoo[name]().eval()
    randomize_norms(theirs)
    config = CONFIGS / "COCO-Detection" / f"faster_rcnn_{name}_FPN_dk_l3_1x.yaml"
    backbone = build_backbone(load_config(config)).bottom_up.eval()
    layers = [n for n, m in backbone.named_modules() if type(m) is LocalDeformKernel2d]
    blocks = zip(("res2", "res3", "res4", "res5"), (3, 4, 6, 3), strict=True)
    assert layers == [f"{stage}.{i}.conv2" for stage, count in blocks for i in range(count)]
    assert {backbone.get_submodule(n).groups for n in layers} == {1 if name == "R_50" else 32}
    converted, report = convert(theirs.state_dict(), backbone, "resnet.pth")
    report.check()
    assert report.kind == "torchvision's ResNet"
    assert len(report.resampled) == 16 and report.unused == ["fc.weight", "fc.bias"]
    backbone.load_state_dict({**backbone.state_dict(), **converted})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = nn.Sequential(*list(theirs.children())[:-2])(x)
        # float32 through fifty layers
        torch.testing.assert_close(
            backbone(x)["res5"], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


def test_stages_kinds_and_keys_of_the_configured_resnet():
    config = CONFIGS / "COCO-Detection" / "faster_rcnn_R_50_FPN_dk_l3_1x.yaml"

    def build(*opts):
        return build_backbone(load_config(config, opts)).bottom_up

    data = "MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE", [False, True, True, True]
    backbone = build(*data, "MODEL.DEFORM_KERNEL.CONV_1X1", "global", "MODEL.BACKBONE.FREEZE_AT", 2)
    assert type(backbone.res2[0].conv2) is LocalDeformKernel2d
    assert type(backbone.res3[0].conv2) is KINDS["dcn+local"]
    assert {type(backbone.res3[0].get_submodule(f"conv{k}")) for k in (1, 3)} == {
        GlobalDeformKernel2d
    }
    assert type(backbone.res3[0].shortcut) is Conv2d
    assert not any(p.requires_grad for p in backbone.res2.parameters())
    assert all(p.requires_grad for p in backbone.res3.parameters())
    for key, value in (
        ("MODEL.DEFORM_KERNEL.CONV_3X3", "lokal"),
        ("MODEL.BACKBONE.GRADIENT_CHECKPOINTING", True),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]),
    ):
        with pytest.raises(ValueError, match=f"{key}: expected"):
            build(key, value)
    groups = "MODEL.DEFORM_KERNEL.OFFSET_GROUPS"
    for number, kind in (5, "rigid"), (128, "local"):  # which no layer can have; not those of res2
        with pytest.raises(ValueError, match=f"^{groups}: .* 64 in_channels, got {number}"):
            build(groups, number, "MODEL.DEFORM_KERNEL.CONV_1X1", kind)
    with pytest.raises(ValueError, match="conv3x3: expected one of rigid"):
        adapt_resnet(backbone, conv3x3="lokal")


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/*_FPN_dk_l3_1x.yaml")), ids=lambda p: p.stem
)
def test_the_new_configurations_have_their_files(path: Path):
    """Faster and Mask R-CNN of each: whether the mask's keys are what the name says."""
    cfg = load_config(path)
    assert cfg.MODEL.MASK_ON == path.stem.startswith("mask_rcnn")
    assert cfg.MODEL.DEFORM_KERNEL.CONV_3X3 == "local"


def test_what_is_frozen_is_frozen_when_it_is_rigid_again():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[0].weight.requires_grad_(False)
    deformify(model)
    undeformify(model)
    assert [conv.weight.requires_grad for conv in model] == [False, True]

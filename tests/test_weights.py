"""Weights arrive whole, in the right place, with the same outputs; and nothing else arrives."""

import argparse
import errno
import gzip
import logging
import os
import re
import runpy
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from dk_detectron.layers import AdaptiveConv2d, CondConv2d, GlobalDeformKernel2d
from dk_detectron.model_zoo import CONFIGS, load_config, paper_rows
from dk_detectron.weights import (
    Checkpointer,
    CheckpointError,
    UnreadableCheckpointError,
    convert,
    convert_file,
    files,
    read_checkpoint,
    write_checkpoint,
)
from dk_detectron.weights.names import part, pixels_conflict

ROOT = Path(__file__).parent.parent
DETECTORS = [pytest.param(row["config"], id=Path(row["config"]).stem) for row in paper_rows(3, 4)]
SMALL_HEADS = ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8]
# A frozen classifier is small enough for most tests, and the quickest to build.
MNV2, MNV2_DK = "ImageNet/MNV2.yaml", "ImageNet/MNV2_dk_g1_l3.yaml"
R_50_DW = "ImageNet/R_50_DW.yaml"
# Convolutions of a quarter of the width: float64 is slow.
NARROW = ["MODEL.RESNETS.WIDTH_PER_GROUP", 16, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
DETECTOR = "COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml"


def build(config: str, *opts) -> nn.Module:
    heads = SMALL_HEADS if "COCO" in config else []
    return build_model(load_config(CONFIGS / config, [*heads, *opts])).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Random statistics and affine parameters in every norm, biases and generators as well."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
        for name, parameter in model.named_parameters():
            if "_generator." in name or name.startswith("linear."):
                parameter.normal_(std=0.05)
    return model.eval()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def images(size: int = 64, **options) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(**options)


@pytest.fixture(scope="module")
def rigid() -> dict[str, nn.Module]:
    """A random rigid classifier of each family."""
    torch.manual_seed(0)
    resnet = R_50_DW, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"]
    return {
        "MNV2": randomise(build(MNV2, "MODEL.MOBILENETV2.OUT_FEATURES", ["res2", "res5"])),
        "R_50_DW": randomise(build(*resnet)),
        "narrow R_50_DW": randomise(build(*resnet, *NARROW)),
    }


@pytest.fixture(scope="module")
def torchvision_net() -> nn.Module:
    torch.manual_seed(0)
    net = randomise(torchvision.models.mobilenet_v2())
    nn.init.normal_(net.classifier[1].bias)
    return net


def timm_state_dict(net: nn.Module) -> dict[str, torch.Tensor]:
    """torchvision's weights under the names of timm's mobilenetv2_100, in the order of its layers.

    The repeats are those of timm's ``_gen_mobilenet_v2``.
    """
    names = ["conv_stem", "bn1"]
    names += [f"blocks.0.0.{leaf}" for leaf in ("conv_dw", "bn1", "conv_pw", "bn2")]
    for i, repeats in enumerate([2, 3, 4, 3, 3, 1], start=1):
        for j in range(repeats):
            leaves = "conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"
            names += [f"blocks.{i}.{j}.{leaf}" for leaf in leaves]
    names += ["conv_head", "bn2", "classifier"]
    modules = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    return {
        f"{name}.{key}": tensor
        for name, module in zip(names, modules, strict=True)
        for key, tensor in module.state_dict().items()
    }


# Equal outputs


def zero_generators(layer: AdaptiveConv2d, weight: torch.Tensor) -> None:
    for generator in layer.generators:
        for parameter in generator.parameters():
            nn.init.zeros_(parameter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("config", DETECTORS)
def test_every_detector_starts_with_the_rigid_features(config, dtype, rigid, tmp_path, monkeypatch):
    """In float32 through files, as a user does it; in float64 in memory."""
    family, opts = "MNV2" if "MNV2" in config else "R_50_DW", []
    if family == "R_50_DW" and dtype == torch.float64:
        family, opts = "narrow R_50_DW", NARROW
    source = rigid[family]
    with monkeypatch.context() as patch:
        # Adaptive weights stay what memory holds: quicker, and none may be left.
        patch.setattr(AdaptiveConv2d, "set_rigid_weight", zero_generators)
        model = build(config, *opts).to(dtype)
    if dtype == torch.float32:
        torch.save(source.state_dict(), tmp_path / "rigid.pth")
        report = convert_file(tmp_path / "rigid.pth", tmp_path / "converted.pth", model)
        Checkpointer(model).resume_or_load(str(tmp_path / "converted.pth"), resume=False)
    else:
        state = {name: t.to(dtype) for name, t in source.state_dict().items()}
        converted, report = convert(state, model)
        report.check()
        model.load_state_dict(converted, strict=False)
    in_backbone = [name for name in report.initialised if name.startswith("backbone.bottom_up.")]
    assert all("_offset_generator." in name or "gate_generator." in name for name in in_backbone)
    assert report.unused == ["linear.weight", "linear.bias"]
    x = images(dtype=dtype)
    with torch.no_grad():
        features = model.backbone.bottom_up(x)
        expected = source.to(dtype).backbone(x)
    source.float()
    for name in "res2", "res5":
        limit = 1e-12 if dtype == torch.float64 else 1e-5
        assert relative_error(features[name], expected[name]) < limit, name


@pytest.mark.parametrize("naming", ["torchvision", "timm"])
@pytest.mark.parametrize("variant", ["MNV2", "MNV2_dk_g1_l3", "MNV2_scc_dk_l3", "MNV2_dcn_dk_l3"])
def test_public_networks_keep_features_and_logits(naming, variant, torchvision_net):
    net = torchvision_net.double()
    state = net.state_dict() if naming == "torchvision" else timm_state_dict(net)
    model = build(f"ImageNet/{variant}.yaml").double()
    converted, report = convert(state, model)
    report.check()
    assert report.unused == [] and len(report.resampled) == len(
        [n for n, p in model.named_parameters() if n in converted and p.shape != _rigid(model, n)]
    )
    model.load_state_dict(converted, strict=False)
    x = images(dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(model.backbone(x)["res5"], net.features(x)) < 1e-12
        assert relative_error(model(x), net(x)) < 1e-12
    net.float()


def detectron2_names(state: dict) -> dict:
    """As of its tools/convert-torchvision-to-d2.py."""
    renamed = {}
    for name, tensor in state.items():
        name = name if "layer" in name else f"stem.{name}"
        name = re.sub(r"layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("naming", [dict, detectron2_names], ids=["torchvision", "detectron2"])
def test_torchvisions_resnet_keeps_its_logits_and_where_its_stride_is(naming):
    net = randomise(torchvision.models.resnet50(width_per_group=16))
    narrow = "ImageNet/R_50.yaml", "MODEL.RESNETS.WIDTH_PER_GROUP", 16
    model = build(*narrow)
    converted, report = convert(naming(net.state_dict()), model)
    report.check()
    assert report.kind == "torchvision's ResNet" and not report.unused
    model.load_state_dict({**model.state_dict(), **converted})
    with torch.no_grad():
        assert relative_error(model(images()), net(images())) < 1e-5
    other = build(*narrow, "MODEL.RESNETS.STRIDE_IN_1X1", True)
    with pytest.raises(CheckpointError, match="in the 3x3: MODEL.RESNETS.STRIDE_IN_1X1 False"):
        convert(naming(net.state_dict()), other)[1].check()


def test_a_resnet_of_caffe2():
    """Its names are not made up for; as detectron2 has them, its classifier arrives too."""
    state = {"conv1_w": torch.ones(64, 3, 7, 7), "fc1000_w": torch.ones(1000, 2048)}
    model = build("ImageNet/R_50.yaml", "MODEL.RESNETS.WIDTH_PER_GROUP", 16)
    with pytest.raises(CheckpointError, match="got Caffe2's .* by .*convert_basic_c2_names first"):
        convert(state, model)
    names = convert_basic_c2_names([*state])
    _, report = convert(dict(zip(names, state.values(), strict=True)), model)
    assert report.matched == ["backbone.stem.conv1.weight", "linear.weight"]


def _rigid(model: nn.Module, name: str) -> torch.Size:
    layer = model.get_submodule(name.rpartition(".")[0])
    is_weight = name.endswith(".weight") and hasattr(layer, "rigid_shape")
    return torch.Size(layer.rigid_shape) if is_weight else model.get_parameter(name).shape


def test_every_norm_has_the_epsilon_of_the_sources(torchvision_net):
    norms = nn.BatchNorm2d | FrozenBatchNorm2d
    nets = [torchvision_net, build(DETECTOR), build(MNV2), build(R_50_DW)]
    assert {m.eps for net in nets for m in net.modules() if isinstance(m, norms)} == {1e-5}


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("[!.]*/[!B]*.yaml")), ids=lambda p: p.stem)
def test_images_reach_the_network_as_public_weights_expect(config):
    expected = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2.transforms()
    cfg = load_config(config)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([255 * value for value in expected.mean])
    assert cfg.MODEL.PIXEL_STD == pytest.approx([255 * value for value in expected.std])


def test_conversion_repeats_exactly_and_leaves_the_seed_alone(rigid):
    model = build("COCO-Detection/faster_rcnn_MNV2_FPN_scc_dk_l3_1x.yaml")
    before = torch.get_rng_state()
    first, _ = convert(rigid["MNV2"].state_dict(), model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    second, _ = convert(rigid["MNV2"].state_dict(), model)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_what_symmetry_would_freeze_starts_apart(rigid):
    """Experts, and cells that a single tap is sampled from, differ after conversion."""
    for config, kind in (MNV2_DK, GlobalDeformKernel2d), ("ImageNet/MNV2_scc.yaml", CondConv2d):
        model = build(config)
        converted, _ = convert(rigid["MNV2"].state_dict(), model)
        layers = [name for name, m in model.named_modules() if isinstance(m, kind)]
        assert layers
        for name in layers:
            weight = converted[f"{name}.weight"]
            axis = 0 if kind is CondConv2d else -1
            assert weight.std(axis).mean() > 0.05 * weight.std(), name


# This project's own checkpoints


@pytest.mark.parametrize("sizes", [(2, 5), (3, 6)], ids=["odd", "even"])
def test_a_checkpoint_of_smaller_scopes_gives_the_same_features(sizes):
    """Learnt offsets included; back again there is no way, and the reason is said."""
    opts = [f"MODEL.DEFORM_KERNEL.SCOPE_SIZE_{k}" for k in ("1X1", "3X3")]
    source = randomise(build(MNV2_DK)).double()
    larger = build(MNV2_DK, *(x for pair in zip(opts, sizes, strict=True) for x in pair)).double()
    converted, report = convert(source.state_dict(), larger, "source.pth")
    report.check()
    scopes = 17 if sizes[0] == 2 else 17 + 34
    weights = [name for name in report.resampled if name.endswith("conv2.weight")]
    assert len(report.resampled) == 2 * scopes and len(weights) == 17
    assert not report.initialised and not report.unused
    larger.load_state_dict({**larger.state_dict(), **converted})
    x = images(dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(larger(x), source(x)) < 1e-9
    with pytest.raises(CheckpointError, match=r"at most \(4, 4\), got .*: a smaller scope cannot"):
        convert(larger.state_dict(), source, "larger.pth")[1].check()


@pytest.mark.parametrize("variant", ["dk_g1_l3", "dcn_dk_l3", "scc_dk_l3"])
def test_a_pretrained_deformable_backbone_arrives_whole(variant, tmp_path):
    torch.manual_seed(0)
    source = randomise(build(f"ImageNet/MNV2_{variant}.yaml"))
    torch.save({"model": source.state_dict(), "iteration": 9}, tmp_path / "pretrained.pth")
    model = build(f"COCO-Detection/faster_rcnn_MNV2_FPN_{variant}_1x.yaml")
    Checkpointer(model).resume_or_load(str(tmp_path / "pretrained.pth"), resume=False)
    arrived = model.backbone.bottom_up.state_dict()
    sent = {
        name: tensor
        for name, tensor in source.backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert arrived.keys() == sent.keys()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in sent.items())


def test_a_detector_passes_on_its_heads_and_a_classifier_takes_its_backbone():
    torch.manual_seed(0)
    source = randomise(build("COCO-Detection/faster_rcnn_MNV2_FPN_1x.yaml"))
    state = source.state_dict()
    detector = build(DETECTOR)
    converted, report = convert(state, detector)
    report.check()
    assert report.unused == [] and len(report.resampled) == 17
    assert all("kernel_offset_generator" in name for name in report.initialised)
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(converted[name], state[name])

    classifier = build(MNV2_DK)
    converted, report = convert(state, classifier)
    report.check()
    assert all(n.startswith(("backbone.fpn", "proposal_gen", "roi_heads")) for n in report.unused)
    assert {"linear.weight", "linear.bias"} < set(report.initialised)
    # A backbone saved alone.
    bare = source.backbone.bottom_up.state_dict()
    assert convert(bare, classifier)[0].keys() == converted.keys()


@pytest.mark.parametrize("family", ["MNV2", "R_50_DW"])
@pytest.mark.parametrize(
    ("config", "own_parts"),
    [
        ("COCO-Detection/retinanet_{}_FPN_dk_l3_1x.yaml", {"backbone.top_block", "head"}),
        (
            "COCO-InstanceSegmentation/mask_rcnn_{}_FPN_dk_l3_1x.yaml",
            {"proposal_generator", "roi_heads"},
        ),
    ],
    ids=["retinanet", "mask_rcnn"],
)
def test_other_detectors_take_a_rigid_backbone_and_pass_theirs_on(config, own_parts, family, rigid):
    source = rigid[family]
    model = build(config.format(family))
    converted, report = convert(source.state_dict(), model)
    report.check()
    parts = {part(name) for name in report.initialised}
    assert parts == own_parts | {"backbone.fpn", "kernel_offset_generator"}
    assert len(report.resampled) == (17 if family == "MNV2" else 16)
    model.load_state_dict(converted, strict=False)
    x = images()
    with torch.no_grad():
        expected = source.backbone(x)["res5"]
        assert relative_error(model.backbone.bottom_up(x)["res5"], expected) < 1e-5

    classifier = build(MNV2 if family == "MNV2" else R_50_DW)
    rigid_detector = build(config.format(family), "MODEL.DEFORM_KERNEL.CONV_3X3", "rigid")
    _, report = convert(rigid_detector.state_dict(), classifier)
    report.check()
    assert {part(name) for name in report.unused} == own_parts | {"backbone.fpn"}


def test_detectron2_itself_loads_what_is_written(torchvision_net, tmp_path):
    torch.save(torchvision_net.state_dict(), tmp_path / "source.pth")
    model = build("COCO-Detection/faster_rcnn_MNV2_FPN_dcn_dk_l3_1x.yaml")
    convert_file(tmp_path / "source.pth", tmp_path / "new" / "converted.pth", model)
    content = torch.load(tmp_path / "new" / "converted.pth", weights_only=True)["model"]
    assert all(name.startswith("backbone.bottom_up.") for name in content)
    incompatible = DetectionCheckpointer(model)._load_model({"model": content})
    assert not incompatible.unexpected_keys and not incompatible.incorrect_shapes
    # The generators are there too: where the taps rest belongs to the scope.
    assert not any(name.startswith("backbone.bottom_up.") for name in incompatible.missing_keys)


def renamed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


# How other frameworks wrap a network: what they save, given its state dict.
PACKAGES = {
    "compiled": lambda s: renamed(s, "_orig_mod."),
    "compiled inside": lambda s: {
        n.replace("features.", "features._orig_mod."): t for n, t in s.items()
    },
    "compiled and distributed": lambda s: {"model": renamed(s, "module._orig_mod.")},
    "distributed and compiled": lambda s: {"model": renamed(s, "_orig_mod.module.")},
    "Lightning": lambda s: {"state_dict": {"loss.weight": torch.ones(3), **renamed(s, "model.")}},
    "net": lambda s: {"net": renamed(s, "net.encoder.")},
    "with its average": lambda s: {
        "state_dict": {**renamed({n: t + 1 for n, t in s.items()}, "ema."), **renamed(s, "model.")}
    },
    "an average alone": lambda s: {
        "model_ema": {"n_averaged": torch.tensor(3), **renamed(s, "module.")}
    },
}


@pytest.mark.parametrize("package", PACKAGES)
def test_other_frameworks_wrappings_come_off(package, torchvision_net, tmp_path):
    state, path = torchvision_net.state_dict(), tmp_path / "source.pth"
    torch.save(PACKAGES[package](state), path)
    expected, _ = convert(state, build(MNV2))
    found, report = convert(read_checkpoint(str(path))["model"], build(MNV2))
    report.check()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_outside_a_wrapping_is_reported(torchvision_net):
    state = {"loss.weight": torch.ones(3), **renamed(torchvision_net.state_dict(), "model.")}
    assert convert(state, build(MNV2))[1].unused == ["loss.weight"]


@pytest.mark.parametrize(
    "name", ["safe.pth", "safe.bin", "torch.safetensors", "torch.ckpt", "old.pt"]
)
def test_files_are_read_by_their_content(name, torchvision_net, tmp_path):
    state, path = torchvision_net.state_dict(), tmp_path / name
    if name.startswith("safe"):
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not name.startswith("old"))
    found = read_checkpoint(str(path))["model"]
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14212972\n"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"\n<!DOCTYPE html>\n<title>Sign in</title>",
            "got a page of HTML or XML.* again",
        ),
        (LFS, "got a pointer of Git LFS: .* `git lfs pull`"),
        (gzip.compress(b"weights"), "got a gzip archive: unpack it"),
        (b"", "got an empty file"),
    ],
    ids=["page", "pointer", "gzip", "empty"],
)
def test_what_a_file_is_instead(suffix, content, message, tmp_path):
    path = tmp_path / f"source.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UnreadableCheckpointError, match=message) as caught:
        read_checkpoint(str(path))
    assert "weights_only" not in str(caught.value)


def test_an_archive_with_a_checkpoint_in_it(tmp_path):
    torch.save(torchvision_state(), tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "packed.pth", "w") as archive:
        archive.write(tmp_path / "whole.pth", "whole.pth")
    with pytest.raises(UnreadableCheckpointError, match="a zip archive of whole.pth: unpack it"):
        read_checkpoint(str(tmp_path / "packed.pth"))


def test_damage_inside_a_tensor_is_found(tmp_path):
    """torch.load would give other weights."""
    path = tmp_path / "source.pth"
    torch.save(torchvision_state(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)
    with pytest.raises(UnreadableCheckpointError, match="the checksum of .* is wrong"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("config", [MNV2, MNV2_DK])
def test_weights_that_are_not_finite_are_refused(config):
    state = torchvision_state()
    for name in "features.0.0.weight", "features.1.conv.0.0.weight":
        state[name] = torch.full_like(state[name], torch.nan)
    with pytest.raises(CheckpointError, match="net.pth: expected finite weights, got 2 of .* NaN"):
        convert(state, build(config), "net.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_are_not_cast_in_silence(dtype):
    state = torchvision_state()
    state["features.0.0.weight"] = state["features.0.0.weight"].to(dtype)
    with pytest.raises(CheckpointError, match="expected weights of floating point, got 1 that"):
        convert(state, build(MNV2))


@pytest.mark.parametrize("package", ["state_dict", "model", "module", "safetensors", "half"])
def test_however_the_weights_are_packed(package, torchvision_net, tmp_path):
    state = torchvision_net.state_dict()
    path = tmp_path / "source.pth"
    if package == "safetensors":
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(state, path)
    elif package == "module":
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": wrapped, "epoch": 3, "optimizer": {"state": {}}}, path)
    elif package == "half":
        state = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
        torch.save(state, path)
    else:
        torch.save({package: state}, path)
    model = build(MNV2_DK)
    Checkpointer(model).resume_or_load(str(path), resume=False)
    expected, _ = convert(state, model)
    arrived = model.state_dict()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in expected.items())
    assert arrived["linear.weight"].dtype == torch.float32


# The 1280 channels


def test_the_last_convolution_is_left_out_if_the_model_ends_before(torchvision_net):
    model = build(DETECTOR, "MODEL.MOBILENETV2.RES5_CHANNELS", 320)
    _, report = convert(torchvision_net.state_dict(), model)
    report.check()
    assert {name.split(".")[1] for name in report.unused} == {"18", "1"}  # features.18, classifier
    assert len(report.unused) == 5 + 2


# What does not fit


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def torchvision_state(**changes) -> dict:
    state = dict(torchvision.models.mobilenet_v2().state_dict())
    return {n: t for n, t in (state | changes).items() if t is not None}


def without_generators(config: str) -> dict:
    return {n: t for n, t in build(config).state_dict().items() if "_generator." not in n}


LOCAL_1X1 = ["MODEL.DEFORM_KERNEL.CONV_1X1", "local"]
SEPARABLE = ["MODEL.DEFORM_KERNEL.OFFSET_GENERATOR", "separable"]
MISFITS = {
    "another library's ResNet": (
        lambda: torchvision.models.resnet18().state_dict(), MNV2, [],
        r"conv1.weight: expected shape \[32, 3, 3, 3\], got \[64, 3, 7, 7\]",
    ),
    "the other family": (
        lambda: build(R_50_DW).state_dict(), MNV2, [],
        r"source.pth: .*backbone.stem.conv1.weight: expected shape \[32, 3, 3, 3\], "
        r"got \[64, 3, 7, 7\]",
    ),
    "another width": (
        lambda: torchvision.models.mobilenet_v2(width_mult=0.5).state_dict(), DETECTOR, [],
        r"features.0.0.weight: expected shape \[32, 3, 3, 3\], got \[16, 3, 3, 3\]",
    ),
    "a missing tensor": (
        lambda: torchvision_state(**{"features.3.conv.1.1.running_var": None}), DETECTOR, [],
        r"unexpected tensors \(1\).*res2.1.conv2.norm.running_var: not in the checkpoint",
    ),
    "a tensor too many": (
        lambda: torchvision_state(**{"features.19.weight": torch.ones(3)}), DETECTOR, [],
        r"unexpected tensors \(1\).* features.19.weight: not in the model",
    ),
    "other classes": (
        torchvision_state, MNV2, ["MODEL.CLASSIFIER.NUM_CLASSES", 10],
        r"tensors \(2\).* classifier.1.weight: expected shape \[10, 1280\], got \[1000, 1280\]",
    ),
    "no 1280 channels": (
        lambda: build(MNV2, "MODEL.MOBILENETV2.RES5_CHANNELS", 320).state_dict(), DETECTOR, [],
        "res5.4.conv1.weight: not in the checkpoint",
    ),
    "deformable into rigid": (
        lambda: build(MNV2_DK).state_dict(), MNV2, [],
        r"expected shape \[96, 16, 1, 1\], got \[96, 16, 2, 2\].*and 133 more",
    ),
    "a larger scope": (
        lambda: build("ImageNet/MNV2_dk_l3.yaml").state_dict(), "ImageNet/MNV2_dk_l3.yaml",
        ["MODEL.DEFORM_KERNEL.SCOPE_SIZE_3X3", 3],
        r"unexpected tensors \(17\).* expected a scope of at most \(3, 3\), got \(4, 4\)",
    ),
    "a generator of another kind": (  # whose 1x1 weight fits, and would follow random features
        lambda: build(MNV2, *LOCAL_1X1).state_dict(), MNV2, [*LOCAL_1X1, *SEPARABLE],
        r"tensors \(34\).*res2.0.conv3.kernel_offset_generator.depthwise.weight: not in the check",
    ),
    "a generator of another kind, back": (
        lambda: build(MNV2, *LOCAL_1X1, *SEPARABLE).state_dict(), MNV2, LOCAL_1X1,
        r"tensors \(34\).*kernel_offset_generator.depthwise.weight: not in the model",
    ),
    "a scope without offsets": (
        lambda: without_generators(MNV2_DK), MNV2_DK, [],
        r"tensors \(102\).*conv1.kernel_offset_generator.weight: not in the checkpoint",
    ),
    "experts without gates": (
        lambda: without_generators("ImageNet/MNV2_scc.yaml"), "ImageNet/MNV2_scc.yaml", [],
        r"stem.block.conv3.gate_generator.weight: not in the checkpoint",
    ),
    "another norm": (
        torchvision_state, MNV2, ["MODEL.MOBILENETV2.NORM", "GN"],
        "features.0.1.running_mean: not in the model",
    ),
    "no network": (lambda: [1, 2], MNV2, [], "source.pth: expected a state dict, got a list"),
    "no weights": (lambda: {"epoch": 3}, MNV2, [], "expected tensors by name.* entries 'epoch'"),
    "settings as an object": (
        lambda: {"state_dict": torchvision_state(), "args": argparse.Namespace()}, MNV2, [],
        "argparse.Namespace, which only runs by unpickling.*weights_only=False",
    ),
    "code": (lambda: {"model": RunsCode()}, MNV2, [], "posix.mkdir, which only runs by unpickling"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_and_nothing_is_overwritten(case, tmp_path, monkeypatch):
    make, config, opts, message = MISFITS[case]
    monkeypatch.chdir(tmp_path)
    torch.save(make(), "source.pth")
    Path("target.pth").write_text("precious")
    model = build(config, *opts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        convert_file("source.pth", "target.pth", model)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        Checkpointer(model).resume_or_load("source.pth", resume=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sorted(os.listdir()) == ["source.pth", "target.pth"]
    assert Path("target.pth").read_text() == "precious"


def test_allow_partial_writes_what_fits(tmp_path):
    torch.save(torchvision_state(), tmp_path / "source.pth")
    model = build(MNV2, "MODEL.CLASSIFIER.NUM_CLASSES", 10)
    report = convert_file(
        tmp_path / "source.pth", tmp_path / "target.pth", model, allow_partial=True
    )
    assert report.initialised == ["linear.weight", "linear.bias"]
    assert "classifier.1.bias: expected shape [10], got [1000]" in str(report)
    Checkpointer(model).resume_or_load(str(tmp_path / "target.pth"), resume=False)
    arrived = model.backbone.state_dict()
    written = torch.load(tmp_path / "target.pth", weights_only=True)["model"]
    assert "linear.weight" not in written
    assert all(torch.equal(t, written[f"backbone.{name}"]) for name, t in arrived.items())


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b""}[how])


@pytest.mark.parametrize("how", ["truncated", "empty"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_named(suffix, how, tmp_path):
    path = tmp_path / f"source{suffix}"
    save = torch.save if suffix == ".pth" else safetensors.torch.save_file
    save(torchvision_state(), path)
    damage(path, how)
    with pytest.raises(UnreadableCheckpointError, match=rf"source\{suffix}: .* truncated, corrupt"):
        convert_file(path, tmp_path / "target.pth", build(MNV2))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("source", "target", "error", "message"),
    [
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", "t.pth", CheckpointError, "can run any"),
        ("model.pkl", "target.pth", CheckpointError, "model.pkl: .* torch.save.*basic_c2_names"),
        ("none.pth", "target.pth", FileNotFoundError, "none.pth"),
        ("same.pth", "same.pth", CheckpointError, "expected another file to write to"),
        ("same.pth", "target.pkl", CheckpointError, "expected a name that ends in .pth"),
    ],
)
def test_file_names_that_cannot_work(source, target, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torchvision_state(), "same.pth")
    before = Path("same.pth").read_bytes()
    model = build(MNV2)
    with pytest.raises(error, match=message):
        convert_file(source, target, model)
    assert os.listdir() == ["same.pth"] and Path("same.pth").read_bytes() == before
    if ".pkl" in source:
        with pytest.raises(error, match=message):
            Checkpointer(model).resume_or_load(source, resume=False)


def test_a_weight_without_a_name_is_nobodys(torchvision_net):
    """It is not taken for that of every layer that the checkpoint does not have."""
    converted, report = convert({**torchvision_net.state_dict(), "": torch.ones(3)}, build(MNV2))
    assert converted.keys() == convert(torchvision_net.state_dict(), build(MNV2))[0].keys()
    assert report.unexpected[-1] == ": not in the model"


def test_a_model_of_somebody_else_is_refused(torchvision_net):
    with pytest.raises(CheckpointError, match="model: expected one with a backbone of this"):
        convert(torchvision_net.state_dict(), torchvision_net)


def test_pixels_that_public_weights_do_not_expect_are_said(torchvision_net, tmp_path, fvcores_log):
    """detectron2's defaults, with which such weights learn, but badly."""
    path, detectron2s = str(tmp_path / "mobilenet_v2.pth"), [103.53, 116.28, 123.675]
    torch.save(torchvision_net.state_dict(), path)
    cases = [
        ([], False),
        (["MODEL.PIXEL_STD", [57.0, 57.0, 57.0]], False),
        (["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], True),
        (["MODEL.PIXEL_MEAN", detectron2s], True),
    ]
    for opts, is_said in cases:
        Checkpointer(build(MNV2, *opts)).load(path)
        text = "trained with INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], MODEL."
        assert (text in fvcores_log.text) == is_said, opts
        fvcores_log.clear()
    model = build("ImageNet/R_50.yaml", "MODEL.PIXEL_MEAN", detectron2s)
    assert "trained with INPUT.FORMAT BGR" in pixels_conflict("Caffe2's ResNet", model)
    assert pixels_conflict("this project's own", model) is None


# Training's own files


def training(folder: Path, config: str = MNV2) -> tuple[Checkpointer, nn.Module]:
    torch.manual_seed(0)
    model = build(config, "MODEL.CLASSIFIER.NUM_CLASSES", 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Checkpointer(model, str(folder), optimizer=optimizer), model


def step(checkpointer: Checkpointer, iteration: int) -> dict[str, torch.Tensor]:
    """One step of training and its checkpoint; returns the weights after it."""
    model = checkpointer.model
    model(images(32)).square().mean().backward()
    checkpointer.checkpointables["optimizer"].step()
    checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def fvcores_log(caplog, monkeypatch):
    """Also where detectron2's logging has been set up, which ends at its own handlers."""
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)
    return caplog


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_resume_takes_the_last_checkpoint_that_can_be_read(damaged, tmp_path, fvcores_log):
    checkpointer, _ = training(tmp_path)
    weights = [step(checkpointer, i) for i in (8, 9, 10)]
    for i in (10, 9)[:damaged]:
        damage(tmp_path / f"model_{i:07d}.pth", "truncated")
    checkpointer, model = training(tmp_path)
    with fvcores_log.at_level(logging.WARNING):
        rest = checkpointer.resume_or_load("", resume=True)
    assert rest["iteration"] == 10 - damaged
    expected = weights[-1 - damaged]
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    assert len(checkpointer.checkpointables["optimizer"].state_dict()["state"]) > 0
    warnings = [r.getMessage() for r in fvcores_log.records if "before, since" in r.getMessage()]
    assert len(warnings) == damaged and all("truncated, corrupt" in text for text in warnings)


def test_resume_goes_back_past_a_lost_final_checkpoint_but_never_forward(tmp_path, fvcores_log):
    checkpointer, _ = training(tmp_path)
    for iteration in 3, 5:
        step(checkpointer, iteration)
    checkpointer.save("model_final", iteration=5)
    (tmp_path / "model_final.pth").unlink()
    assert training(tmp_path)[0].resume_or_load("", resume=True)["iteration"] == 5
    assert "model_final.pth: no such file" in fvcores_log.text
    checkpointer.tag_last_checkpoint("model_0000003.pth")
    damage(tmp_path / "model_0000003.pth", "empty")
    with pytest.raises(CheckpointError, match="all are damaged: model_0000003.pth; start again"):
        training(tmp_path)[0].resume_or_load("", resume=True)


def test_resume_refuses_another_network(tmp_path):
    checkpointer, _ = training(tmp_path)
    step(checkpointer, 1)
    with pytest.raises(CheckpointError, match="(?s)the very same network to resume.*resampled"):
        training(tmp_path, MNV2_DK)[0].resume_or_load("", resume=True)
    # As a start for a new run, it is welcome.
    training(tmp_path, MNV2_DK)[0].resume_or_load(str(tmp_path / "model_0000001.pth"), resume=False)


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpointer, _ = training(tmp_path)
    weights = step(checkpointer, 1)

    def run_out_of_space(content, file):
        file.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", run_out_of_space)
        for iteration in 1, 2:
            with pytest.raises(OSError, match="No space"):
                step(checkpointer, iteration)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    checkpointer, model = training(tmp_path)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


# The command line


def run_tool(monkeypatch, *args) -> None:
    tool = ROOT / "tools" / "convert_weights.py"
    monkeypatch.setattr(sys, "argv", [str(tool), *map(str, args)])
    runpy.run_path(str(tool), run_name="__main__")


def test_command_line(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "source.pth", tmp_path / "target.pth"
    torch.save(torchvision_state(), source)
    command = source, target, "--config-file", CONFIGS / DETECTOR, *SMALL_HEADS
    run_tool(monkeypatch, *command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Written: {target}"
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[:6]]
    # 52 convolutions of which 17 are deformable, as many norms of four tensors, and a classifier.
    assert rows[2:] == [
        ["matched", str(52 - 17 + 4 * 52)],
        ["resampled", "17"],
        ["initialised", str(2 * 17 + 16 + 6 + 8)],
        ["unused", "2"],
    ]
    written = target.read_bytes()

    for other, message in (
        (torchvision.models.resnet18(), "expected a checkpoint of the configured network, got one"),
        (nn.Linear(2, 2), "got another network: weight"),
    ):
        torch.save(other.state_dict(), source)
        with pytest.raises(SystemExit, match=f"convert_weights.py: .* {message}"):
            run_tool(monkeypatch, *command)
        assert target.read_bytes() == written
    with pytest.raises(SystemExit, match="--config-file: expected a YAML file, .* got 'none.yaml'"):
        run_tool(monkeypatch, source, target, "--config-file", "none.yaml")
    with pytest.raises(SystemExit, match="convert_weights.py: options KEY VALUE .*MODEL.FNP"):
        run_tool(monkeypatch, *command, "MODEL.FNP.OUT_CHANNELS", 8)


def test_weights_without_heads_are_not_complete():
    """As --eval-only wants them: a backbone alone is refused, a rigid detector for DK is not."""
    model = build(DETECTOR)
    _, report = convert(torchvision_state(), model, "net.pth")
    with pytest.raises(CheckpointError, match="net.pth: .* none of its backbone.fpn, proposal_g"):
        report.check_complete()
    rigid = build(DETECTOR, "MODEL.DEFORM_KERNEL.CONV_3X3", "rigid")
    convert(rigid.state_dict(), model)[1].check_complete()


def test_a_disk_that_refuses_at_the_end_leaves_what_was_there(tmp_path, monkeypatch):
    """As quotas and network file systems do, whose writes all seemed to succeed."""
    path = tmp_path / "model.pth"
    path.write_text("precious")

    def refuse(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError, match="could not be written: Disk quota exceeded"):
        write_checkpoint({"model": {}}, path)
    assert path.read_text() == "precious" and [*tmp_path.iterdir()] == [path]

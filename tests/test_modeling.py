"""The networks are the paper's: every row of its tables builds, with exactly its parameters."""

import csv
import sys
from copy import deepcopy
from functools import partialmethod
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from dk_detectron import add_dk_config
from dk_detectron.analysis import count_multiply_adds, count_parameters
from dk_detectron.commands import analyze_model
from dk_detectron.engine import Trainer
from dk_detectron.layers import (
    AdaptiveConv2d,
    CondConv2d,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
)
from dk_detectron.model_zoo import CONFIGS, load_config, paper_rows
from dk_detectron.modeling import to_channels_last

CLASSIFIERS = [pytest.param(row, id=Path(row["config"]).stem) for row in paper_rows(1, 2)]
SHAPES_ALONE = torch.device("meta")  # where weights are not drawn, which takes seconds
MODEL_ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
DETECTORS = [pytest.param(row, id=Path(row["config"]).stem) for row in paper_rows(3, 4)]


def classifier_row(detector: dict) -> dict:
    """The row of Tables 1 and 2 that describes a detector's backbone."""
    keys = "backbone", "variant", "dk_1x1", "dk_3x3", "scope_3x3"
    (row,) = {
        row["config"]: row for row in paper_rows(1, 2) if all(row[k] == detector[k] for k in keys)
    }.values()
    return row


def backbone_with(family: str, **keys):
    cfg = load_config(CONFIGS / "ImageNet" / f"{family}.yaml")
    for key, value in keys.items():
        cfg.merge_from_list([f"MODEL.{key}", value])
    return build_backbone(cfg)


def test_the_paper_has_22_classifiers_and_18_detectors():
    assert len(CLASSIFIERS) == 22 and len(DETECTORS) == 18
    assert len({p.values[0]["config"] for p in CLASSIFIERS + DETECTORS}) == 40


@pytest.mark.parametrize("row", CLASSIFIERS)
def test_classifier_has_the_papers_parameters(row):
    cfg = load_config(CONFIGS / row["config"])
    with SHAPES_ALONE:
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    assert count_parameters(model) == int(row["params_exact"])
    assert round(count_parameters(model) / 1e6, 1) == float(row["params_m"])


@pytest.mark.parametrize("row", DETECTORS)
def test_detector_backbone_has_its_classifiers_parameters(row):
    with SHAPES_ALONE:
        backbone = build_backbone(load_config(CONFIGS / row["config"]))
    features = 2048 if row["backbone"] == "ResNet-50-DW" else 1280
    head = features * 1000 + 1000
    expected = int(classifier_row(row)["params_exact"]) - head
    assert count_parameters(backbone.bottom_up) == expected
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}


def small_detector(config, *opts):
    """The configured backbone, with live norms, under heads small enough for a test."""
    norm = "MOBILENETV2.NORM" if "MNV2" in str(config) else "RESNETS.NORM"
    cfg = load_config(CONFIGS / config, [f"MODEL.{norm}", "BN", "MODEL.BACKBONE.FREEZE_AT", 0])
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32])
    cfg.merge_from_list(["MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 50])
    cfg.merge_from_list(["MODEL.ROI_MASK_HEAD.CONV_DIM", 32, *opts])
    torch.manual_seed(0)
    return build_model(cfg)


def draw_sample():
    """An image of noise with one object, as detectron2's mapper would give it."""
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 50.0]]))
    instances.gt_classes = torch.tensor([3])
    instances.gt_masks = PolygonMasks([[np.array([10.0, 10.0, 60.0, 10.0, 35.0, 50.0])]])
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    return {"image": image, "instances": instances}


def training_step(model, batch):
    """Losses of a step, and gradients by name. Sampling of anchors and proposals is seeded."""
    torch.manual_seed(1)
    model.train()
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


def assert_steps_and_detects(model):
    """One training step gives every parameter of the backbone a finite gradient."""
    sample = draw_sample()
    losses, gradients = training_step(model, [sample] * 2)
    for name, gradient in gradients.items():
        if name.startswith("backbone.bottom_up."):
            assert gradient is not None and gradient.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        (result,) = model([{"image": sample["image"]}])
    assert result["instances"].pred_boxes.tensor.shape[1] == 4
    return losses, result["instances"]


@pytest.mark.parametrize("row", DETECTORS)
def test_every_detector_steps_and_detects(row):
    assert_steps_and_detects(small_detector(row["config"]))


@pytest.mark.parametrize("family", ["MNV2", "R_50_DW"])
def test_mask_rcnn_steps_and_segments(family):
    config = f"COCO-InstanceSegmentation/mask_rcnn_{family}_FPN_dk_l3_1x.yaml"
    model = small_detector(config, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    losses, detections = assert_steps_and_detects(model)
    assert "loss_mask" in losses
    assert len(detections) > 0 and detections.pred_masks.shape[1:] == (64, 96)
    assert sum(type(m) is LocalDeformKernel2d for m in model.modules()) in (16, 17)


@pytest.mark.parametrize(("family", "channels"), [("MNV2", 1280), ("R_50_DW", 2048)])
def test_retinanet_steps_and_detects(family, channels):
    model = small_detector(f"COCO-Detection/retinanet_{family}_FPN_dk_l3_1x.yaml")
    losses, _ = assert_steps_and_detects(model)
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
    assert strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    assert model.backbone.top_block.p6.in_channels == channels
    assert sum(type(m) is LocalDeformKernel2d for m in model.modules()) in (16, 17)


def test_the_new_families_have_detectron2s_own_settings():
    """All that detectron2's Base configurations set for them and ours do not set otherwise."""
    for zoo, config in (
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "COCO-Detection/retinanet_{}"),
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
            "COCO-InstanceSegmentation/mask_rcnn_{}",
        ),
    ):
        theirs = get_cfg()
        theirs.merge_from_file(str(MODEL_ZOO / zoo), allow_unsafe=True)
        for family in "MNV2", "R_50_DW":
            ours = load_config(CONFIGS / f"{config.format(family)}_FPN_dk_l3_1x.yaml")
            for key in "RETINANET", "FPN", "ROI_MASK_HEAD", "MASK_ON":
                assert ours.MODEL[key] == theirs.MODEL[key], key
            assert ours.SOLVER.BASE_LR == theirs.SOLVER.BASE_LR
            for mine, sizes in zip(
                ours.MODEL.ANCHOR_GENERATOR.SIZES, theirs.MODEL.ANCHOR_GENERATOR.SIZES, strict=True
            ):
                assert mine == pytest.approx(sizes, rel=1e-5)


def test_detectron2s_cascade_works_over_these_backbones():
    """The keys of its Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml."""
    keys = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"]
    config = "COCO-InstanceSegmentation/mask_rcnn_MNV2_FPN_dk_l3_1x.yaml"
    losses, _ = assert_steps_and_detects(small_detector(config, *keys, True))
    assert {f"loss_box_reg_stage{i}" for i in range(3)} | {"loss_mask"} <= set(losses)


@pytest.mark.parametrize(
    ("config", "kind", "count"),
    [
        ("R_50_DW_dk_l3", LocalDeformKernel2d, 16),
        ("R_50_DW_dk_g1_g3", GlobalDeformKernel2d, 16 + 32),
        ("R_50_DW_dcn", DeformConv2d, 13),
        ("R_50_DW_dcn_dk_l3", DeformKernelConv2d, 13),
        ("R_50_DW_dcn_dk_l3", LocalDeformKernel2d, 3),
        ("R_50_DW_scc", CondConv2d, 16 + 32),
        ("R_50_DW_scc_dk_l3", CondConv2d, 32),
        ("MNV2_dk_l3", LocalDeformKernel2d, 17),
        ("MNV2_dk_g1_g3", GlobalDeformKernel2d, 17 + 34),
        ("MNV2_dcn_dk_l3", DeformKernelConv2d, 14),
        ("MNV2_scc", CondConv2d, 17 + 34),
    ],
)
def test_which_convolutions_adapt(config, kind, count):
    with SHAPES_ALONE:
        backbone = build_backbone(load_config(CONFIGS / "ImageNet" / f"{config}.yaml"))
    assert sum(type(m) is kind for m in backbone.modules()) == count


@pytest.mark.parametrize("config", ["R_50_DW_dk_l3", "MNV2_dk_g1_l3", "MNV2_dcn_dk_l3"])
def test_an_untrained_adaptive_network_is_the_rigid_one(config):
    """All generators are zero: the same rigid weights give the same features."""
    rigid = build_backbone(load_config(CONFIGS / "ImageNet" / f"{config.split('_d')[0]}.yaml"))
    adaptive = build_backbone(load_config(CONFIGS / "ImageNet" / f"{config}.yaml"))
    target = adaptive.state_dict()
    state = {name: v for name, v in rigid.state_dict().items() if target[name].shape == v.shape}
    adaptive.load_state_dict(state, strict=False)
    source = dict(rigid.named_modules())
    for name, module in adaptive.named_modules():
        if isinstance(module, AdaptiveConv2d):
            module.set_rigid_weight(source[name].weight.detach())
    x = torch.randn(2, 3, 64, 96)
    expected, got = rigid.eval()(x)["res5"], adaptive.eval()(x)["res5"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", ["R_50_DW", "MNV2"])
def test_output_shapes_are_what_comes_out(family):
    key = "RESNETS" if family == "R_50_DW" else "MOBILENETV2"
    backbone = backbone_with(
        family, **{f"{key}.OUT_FEATURES": ["stem", "res2", "res3", "res4", "res5"]}
    )
    outputs = backbone(torch.randn(1, 3, 64, 96))
    shapes = backbone.output_shape()
    assert list(outputs) == list(shapes) == ["stem", "res2", "res3", "res4", "res5"]
    for name, shape in shapes.items():
        expected = (1, shape.channels, 64 // shape.stride, 96 // shape.stride)
        assert tuple(outputs[name].shape) == expected


def test_mobilenet_features_are_the_papers():
    backbone = backbone_with(
        "MNV2", **{"MOBILENETV2.OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
    )
    channels = [shape.channels for shape in backbone.output_shape().values()]
    assert channels == [24, 32, 96, 1280]
    small = backbone_with("MNV2", **{"MOBILENETV2.RES5_CHANNELS": 320})
    assert small.output_shape()["res5"].channels == 320


@pytest.mark.parametrize("family", ["R_50_DW", "MNV2"])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN"])
def test_norm_is_switchable(family, norm):
    key = "RESNETS" if family == "R_50_DW" else "MOBILENETV2"
    backbone = backbone_with(family, **{f"{key}.NORM": norm})
    kinds = {type(m).__name__ for m in backbone.modules() if "Norm" in type(m).__name__}
    expected = {
        "FrozenBN": "FrozenBatchNorm2d",
        "BN": "BatchNorm2d",
        "SyncBN": "SyncBatchNorm",
        "GN": "GroupNorm",
    }
    assert kinds <= {expected[norm], "NaiveSyncBatchNorm"} and len(kinds) == 1


@pytest.mark.parametrize("family", ["R_50_DW", "MNV2"])
def test_freeze_at(family):
    backbone = backbone_with(family, **{"BACKBONE.FREEZE_AT": 2})
    assert not any(p.requires_grad for m in (backbone.stem, backbone.res2) for p in m.parameters())
    assert all(p.requires_grad for p in backbone.res3.parameters())
    frozen = [m for m in backbone.res2.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert frozen and not any(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.res2.modules())


def test_stride_placement():
    first = backbone_with("R_50_DW", **{"RESNETS.STRIDE_IN_1X1": True}).res3[0]
    second = backbone_with("R_50_DW", **{"RESNETS.STRIDE_IN_1X1": False}).res3[0]
    assert (first.conv1.stride, first.conv2.stride) == ((2, 2), (1, 1))
    assert (second.conv1.stride, second.conv2.stride) == ((1, 1), (2, 2))


def test_a_plain_detectron2_config_is_unchanged():
    plain, extended = get_cfg(), get_cfg()
    add_dk_config(extended)
    nodes = (
        extended.MODEL,
        extended.MODEL.BACKBONE,
        extended.SOLVER,
        extended.SOLVER.AMP,
        extended.INPUT,
        extended.DATALOADER,
    )
    for node in nodes:
        for key in (
            "DEFORM_KERNEL",
            "MOBILENETV2",
            "CHANNELS_LAST",
            "CLASSIFIER",
            "OFFSET_LR_FACTOR",
            "CLIP_OFFSET_GRADIENTS",
            "OPTIMIZER",
            "COLOR_JITTER",
            "EMA_DECAY",
            "EPOCHS",
            "WARMUP_EPOCHS",
            "CROP_SIZE",
            "SKIP_CORRUPT",
            "COMPILE",
            "GRADIENT_CHECKPOINTING",
            "PRECISION",
        ):
            node.pop(key, None)
    assert extended == plain


# A detector of each family and kind of norm; frozen norms have statistics, too.
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
@pytest.mark.parametrize("config", ["MNV2_FPN_dcn_dk_l3", "R_50_DW_FPN_scc_dk_l3"])
def test_gradient_checkpointing_gives_the_same_bits_with_less_memory(config, norm):
    opts = ["MODEL.MOBILENETV2.NORM", norm]
    if "R_50" in config:
        opts = ["MODEL.RESNETS.NORM", norm, "MODEL.RESNETS.STEM_OUT_CHANNELS", 32]
        opts += ["MODEL.RESNETS.WIDTH_PER_GROUP", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    results = {}
    for on in False, True:
        switch = "MODEL.BACKBONE.GRADIENT_CHECKPOINTING", on
        model = small_detector(f"COCO-Detection/faster_rcnn_{config}_1x.yaml", *opts, *switch)
        sample = draw_sample()
        results[on] = [*training_step(model, [sample] * 2), deepcopy(model.state_dict())]
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = model.backbone.bottom_up(torch.randn(1, 3, 64, 96))
        parameters = {p.data_ptr() for p in model.parameters()}
        results[on].append(sum(size for data, size in saved.items() if data not in parameters))
        del features
    (*expected, much), (*actual, little) = results[False], results[True]
    for theirs, ours in zip(expected, actual, strict=True):
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            assert (tensor is None and ours[name] is None) or torch.equal(tensor, ours[name]), name
    if norm == "BN":  # one step, counted once
        assert actual[2]["backbone.bottom_up.res4.0.conv2.norm.num_batches_tracked"] == 1
    assert little < much / 3, (little, much)


def test_gradient_checkpointing_does_nothing_outside_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("checkpointed")

    monkeypatch.setattr("dk_detectron.modeling.block.checkpoint", refuse)
    backbone = backbone_with("MNV2_dk_l3", **{"BACKBONE.GRADIENT_CHECKPOINTING": True})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        backbone(x)
    backbone.eval()(x)
    with pytest.raises(AssertionError, match="checkpointed"):
        backbone.train()(x)


@pytest.mark.parametrize(
    ("row", "checkpointing"),
    [("MNV2_dk_l3", False), ("MNV2_dk_l3", True), ("MNV2_dk_g3", False)],
    ids=["local", "checkpointing", "global"],
)
def test_a_compiled_backbone_learns_the_same_from_images_of_any_size(
    row, checkpointing, monkeypatch
):
    """Without the generation of code, which takes minutes: its graphs are run as they are.

    In double: what decomposition reorders, a layer with kernels for each image magnifies.
    """
    compile_ = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    torch._dynamo.reset()
    opts = ["MODEL.MOBILENETV2.OUT_FEATURES", ["res2"], "MODEL.CLASSIFIER.NUM_CLASSES", 4]
    opts += ["MODEL.BACKBONE.GRADIENT_CHECKPOINTING", checkpointing]
    models = {}
    for on in False, True:
        torch.manual_seed(0)
        switch = "MODEL.BACKBONE.COMPILE", on
        models[on] = Trainer.build_model(
            load_config(CONFIGS / "ImageNet" / f"{row}.yaml", [*opts, *switch])
        ).double()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for size in (2, 3, 64, 96), (2, 3, 96, 64), (3, 3, 160, 128):
        images, losses = torch.randn(size, dtype=torch.double), []
        for model in models.values():
            model.zero_grad()
            losses.append(model(images).logsumexp(1).mean())
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            scale = p.grad.abs().max().item()
            # 1e-14: a bias ahead of batch normalization has a gradient of zero, but for rounding.
            atol = 1e-9 * scale + 1e-14
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=atol, msg=name)
    assert graphs["unique_graphs"] == 1
    expected, actual = (model.state_dict() for model in models.values())
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("MNV2", "DEFORM_KERNEL.CONV_3X3", "lokal", "CONV_3X3: expected one of rigid, local"),
        ("MNV2", "DEFORM_KERNEL.CONV_1X1", "dcn", "CONV_1X1: expected one of rigid, local"),
        ("R_50_DW", "DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE", [True], "one value for each of res2"),
        ("R_50_DW_dk_g3", "DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE", [True] * 4, "got 'global'"),
        ("MNV2", "MOBILENETV2.RES5_CHANNELS", 640, "expected 320 or 1280, got 640"),
        ("MNV2", "MOBILENETV2.OUT_FEATURES", ["res6"], "expected some of stem, res2"),
        ("R_50_DW", "RESNETS.OUT_FEATURES", [], "expected some of stem, res2"),
        ("R_50_DW", "RESNETS.DEPTH", 18, "expected one of 50, 101, 152"),
        ("R_50_DW", "RESNETS.NUM_GROUPS", 32, "NUM_GROUPS: expected 1"),
        (
            "MNV2_dk_l3",
            "DEFORM_KERNEL.SCOPE_SIZE_3X3",
            2,
            "^MODEL.DEFORM_KERNEL.SCOPE_SIZE_3X3: expected an integer >= 3 .* got 2",
        ),
    ],
)
def test_unknown_values_are_refused(family, key, value, message):
    with pytest.raises(ValueError, match=message):
        backbone_with(family, **{key: value})


@pytest.mark.parametrize(
    ("config", "out_features", "message"),
    [
        ("faster_rcnn", ["res3", "res4"], "IN_FEATURES: expected some of res3, res4, .*'res5'"),
        ("retinanet", ["res3", "res4"], "OUT_FEATURES of .*: expected res5 .* got res3, res4"),
        ("retinanet", ["res4", "res5"], "IN_FEATURES: expected some of res4, res5, .*'res3'"),
    ],
)
def test_a_pyramid_takes_what_its_backbone_returns(config, out_features, message):
    cfg = load_config(CONFIGS / "COCO-Detection" / f"{config}_MNV2_FPN_dk_l3_1x.yaml")
    cfg.MODEL.MOBILENETV2.OUT_FEATURES = out_features
    with SHAPES_ALONE, pytest.raises(ValueError, match=message):
        build_backbone(cfg)


def test_multiply_adds_of_the_learnt_offsets_are_the_papers():
    """A local DK costs its generator plus 18 per output: the differences of Tables 1 and 2."""

    def giga(name):
        cfg = load_config(CONFIGS / "ImageNet" / f"{name}.yaml")
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
        return sum(count_multiply_adds(model, torch.zeros(1, 3, 224, 224)).values()) / 1e9

    # Differences of two figures that the paper rounds to 0.01.
    for family, kernel, data in ("R_50_DW", 0.50, 0.28), ("MNV2", 0.42, 0.21):
        base = giga(family)
        assert giga(f"{family}_dk_l3") - base == pytest.approx(kernel, abs=0.01)
        assert giga(f"{family}_dcn") - base == pytest.approx(data, abs=0.01)


def test_paper_tables_keep_the_papers_numbers():
    """Spot checks against the printed tables, so that nobody edits the reference by accident."""
    with open(CONFIGS / "paper_tables.csv", newline="") as f:
        rows = {row["config"]: row for row in csv.DictReader(f)}
    best = rows["COCO-Detection/faster_rcnn_R_50_DW_FPN_dcn_dk_l3_1x.yaml"]
    assert [best[k] for k in ("map", "map_s", "map_m", "map_l")] == ["40.6", "24.6", "43.9", "53.3"]
    assert rows["ImageNet/MNV2_dk_l3.yaml"]["top1"] == "74.1"


@pytest.mark.parametrize("config", ["MNV2_dk_l3", "MNV2_scc_dk_l3", "MNV2_dcn_dk_l3"])
def test_channels_last_goes_through(config):
    backbone = backbone_with(config).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = backbone(x)["res5"]
    found = to_channels_last(backbone)(x.to(memory_format=torch.channels_last))["res5"]
    assert found.is_contiguous(memory_format=torch.channels_last)
    # The same sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.yaml"], "--config-file: expected a YAML file, .* got 'none.yaml'"),
        (["ImageNet/MNV2.yaml", "MODEL.FNP", "8"], "options KEY VALUE .*MODEL.FNP"),
    ],
)
def test_what_cannot_be_analyzed_is_said_in_a_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", "--config-file", *arguments])
    with pytest.raises(SystemExit, match=f"analyze_model.py: {message}"):
        analyze_model.main()


def test_a_transposed_convolution_multiplies_what_goes_in():
    layer = nn.ConvTranspose2d(4, 6, 2, stride=2)
    assert count_multiply_adds(layer, torch.zeros(1, 4, 5, 7)) == {
        "ConvTranspose2d": 5 * 7 * 4 * 6 * 2 * 2
    }

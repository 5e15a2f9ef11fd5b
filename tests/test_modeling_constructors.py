"""The backbones as ordinary objects: plain arguments, detectron2's LazyConfig, other libraries."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.layers import Conv2d
from detectron2.modeling import FPN, build_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.solver import LRMultiplier
from test_engine import replace_registered
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import MultiScaleRoIAlign

from dk_detectron.data import datasets
from dk_detectron.data.shapes import write_split
from dk_detectron.engine import Trainer
from dk_detectron.layers import (
    CondConv2d,
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
)
from dk_detectron.model_zoo import CONFIGS, get_config, load_config
from dk_detectron.modeling import FeatureList, mobilenet_v2, resnet_dw
from dk_detectron.modeling.build import MOBILENETV2_KEYS, RESNET_DW_KEYS

LAZY = CONFIGS / "lazy" / "faster_rcnn_MNV2_FPN_dk_l3.py"


def kinds(stage: nn.Module, conv: str) -> set[type]:
    return {type(getattr(block, conv)) for block in stage}


def test_every_key_is_an_argument():
    """With every argument off its default, the network is that of the same keys."""
    arguments = {
        "conv1x1": "global", "conv3x3": "local", "scope_size_1x1": 3, "scope_size_3x3": 5,
        "data_offset": [False, True, False, False], "num_experts": 2, "freeze_at": 1,
        "gradient_checkpointing": True, "norm": "GN", "out_features": ["stem", "res4"],
        "offset_generator": "separable", "modulated": True, "offset_groups": 2,
    }  # fmt: skip
    own = {
        "MNV2": (mobilenet_v2, MOBILENETV2_KEYS, {"res5_channels": 320}),
        "R_50_DW": (
            resnet_dw,
            RESNET_DW_KEYS,
            {"depth": 101, "width": 4, "stem_channels": 8, "res2_channels": 16}
            | {"stride_in_1x1": True},
        ),
    }
    for family, (constructor, keys, more) in own.items():
        given = arguments | more
        assert given.keys() == keys.keys()
        opts = [part for name, key in keys.items() for part in (key, given[name])]
        expected = build_backbone(load_config(f"ImageNet/{family}.yaml", opts))
        found = constructor(**given)
        assert str(found) == str(expected)
        assert {k: v.shape for k, v in found.state_dict().items()} == {
            k: v.shape for k, v in expected.state_dict().items()
        }
        assert found.output_shape() == expected.output_shape()
        learnt = [[p.requires_grad for p in net.parameters()] for net in (found, expected)]
        assert learnt[0] == learnt[1]
        assert found.res2[0].gradient_checkpointing


@pytest.mark.parametrize("constructor", [mobilenet_v2, resnet_dw])
def test_stages_may_differ(constructor):
    network = constructor(
        conv1x1={"res5": "conditional"},
        conv3x3={"res3": "local", "res4": "global"},
        data_offset=[True, True, False, False],
    )
    found = [kinds(stage, "conv2") for stage in network.stages[:3]]
    assert found == [{DeformConv2d}, {DeformKernelConv2d}, {GlobalDeformKernel2d}]
    first = [kinds(stage, "conv1") for stage in network.stages]
    assert first == [{Conv2d}] * 3 + [{CondConv2d}]


@pytest.mark.parametrize("constructor", [mobilenet_v2, resnet_dw])
def test_other_input_channels(constructor):
    features = constructor(in_channels=5)(torch.randn(1, 5, 64, 64))
    assert features["res5"].shape[2:] == (2, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"conv3x3": "lokal"}, "conv3x3: expected one of rigid, local, .* got 'lokal'"),
        ({"conv1x1": {"res6": "local"}}, "conv1x1: expected stages of stem, res2"),
        ({"norm": "BatchNorm"}, "norm: expected one of .*'FrozenBN'.* got 'BatchNorm'"),
        ({"out_features": "res2"}, "out_features: expected some of stem, res2"),
        ({"data_offset": [True] * 4, "conv3x3": "global"}, "data_offset: .* got 'global'"),
        ({"scope_size_3x3": 2, "conv3x3": "local"}, "scope_size_3x3: expected an integer >= 3"),
    ],
)
def test_arguments_are_checked(arguments, message):
    for constructor in mobilenet_v2, resnet_dw:
        with pytest.raises(ValueError, match=message):
            constructor(**arguments)


def test_a_feature_extractor_lists_its_maps():
    extractor = FeatureList(mobilenet_v2(conv3x3="local", out_features=["res4", "stem", "res2"]))
    assert extractor.names == ["stem", "res2", "res4"]
    assert extractor.strides == [2, 4, 16] and extractor.channels == [16, 24, 96]
    maps = extractor(torch.randn(2, 3, 64, 96))
    for found, channels, stride in zip(maps, extractor.channels, extractor.strides, strict=True):
        assert found.shape == (2, channels, 64 // stride, 96 // stride)


def test_the_body_of_torchvisions_detector():
    torch.manual_seed(0)
    bottom_up = mobilenet_v2(conv3x3={"res4": "local", "res5": "local"})
    body = FPN(bottom_up, ["res2", "res3", "res4", "res5"], 32, top_block=LastLevelMaxPool())
    body.out_channels = 32
    model = FasterRCNN(
        body, num_classes=3, box_roi_pool=MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], 7, 2),
        min_size=96, max_size=160, box_batch_size_per_image=16,
    )  # fmt: skip
    target = {"boxes": torch.tensor([[8.0, 8, 60, 60]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 96, 128)], [target])
    sum(losses.values()).backward()
    generator = bottom_up.res4[0].conv2.kernel_offset_generator
    assert isinstance(bottom_up.res4[0].conv2, LocalDeformKernel2d)
    assert generator.weight.grad.abs().sum() > 0
    (found,) = model.eval()([torch.rand(3, 96, 128)])
    assert found.keys() == {"boxes", "labels", "scores"}


def test_the_lazy_configuration_is_the_yaml():
    lazy = LazyConfig.load(str(LAZY))
    yaml = get_config("COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml")
    yaml.MODEL.DEVICE = "cpu"
    model, expected = instantiate(lazy.model), Trainer.build_model(yaml)
    assert str(model) == str(expected)
    assert (model.pixel_mean == expected.pixel_mean).all()
    assert (model.pixel_std == expected.pixel_std).all()
    lazy.optimizer.params.model = model
    optimizers = instantiate(lazy.optimizer), Trainer.build_optimizer(yaml, expected)
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    assert groups[0] == groups[1]
    assert optimizers[0].state_dict()["param_groups"] == optimizers[1].state_dict()["param_groups"]
    assert lazy.train.max_iter == yaml.SOLVER.MAX_ITER
    assert lazy.dataloader.train.total_batch_size == yaml.SOLVER.IMS_PER_BATCH
    assert lazy.dataloader.train.mapper.image_format == yaml.INPUT.FORMAT


def test_detectron2s_lazy_trainer_trains_it(tmp_path, monkeypatch):
    """The steps of detectron2's tools/lazyconfig_train_net.py, on a few drawn pictures."""
    for split in "train", "val":
        write_split(tmp_path / "shapes", split, 3, seed=0, side=96)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    replace_registered(datasets, tmp_path)
    overrides = [
        "dataloader.train.dataset.names=shapes_train", "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0", "model.roi_heads.num_classes=6",
        "dataloader.train.mapper.augmentations=[]", "train.device=cpu", "train.max_iter=3",
        "model.backbone.bottom_up.norm=BN", "model.backbone.bottom_up.freeze_at=0",
    ]  # fmt: skip
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(LAZY)), overrides)
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = SimpleTrainer(model, loader, optimizer)
    trainer.register_hooks([hooks.LRScheduler(scheduler=instantiate_schedule(cfg, optimizer))])
    generator = model.backbone.bottom_up.res3[0].conv2.kernel_offset_generator
    start = generator.weight.clone()
    trainer.train(0, cfg.train.max_iter)
    assert not torch.equal(generator.weight, start)
    losses = trainer.storage.histories()["total_loss"].values()
    assert len(losses) == 3 and all(loss < 20 for loss, _ in losses)


def instantiate_schedule(cfg, optimizer):
    return LRMultiplier(
        optimizer, multiplier=instantiate(cfg.lr_multiplier), max_iter=cfg.train.max_iter
    )


def test_group_norm_has_32_groups_or_as_many_as_divide_the_channels():
    norms = {
        m.num_channels: m.num_groups
        for m in mobilenet_v2(norm="GN").modules()
        if isinstance(m, nn.GroupNorm)
    }
    assert norms[16] == 16 and norms[24] == 8 and norms[144] == 16 and norms[1280] == 32

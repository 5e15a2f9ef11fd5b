"""The optimizer of a training loop of one's own: what it saves, it goes on from."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from dk_detectron.engine import Trainer
from dk_detectron.engine.optimizer import build_optimizer, parameter_groups
from dk_detectron.layers import LocalDeformKernel2d
from dk_detectron.model_zoo import CONFIGS, load_config
from dk_detectron.weights import CheckpointError


def network() -> nn.Sequential:
    return nn.Sequential(LocalDeformKernel2d(4, 4, 3, padding=1, groups=4))


def optimizer_of(model: nn.Module, kind=SGD, factor: float = 0.1, **options):
    groups = parameter_groups(model, 0.1, offset_lr_factor=factor)
    if kind is SGD:
        options = {"momentum": 0.9} | options
    return build_optimizer(groups, kind=kind, lr=0.1, **options)


def steps(model, optimizer, scheduler=None, count: int = 1) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(1, 4, 5, 5)).square().mean().backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def options_of(optimizer) -> list[dict]:
    return [{**group, "params": None} for group in optimizer.param_groups]


SCHEDULES = {
    "steps": lambda o: lr_scheduler.StepLR(o, 3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10),
}


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torchs_schedules_go_on_where_they_stopped(schedule, kind):
    """Most of them compute the next rate from that of the groups."""
    model = network()
    optimizer = optimizer_of(model, kind)
    scheduler = SCHEDULES[schedule](optimizer)
    steps(model, optimizer, scheduler, 4)

    resumed = network()
    resumed.load_state_dict(model.state_dict())
    its_optimizer = optimizer_of(resumed, kind)
    its_scheduler = SCHEDULES[schedule](its_optimizer)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_scheduler.load_state_dict(scheduler.state_dict())
    assert options_of(its_optimizer) == options_of(optimizer)
    steps(model, optimizer, scheduler, 4)
    steps(resumed, its_optimizer, its_scheduler, 4)
    assert options_of(its_optimizer) == options_of(optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_what_no_schedule_changes_is_as_configured():
    model = network()
    saved = optimizer_of(model).state_dict()
    resumed = optimizer_of(model, momentum=0.5, nesterov=True)
    resumed.load_state_dict(saved)
    for group, before in zip(resumed.param_groups, saved["param_groups"], strict=True):
        assert (group["lr"], group["momentum"], group["nesterov"]) == (before["lr"], 0.5, True)


def test_parameters_that_are_grouped_otherwise_keep_their_momenta():
    model = network()
    optimizer = optimizer_of(model, factor=0.1)
    steps(model, optimizer)
    resumed = optimizer_of(model, factor=1.0)
    assert len(optimizer.param_groups) > len(resumed.param_groups)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_momenta(resumed, optimizer)
    assert resumed.param_groups[0]["lr"] == 0.1  # of its first parameter, the weight


def assert_same_momenta(found, expected) -> None:
    assert expected.state and found.state.keys() == expected.state.keys()
    for parameter, state in expected.state.items():
        assert torch.equal(found.state[parameter]["momentum_buffer"], state["momentum_buffer"])


class Wrapper(nn.Module):
    """Names as of ``DistributedDataParallel``, which wants processes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


WRAPPERS = {
    "bare": lambda model: model,
    "distributed": Wrapper,
    "compiled": torch.compile,
    "both": lambda model: Wrapper(torch.compile(model)),
    "a compiled part": lambda model: nn.Sequential(torch.compile(model[0])),
}


@pytest.mark.parametrize("after", WRAPPERS)
@pytest.mark.parametrize("before", WRAPPERS)
def test_names_count_without_the_prefixes_of_wrappers(before, after):
    model = network()
    optimizer = optimizer_of(WRAPPERS[before](model))
    steps(model, optimizer)
    resumed = optimizer_of(WRAPPERS[after](model))
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_momenta(resumed, optimizer)


def test_other_frozen_parameters_are_no_other_network():
    model = network()
    whole = optimizer_of(model)
    steps(model, whole)
    model[0].bias.requires_grad_(False)
    part = optimizer_of(model)
    part.load_state_dict(whole.state_dict())
    assert len(part.state) == len(whole.state) - 1
    whole.load_state_dict(part.state_dict())
    assert len(whole.state) == len(part.state)


def test_the_state_of_another_network_is_refused():
    optimizer = optimizer_of(network())
    other = optimizer_of(nn.Sequential(nn.Identity(), *network()))
    message = (
        "optimizer: expected .* got none of 4, such as 0.bias, but of 4 others, .* 1.bias; build"
    )
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(other.state_dict())


def test_every_setting_of_the_optimizer_is_its_own():
    cfg = load_config(CONFIGS / "COCO-Detection" / "faster_rcnn_MNV2_FPN_dk_l3_1x.yaml")
    cfg.MODEL.MOBILENETV2.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
    cfg.SOLVER.MOMENTUM, cfg.SOLVER.NESTEROV = 0.8, True
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM = 1e-4, 3e-5
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 2e-5
    model = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.8, True)}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    stem = model.backbone.bottom_up.stem.conv1
    head = model.roi_heads.box_predictor.cls_score
    assert [decay[id(p)] for p in (stem.weight, stem.norm.weight, head.bias)] == [1e-4, 3e-5, 2e-5]

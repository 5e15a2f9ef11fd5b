"""Warm starts train as their rigid twins do: scope, resting taps, the generators' limit."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dk_detectron.analysis import CONFIGS, load_config
from dk_detectron.engine import Trainer
from dk_detectron.layers import DeformKernelConv2d, LocalDeformKernel2d
from dk_detectron.ops import axis_coefficients

CHANNELS = 64


def set_pseudo_inverse(layer: LocalDeformKernel2d, weight: torch.Tensor) -> None:
    """The start of version 0.1: the smallest scope whose kernel in the centre is ``weight``."""
    layer.set_rigid_weight(weight)
    size = layer.scope_size[0]
    inverse = torch.linalg.pinv(axis_coefficients(torch.arange(3.0) + (size - 3) / 2, size))
    layer.weight.data.copy_(inverse @ weight @ inverse.t())
    nn.init.zeros_(layer.kernel_offset_generator.bias)


def build(convolution, set_weight=None) -> nn.Sequential:
    """Six depthwise layers of rough (alternating) kernels, as real networks have; no norms."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.tensor([1.0, -1, 1]).outer(torch.tensor([1.0, -1, 1])) * 2**0.5 / 3
    signs = torch.randn(CHANNELS, 1, 1, 1, generator=generator).sign()
    layers = [nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.ReLU()]
    for _ in range(6):
        layer = convolution(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)
        if set_weight is None:
            layer.weight.data.copy_(rough * signs)
        else:
            set_weight(layer, rough * signs)
        layers += [layer, nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 4)]
    for module in layers:
        if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "groups", 1) == 1:
            std = (2 / module.weight[0].numel()) ** 0.5
            nn.init.normal_(module.weight, std=std, generator=generator)
            nn.init.zeros_(module.bias)
    return nn.Sequential(*layers)


def train(network: nn.Module, steps: int = 60) -> list[float]:
    """By the MobileNet-V2 configurations' optimizer, at a rate that the rigid network bears."""
    cfg = load_config(CONFIGS / "COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml")
    cfg.SOLVER.BASE_LR = 0.03
    optimizer = Trainer.build_optimizer(cfg, network)
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 4
    images[:, 0] += labels.view(-1, 1, 1)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@functools.cache
def rigid_losses() -> list[float]:
    return train(build(nn.Conv2d))


@pytest.mark.parametrize(
    "layer",
    [
        LocalDeformKernel2d,
        functools.partial(LocalDeformKernel2d, scope_size=5),
        DeformKernelConv2d,
    ],
    ids=["scope 4", "scope 5", "with data offsets"],
)
def test_a_warm_start_trains_where_its_rigid_twin_does(layer):
    rigid = rigid_losses()
    losses = train(build(layer, lambda layer, weight: layer.set_rigid_weight(weight)))
    assert losses[0] == pytest.approx(rigid[0], rel=1e-4)
    assert rigid[-1] < 0.05 and losses[-1] < 0.05
    # A start that is too sensitive jumps before it dies. (The first steps are rough for the twin.)
    assert all(after < before + 0.05 for before, after in zip(losses[5:], losses[6:], strict=False))


@pytest.mark.parametrize("limit", [0.0, 0.1])
def test_the_pseudo_inverse_would_not(limit, monkeypatch):
    """So the test above tells starts apart; and the limit alone does not save this one."""
    original = Trainer.build_optimizer

    def build_optimizer(cfg, model):
        cfg.SOLVER.CLIP_OFFSET_GRADIENTS = limit
        return original(cfg, model)

    monkeypatch.setattr(Trainer, "build_optimizer", build_optimizer)
    losses = train(build(LocalDeformKernel2d, set_pseudo_inverse))
    assert losses[0] == pytest.approx(rigid_losses()[0], rel=1e-4)
    assert not losses[-1] < 0.5


def test_the_generators_gradients_are_limited_and_nothing_else():
    cfg = load_config(CONFIGS / "COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml")
    network = nn.ModuleDict({"dk": LocalDeformKernel2d(4, 4, 3, groups=4), "fc": nn.Linear(4, 4)})
    optimizer = Trainer.build_optimizer(cfg, network)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer.step()
    generator = network["dk"].kernel_offset_generator
    norm = torch.stack([p.grad.norm() for p in generator.parameters()]).norm()
    limit = cfg.SOLVER.CLIP_OFFSET_GRADIENTS
    assert 0 < limit < 1 and norm == pytest.approx(limit, rel=1e-4)
    rate, factor = cfg.SOLVER.BASE_LR, cfg.SOLVER.OFFSET_LR_FACTOR
    for name, parameter in network.named_parameters():
        change = before[name] - parameter
        if "generator" in name:
            assert change.norm() <= 1.001 * rate * factor * limit
        else:
            assert change.min() > 0.99 * rate * 7
    assert {float(p.grad.max()) for n, p in network.named_parameters() if "gen" not in n} == {7.0}


def test_weight_decay_pulls_no_tap():
    """Decay alone, without a gradient, leaves where taps rest, whatever the decay of biases."""
    cfg = load_config(CONFIGS / "COCO-Detection/faster_rcnn_MNV2_FPN_dcn_dk_l3_1x.yaml")
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.5, 0.5
    layer = DeformKernelConv2d(4, 4, 3, groups=4)
    layer.set_rigid_weight(torch.randn(4, 1, 3, 3))
    rest = layer.kernel_offset_generator.bias.detach().clone()
    assert rest.any()
    for kind in "SGD", "AdamW":
        cfg.SOLVER.OPTIMIZER = kind
        optimizer = Trainer.build_optimizer(cfg, layer)
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weight = layer.weight.detach().clone()
        optimizer.step()
        assert torch.equal(layer.kernel_offset_generator.bias, rest)
        assert (layer.weight.abs() < weight.abs()).all()

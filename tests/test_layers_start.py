"""Warm starts train as their rigid twins do: scope, resting taps, the generators' limit."""

import functools
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_tools import load_tool
from torch import nn

from dk_detectron.engine import Trainer
from dk_detectron.layers import DeformKernelConv2d, LocalDeformKernel2d
from dk_detectron.model_zoo import CONFIGS, load_config
from dk_detectron.ops import sample_kernel

CHANNELS = 64


@pytest.fixture(scope="module")
def study():
    return load_tool("study_start")


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
    images, labels = torch.randn(16, 3, 24, 24, generator=generator), torch.arange(16) % 4
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
def test_the_pseudo_inverse_would_not(limit, study, monkeypatch):
    """So the test above tells starts apart; and the limit alone does not save this one."""
    original = Trainer.build_optimizer

    def build_optimizer(cfg, model):
        cfg.SOLVER.CLIP_OFFSET_GRADIENTS = limit
        return original(cfg, model)

    monkeypatch.setattr(Trainer, "build_optimizer", build_optimizer)
    losses = train(build(LocalDeformKernel2d, study.set_pseudo_inverse))
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


# ---- tools/study_start.py
# ------------------------------------------------------------------------------


def at_rest(layer: LocalDeformKernel2d) -> torch.Tensor:
    rest = layer.kernel_offset_generator.bias.detach().unsqueeze(0)
    return sample_kernel(layer.weight.detach(), rest, layer.kernel_size)[0]


@pytest.mark.parametrize("scope_size", [4, 5])
def test_starts_are_what_their_names_say(study, scope_size):
    layer = LocalDeformKernel2d(512, 512, 3, groups=512, scope_size=scope_size)
    rigid = torch.randn(512, 1, 3, 3)
    for name, set_weight in study.STARTS.items():
        set_weight(layer, rigid)
        moved = layer.kernel_offset_generator.bias.any()
        assert moved == (name == "spread")
        if name in ("spread", "pseudo-inverse"):
            torch.testing.assert_close(at_rest(layer), rigid, rtol=1e-4, atol=1e-5)
        else:
            assert at_rest(layer).std() == pytest.approx(1, abs=0.1), name


def test_a_clamped_generator_learns_nothing_from_taps_outside(study):
    generator = study.ClampedGenerator(1, 18, 1)
    nn.init.zeros_(generator.weight)
    with torch.no_grad():  # taps rest at 0.5, 1.5 and 2.5 in a scope of 4
        generator.bias.zero_()
        generator.bias[0] = -0.6  # the first row's first tap, to -0.1
        generator.bias[17] = 0.6  # the last column's last tap, to 3.1
    generator(torch.ones(1, 1, 1, 1)).sum().backward()
    expected = torch.ones(18)
    expected[[0, 17]] = 0
    assert torch.equal(generator.bias.grad, expected)


def test_a_study_goes_on_where_it_stopped(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PASSES", 1)
    monkeypatch.setattr(study, "STEPS", 1)
    runs = [
        study.ScratchRun("digits", start, 4, 0.1, 0.1, True, 0) for start in ("rigid", "centre")
    ]
    results = [{**asdict(run), **study.train_small_network(run)} for run in runs]
    assert all(0 <= result["error"] <= 100 for result in results)
    assert results[1]["moved"] < 0.1 and results[1]["clipped"] == 0
    output = tmp_path / "runs.jsonl"
    output.write_text("".join(json.dumps(result) + "\n" for result in results))
    assert study.execute(runs, pytest.fail, output) == results
    lines = study.tabulate_scratch(results).splitlines()
    assert lines[2].split()[3] == "rigid" and lines[3].split()[3] == "centre"


def test_first_steps_name_the_step_of_divergence(study):
    common = {"config": "configs/demo/pretrained_MNV2_FPN_dk_l3.yaml", "opts": "", "start": "ours"}
    common |= {"limit": 0.05, "factor": 0.1, "steps": 200, "seed": 0}
    results = [
        {**common, "rate": 0.005, "diverged": None, "loss": 1.25},
        {**common, "rate": 0.02, "diverged": 17, "loss": None},
    ]
    row = study.tabulate_first_steps(results).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "3x3 local", "ours", "0.05", "0.1", "200", "1.25", "† 17"
    ]  # fmt: skip


def test_curvature_is_the_largest_eigenvalue_of_the_hessian(study):
    """Of a quadratic form, of which it is known."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_offset_generator, self.b_offset_generator = nn.Linear(3, 2), nn.Linear(2, 1)

        def forward(self, scale):
            a, b = self.a_offset_generator.weight, self.b_offset_generator.weight
            curvatures = torch.tensor([1.0, 2, 3, 4, 5, 6]).view(2, 3)
            return {"loss": scale * ((curvatures * a**2).sum() / 2 + 10 * (b**2).sum())}

    trainer = SimpleNamespace(model=Quadratic().double(), data_loader=[1.0, 3.0])
    found = study.curvature(trainer, iterations=60)
    assert found["a_offset_generator.weight"] == pytest.approx(12, rel=1e-3)
    assert found["b_offset_generator.weight"] == pytest.approx(40, rel=1e-3)
    assert found["all"] == pytest.approx(40, rel=1e-3)

"""What training says of its offsets."""
# ruff: noqa: F811  (fixtures)

import itertools
import json
import logging
import math
import re

import pytest
import torch
from detectron2.engine.hooks import EvalHook
from test_imagenet import CONFIGS, config, detection_set, load_config, pictures  # noqa: F401
from torch import nn

from dk_detectron import monitoring
from dk_detectron.imagenet import ClassificationTrainer
from dk_detectron.layers import (
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
)
from dk_detectron.monitoring import OffsetMonitor

DATA_OFFSETS = "MODEL.DEFORM_KERNEL.DATA_OFFSET_ON_PER_STAGE", [False, False, False, True]
# Both kinds of offsets learn at once.
LIVELY = ["SOLVER.OFFSET_LR_FACTOR", 1.0, "DATASETS.TEST", "()", *DATA_OFFSETS]


# Offsets


def network() -> nn.Sequential:
    """Every layer with offsets, at random; of the data offsets, none is long."""
    net = nn.Sequential(
        LocalDeformKernel2d(4, 4, 3, padding=1, groups=4, scope_size=(4, 5)),
        GlobalDeformKernel2d(4, 4, (1, 3), padding=(0, 1)),
        DeformConv2d(4, 4, 3, stride=2, padding=1, groups=4),
        DeformKernelConv2d(4, 4, 3, padding=1, groups=4, scope_size=3),
        nn.Conv2d(4, 4, 1),
    )
    for name, parameter in net.named_parameters():
        if "offset_generator" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


def expected_offsets(net: nn.Sequential, x: torch.Tensor) -> dict[tuple[str, str], list[float]]:
    """By kind and layer: share of clipped taps, mean, largest; one tap after the other."""
    found = {}
    for i, layer in enumerate(net):
        for kind in "kernel_offset", "data_offset":
            generator = getattr(layer, f"{kind}_generator", None)
            if generator is None:
                continue
            offset = generator(x if isinstance(generator, nn.Conv2d) else x.mean((2, 3)))
            clipped = []
            taps = itertools.product(*map(range, layer.kernel_size))
            for t, tap in enumerate(taps if kind == "kernel_offset" else []):
                outside = False
                for axis in range(2):
                    side = layer.scope_size[axis]
                    rest = (side - layer.kernel_size[axis]) / 2 + tap[axis]
                    location = rest + offset[:, 2 * t + axis].double()
                    outside |= (location < 0) | (location > side - 1)
                clipped.append(outside)
            share = torch.stack(clipped).double().mean().item() if clipped else 0.0
            found[kind, str(i)] = [share, offset.abs().mean().item(), offset.abs().max().item()]
        x = layer(x)
    return found


@torch.no_grad()
def test_offsets_are_those_of_the_layers():
    net, x = network(), torch.randn(3, 4, 8, 9)
    expected = expected_offsets(net, x)
    monitor = OffsetMonitor(net)
    monitor.watch()
    net(x)
    net(torch.full_like(x, 1e3))  # as a second run under gradient checkpointing: it does not count
    found = {
        (offsets.kind, layer.layer): layer for offsets in monitor.stop() for layer in offsets.layers
    }
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        layer = found[key]
        assert [layer.clipped, layer.mean, layer.largest] == pytest.approx(values, rel=1e-5), key
    assert 0 < found["kernel_offset", "0"].clipped < 1
    assert not any(module._forward_hooks for module in net.modules())
    assert monitor.stop() == []


@torch.no_grad()
def test_scalars_weigh_layers_by_their_taps_and_name_the_worst():
    net, x = network(), torch.randn(3, 4, 8, 9)
    expected = expected_offsets(net, x)
    counts = {"0": 3 * 9 * 8 * 9, "1": 3 * 3, "2": 3 * 9 * 4 * 5, "3": 3 * 9 * 4 * 5}
    monitor = OffsetMonitor(net)
    monitor.watch()
    net(x)
    kernel, data = monitor.stop()

    def average(kind, which):
        layers = [layer for k, layer in expected if k == kind]
        total = sum(expected[kind, layer][which] * counts[layer] for layer in layers)
        return total / sum(counts[layer] for layer in layers)

    worst = max("013", key=lambda layer: expected["kernel_offset", layer][0])
    assert kernel.scalars() == pytest.approx(
        {
            "kernel_offset/mean": average("kernel_offset", 1),
            "kernel_offset/max": max(expected["kernel_offset", layer][2] for layer in "013"),
            "kernel_offset/clipped": average("kernel_offset", 0),
            f"kernel_offset/most_clipped/{worst}": expected["kernel_offset", worst][0],
        },
        rel=1e-5,
    )
    worst = max("23", key=lambda layer: expected["data_offset", layer][1])
    assert data.scalars() == pytest.approx(
        {
            "data_offset/mean": average("data_offset", 1),
            "data_offset/max": max(expected["data_offset", layer][2] for layer in "23"),
            f"data_offset/largest_mean/{worst}": expected["data_offset", worst][1],
        },
        rel=1e-5,
    )
    assert re.fullmatch(
        r"kernel offsets: mean [\d.]+ cells, largest [\d.]+, [\d.]+% of taps clipped; worst: "
        r"\d \(mean [\d.]+, largest [\d.]+, [\d.]+% clipped\)",
        str(kernel),
    )
    assert "clipped" not in str(data) and "pixels" in str(data)


@torch.no_grad()
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_offsets_that_are_no_numbers_are_infinite_and_clipped(value):
    layer = LocalDeformKernel2d(2, 2, 3, padding=1, groups=2, scope_size=4)
    layer.kernel_offset_generator.bias[5] = value
    monitor = OffsetMonitor(nn.Sequential(layer))
    monitor.watch()
    layer(torch.zeros(1, 2, 5, 5))
    (offsets,) = monitor.stop()
    scalars = offsets.scalars()
    assert scalars["kernel_offset/max"] == scalars["kernel_offset/mean"] == math.inf
    assert scalars["kernel_offset/clipped"] == pytest.approx(1 / 9)


@pytest.fixture
def log(caplog, monkeypatch):
    """What detectron2 and this project log, whether or not a handler has been set up."""
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    with caplog.at_level(logging.INFO):
        yield caplog


def train(cfg, trainer_class=ClassificationTrainer, *, resume=False, hooks=(), without=()):
    torch.manual_seed(int(resume))
    trainer = trainer_class(cfg)
    trainer._hooks = [h for h in trainer._hooks if not isinstance(h, without)]
    trainer.register_hooks(list(hooks))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def metrics(folder) -> dict[int, dict]:
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line for line in lines}


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["MODEL.BACKBONE.GRADIENT_CHECKPOINTING", True],
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"],
    ],
    ids=["plain", "gradient-checkpointing", "bfloat16"],
)
def test_metrics_have_offsets_and_training_is_the_same(
    more,
    pictures,
    tmp_path,
    monkeypatch,
    log,
):
    monkeypatch.setattr(monitoring, "PERIOD", 2)
    opts = [*LIVELY, *more, "SOLVER.MAX_ITER", 5]
    watched = train(config(pictures, tmp_path / "watched", *opts))
    unwatched = train(config(pictures, tmp_path / "unwatched", *opts), without=OffsetMonitor)
    expected = unwatched.model.state_dict()
    for name, tensor in watched.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    logged = watched.storage.history("kernel_offset/mean").values()
    assert [iteration for _, iteration in logged] == [1, 3, 4]
    found = {k: v for k, v in metrics(tmp_path / "watched")[4].items() if "_offset/" in k}
    worst = [name for name in found if re.search("most_clipped|largest_mean", name)]
    assert len(worst) == 2 and all(name.split("/")[2].startswith("backbone.") for name in worst)
    assert set(found) - set(worst) == {
        "kernel_offset/mean", "kernel_offset/max", "kernel_offset/clipped",
        "data_offset/mean", "data_offset/max",
    }  # fmt: skip
    assert all(found[f"{kind}_offset/max"] > 0 for kind in ("kernel", "data"))
    assert log.text.count("kernel offsets: mean") == 3
    assert not any("_offset/" in name for name in metrics(tmp_path / "unwatched")[4])


def test_gradient_checkpointing_has_the_same_offsets(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "PERIOD", 2)
    found = []
    for enabled in False, True:
        more = "SOLVER.MAX_ITER", 3, "MODEL.BACKBONE.GRADIENT_CHECKPOINTING", enabled
        folder = tmp_path / str(enabled)
        train(config(pictures, folder, *LIVELY, *more))
        found.append({k: v for k, v in metrics(folder)[2].items() if "_offset/" in k})
    assert found[0] == found[1] and len(found[0]) == 7


def test_a_compiled_backbone_is_not_watched_and_says_so(
    pictures,
    tmp_path,
    log,
):
    trainer = ClassificationTrainer(
        config(pictures, tmp_path, "MODEL.BACKBONE.COMPILE", True, "SOLVER.MAX_ITER", 3)
    )
    (monitor,) = (h for h in trainer._hooks if isinstance(h, OffsetMonitor))
    trainer.iter = 0
    monitor.before_train()
    monitor.before_step()
    assert log.text.count("Offsets are not logged: MODEL.BACKBONE.COMPILE hides them") == 1
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_a_rigid_network_logs_no_offsets(pictures, tmp_path):
    cfg = config(pictures, tmp_path, "MODEL.DEFORM_KERNEL.CONV_3X3", "rigid", "SOLVER.MAX_ITER", 3)
    train(cfg, without=EvalHook)
    assert metrics(tmp_path) and "offset" not in (tmp_path / "metrics.json").read_text()

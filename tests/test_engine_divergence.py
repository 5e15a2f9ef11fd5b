"""What training says of its offsets, and how it ends if it diverges."""
# ruff: noqa: F811  (fixtures)

import itertools
import json
import logging
import math
import re
from argparse import Namespace

import pytest
import torch
from detectron2.engine import HookBase, launch
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_engine_classification import CONFIGS, config, detection_set, load_config, pictures  # noqa: F401
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from dk_detectron.engine import ClassificationTrainer, Trainer, divergence, monitoring
from dk_detectron.engine.divergence import DivergedError, DivergenceGuard
from dk_detectron.engine.monitoring import OffsetMonitor
from dk_detectron.layers import (
    DeformConv2d,
    DeformKernelConv2d,
    GlobalDeformKernel2d,
    LocalDeformKernel2d,
)
from dk_detectron.weights import CheckpointError, non_finite

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
    unwatched = train(
        config(pictures, tmp_path / "unwatched", *opts), without=(OffsetMonitor, DivergenceGuard)
    )
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


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def test_frozen_layers_that_can_never_adapt_are_named(log):
    net = nn.ModuleDict()
    net["learning"] = LocalDeformKernel2d(4, 4, 3)
    net["taught"] = frozen(LocalDeformKernel2d(4, 4, 3))
    net["rigid"] = frozen(nn.Conv2d(4, 4, 3))
    monitoring.warn_of_rigid_layers(net.requires_grad_())
    assert not log.records
    nn.init.normal_(net["taught"].kernel_offset_generator.weight)
    frozen(net["taught"])
    net["gates"] = frozen(GlobalDeformKernel2d(4, 4, 3))
    net["offsets"] = frozen(LocalDeformKernel2d(4, 4, 3, offset_generator="separable"))
    net["partly"] = frozen(DeformKernelConv2d(4, 4, 3))
    net["partly"].data_offset_generator.requires_grad_()
    monitoring.warn_of_rigid_layers(net)
    (record,) = log.records
    text = record.getMessage()
    assert text.startswith("MODEL.BACKBONE.FREEZE_AT: 2 layers") and text.endswith("gates, offsets")


def test_training_names_the_frozen_layers_that_can_never_adapt(pictures, tmp_path, log):
    cfg = config(pictures, tmp_path, "MODEL.BACKBONE.FREEZE_AT", 2)
    ClassificationTrainer(cfg).resume_or_load(resume=False)
    (text,) = (r.getMessage() for r in log.records if "rigid for ever" in r.getMessage())
    assert "backbone.res2" in text and "backbone.res3" not in text


def test_gradient_checkpointing_has_the_same_offsets(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "PERIOD", 2)
    found = []
    for enabled in False, True:
        more = "SOLVER.MAX_ITER", 3, "MODEL.BACKBONE.GRADIENT_CHECKPOINTING", enabled
        folder = tmp_path / str(enabled)
        train(config(pictures, folder, *LIVELY, *more))
        found.append({k: v for k, v in metrics(folder)[2].items() if "_offset/" in k})
    assert found[0] == found[1] and len(found[0]) == 7


def test_histograms_of_offsets_go_to_tensorboard_if_asked_for(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "PERIOD", 2)
    events = {}
    for period in 0, 3:
        more = "SOLVER.MAX_ITER", 4, "MODEL.DEFORM_KERNEL.VIS_PERIOD", period
        trainer = train(config(pictures, tmp_path / str(period), *LIVELY, *more))
        events[period] = EventAccumulator(str(tmp_path / str(period)))
        events[period].Reload()
    kinds = "kernel_offset", "data_offset"
    assert set(events[3].Tags()["histograms"]) == {
        f"{kind}/{name}"
        for name, layer in trainer.checkpointer.model.named_modules()
        for kind in kinds
        if hasattr(layer, f"{kind}_generator")
    }
    for kind in kinds:
        tags = [tag for tag in events[3].Tags()["histograms"] if tag.startswith(kind)]
        drawn = [event for tag in tags for event in events[3].Histograms(tag)]
        assert {event.step for event in drawn} == {2}
        values = [event.histogram_value for event in drawn]
        assert all(sum(value.bucket) == value.num > 0 for value in values)
        largest = dict((i, v) for v, i in trainer.storage.history(f"{kind}/max").values())
        assert max(max(-v.min, v.max) for v in values) == pytest.approx(largest[2])
    assert not events[0].Tags()["histograms"]


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


# Divergence


class Poison(HookBase):
    """Spoils a parameter, or its gradient, in one iteration."""

    def __init__(self, name: str, iteration: int, gradient: bool = False):
        self.name, self.iteration, self.gradient = name, iteration, gradient

    def before_train(self):
        self.parameter = self.trainer.model.get_parameter(self.name)
        if self.gradient:
            self.parameter.register_hook(
                lambda grad: grad * (math.inf if self.trainer.iter == self.iteration else 1)
            )

    def before_step(self):
        if self.trainer.iter == self.iteration and not self.gradient:
            with torch.no_grad():
                self.parameter.fill_(math.nan)


def last_checkpoint(folder) -> str:
    return (folder / "last_checkpoint").read_text()


def assert_only_finite_checkpoints(folder) -> None:
    for path in folder.glob("*.pth"):
        assert not non_finite(torch.load(path, weights_only=True)["model"]), path


GENERATOR = "backbone.res3.0.conv2.kernel_offset_generator"


def test_a_loss_that_is_not_finite_ends_a_classifier_with_its_story(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(monitoring, "PERIOD", 2)
    more = "SOLVER.OFFSET_LR_FACTOR", 0.5, "SOLVER.CHECKPOINT_PERIOD", 1
    cfg = config(pictures, tmp_path, *more)
    with pytest.raises(DivergedError) as caught:
        train(cfg, hooks=[Poison(f"{GENERATOR}.weight", 4)])
    story = str(caught.value)
    rate = r"(\S+) of weights, (\S+) of offset generators"
    base, of_offsets = map(float, re.search(f"learning rate: {rate}", story).groups())
    assert 0 < base < cfg.SOLVER.BASE_LR and of_offsets == pytest.approx(base / 2)
    for part in (
        "training has diverged at iteration 4: Loss became infinite or NaN at iteration=4!",
        "losses at iteration 4: loss_cls nan",
        f"weights that are not finite: 1, first {GENERATOR}.weight",
        f"first output that is not finite: {GENERATOR}\n",
        # Before that layer; and when all was well.
        "\n  in this batch, kernel offsets: mean ",
        "\n  at iteration 3, kernel offsets: mean ",
        "to change: lower SOLVER.CLIP_OFFSET_GRADIENTS (now 1), or lower "
        "SOLVER.OFFSET_LR_FACTOR (now 0.5); else lower SOLVER.BASE_LR, raise "
        "SOLVER.WARMUP_ITERS, or set SOLVER.CLIP_GRADIENTS.ENABLED True",
        # The fourth step has left weights with which the fifth fails whatever the rate.
        "--resume goes on from model_0000002.pth, the last that is good, instead of "
        "model_0000003.pth",
    ):
        assert part in story
    names = re.search("pictures of this batch: (.*)", story)[1].split(", ")
    assert len(names) == 4 and all((pictures / name).is_file() for name in names)
    assert last_checkpoint(tmp_path) == "model_0000002.pth"
    assert_only_finite_checkpoints(tmp_path)
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize("iteration", [3, 5], ids=["periodic", "final"])
def test_weights_that_are_not_finite_are_not_saved(iteration, pictures, tmp_path):
    cfg = config(pictures, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2)
    with pytest.raises(DivergedError) as caught:
        train(cfg, hooks=[Poison("linear.bias", iteration, gradient=True)])
    story, last = str(caught.value), f"model_{iteration - 2:07d}.pth"
    assert (
        f"training has diverged at iteration {iteration}: model_{iteration:07d}.pth: expected "
        "finite weights to save, got 1 that are not, such as linear.bias; nothing has been written"
    ) in story
    assert re.search(r"losses at iteration \d: total_loss \d\S+, loss_cls|total_loss \d", story)
    assert "first output that is not finite: linear\n" in story
    assert "to change: lower SOLVER.BASE_LR, raise" in story
    assert f"--resume goes on from {last}, which is good" in story
    assert last_checkpoint(tmp_path) == last
    assert not {f"model_{iteration:07d}.pth", "model_final.pth"} & {
        path.name for path in tmp_path.iterdir()
    }
    assert_only_finite_checkpoints(tmp_path)
    # detectron2 evaluates after the last iteration even if that has failed.
    assert not (tmp_path / "evaluation.json").exists()


def test_without_a_good_checkpoint_training_starts_again(pictures, tmp_path):
    cfg = config(pictures, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()")
    with pytest.raises(DivergedError, match="no checkpoint is good: start again, in another"):
        train(cfg, hooks=[Poison("linear.weight", 1)])
    assert (tmp_path / "model_0000000.pth").exists()
    assert train(cfg, resume=True).start_iter == 0


def test_checkpoints_of_another_run_are_left_alone(pictures, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(DivergedError, match="this run has no checkpoint yet to --resume from"):
        train(config(pictures, tmp_path), hooks=[Poison("linear.weight", 1)])
    assert last_checkpoint(tmp_path) == "model_final.pth"


@pytest.mark.parametrize(
    ("losses", "lowest", "since", "good"),
    [
        ([3.0] * 20, 1.1, None, True),
        ([3.0] * 20, 0.9, None, False),
        ([0.5] * 11 + [4.0] * 9, 0.5, None, True),  # noise, as it seemed then
        ([0.5] * 9 + [4.0] * 11, 0.5, None, False),
        ([0.5] * 19 + [30.0], 0.5, 50, False),
        ([7.0, 9.0], math.inf, None, True),  # too early to tell
    ],
)
def test_a_checkpoint_is_good_unless_the_loss_was_rising(losses, lowest, since, good):
    state = {"losses": losses, "lowest": lowest, "since": since}
    guard = DivergenceGuard(None, None)
    guard._bad = 100
    content = {
        "iteration": 50,
        "model": {"weight": torch.ones(2)},
        "trainer": {"hooks": {"DivergenceGuard": state}},
    }
    assert guard._is_good(content) == good
    # Of an older one, only the weights are known.
    assert guard._is_good({**content, "trainer": {}})
    content["model"]["weight"][1] = math.nan
    assert not guard._is_good({**content, "trainer": {}})


def test_an_outlier_counts_until_the_loss_is_normal(monkeypatch):
    monkeypatch.setattr(divergence, "WINDOW", 3)
    guard = DivergenceGuard(None, None)
    since = []
    for iteration, loss in enumerate([2.0, 1.5, 9.0, 1.0, 21.0, 5.0, 30.0, 5.0, 19.0, 4.0, 99.0]):
        guard.trainer = Namespace(iter=iteration)
        guard._add(loss)
        since.append(guard.since)
    # The lowest median is 2, then 1.5 once the window has [1.5, 9, 1].
    assert guard.lowest == 1.5
    assert since == [None, None, None, None, 4, 4, 4, 4, 4, None, 10]


def test_median_and_lowest_are_kept_over_a_resumption(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "WINDOW", 3)
    more = "SOLVER.CHECKPOINT_PERIOD", 4, "DATASETS.TEST", "()"
    whole = train(config(pictures, tmp_path, *more))
    losses = [loss for loss, _ in whole.storage.history("total_loss").values()]
    expected = {
        "losses": losses[-3:],
        "lowest": min(sorted(losses[i : i + 3])[1] for i in range(4)),
        "since": None,
    }
    assert whole.guard.state_dict() == expected
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    resumed = train(config(pictures, tmp_path, *more), resume=True)
    assert resumed.start_iter == 4
    assert resumed.guard.state_dict() == expected


def test_older_checkpoints_resume_exactly(pictures, tmp_path):
    """Those without this hook, and without the names of the optimizer's parameters."""
    cfg = config(pictures, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 4, "DATASETS.TEST", "()")
    expected = train(cfg).model.state_dict()
    path = tmp_path / "model_0000003.pth"
    content = torch.load(path, weights_only=True)
    del content["trainer"]["hooks"]["DivergenceGuard"]
    for group in content["trainer"]["_trainer"]["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(content, path)
    (tmp_path / "last_checkpoint").write_text(path.name)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 4
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_of_version_0_1_is_told_how_to_go_on(pictures, tmp_path):
    """Its optimizer had other groups: generators' biases decayed."""
    cfg = config(pictures, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 4, "DATASETS.TEST", "()")
    train(cfg)
    path = tmp_path / "model_0000003.pth"
    content = torch.load(path, weights_only=True)
    optimizer = content["trainer"]["_trainer"]["optimizer"]
    optimizer["param_groups"] = [
        {**optimizer["param_groups"][0], "params": sorted(optimizer["state"])}
    ]
    del optimizer["param_groups"][0]["param_names"]
    torch.save(content, path)
    (tmp_path / "last_checkpoint").write_text(path.name)
    with pytest.raises(CheckpointError, match="as version 0.1 .* MODEL.WEIGHTS and another"):
        train(cfg, resume=True)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_resumed_run_takes_the_rates_of_its_configuration(optimizer, pictures, tmp_path):
    """Also where another factor for offsets makes other parameter groups; momenta stay."""
    more = "SOLVER.OPTIMIZER", optimizer, "SOLVER.CHECKPOINT_PERIOD", 3, "DATASETS.TEST", "()"
    rates = "SOLVER.BASE_LR", 0.01, "SOLVER.OFFSET_LR_FACTOR"
    train(config(pictures, tmp_path, *more, *rates, 1.0))
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    saved = torch.load(tmp_path / "model_0000002.pth", weights_only=True)
    saved = saved["trainer"]["_trainer"]["optimizer"]
    indices = {
        name: index
        for group in saved["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }

    rates = "SOLVER.BASE_LR", 0.002, "SOLVER.OFFSET_LR_FACTOR"
    trainer = ClassificationTrainer(config(pictures, tmp_path, *more, *rates, 0.5))
    trainer.resume_or_load(resume=True)
    share = trainer.scheduler.get_lr()[0] / 0.002
    assert 0 < share < 1
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            factor = 0.5 if "offset_generator" in names[parameter] else 1.0
            assert group["lr"] == pytest.approx(0.002 * factor * share)
            state = saved["state"][indices[names[parameter]]]
            for key, value in trainer.optimizer.state[parameter].items():
                assert torch.equal(value, state[key]), (names[parameter], key)
    # The biases of generators, which do not decay, are a group of their own.
    assert len(saved["param_groups"]) == 2 and len(trainer.optimizer.param_groups) == 3
    trainer.train()
    assert trainer.iter == 6


def test_a_detector_that_diverges_resumes_at_a_lower_rate(detection_set, tmp_path, monkeypatch):
    """An absurd rate from the eighth step on; what is saved after it is finite, and useless."""
    monkeypatch.setattr(divergence, "WINDOW", 4)
    monkeypatch.setattr(monitoring, "PERIOD", 4)
    opts = f"""
        DATASETS.TRAIN ('{detection_set}',) DATASETS.TEST () SOLVER.IMS_PER_BATCH 2
        INPUT.MIN_SIZE_TRAIN (48,64) MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 16
        MODEL.RPN.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8
        SOLVER.OPTIMIZER SGD SOLVER.BASE_LR 0.002 SOLVER.WARMUP_ITERS 2 SOLVER.MAX_ITER 24
        SOLVER.OFFSET_LR_FACTOR 1.0 SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR SOLVER.STEPS (8,)
        DATALOADER.NUM_WORKERS 0 SOLVER.CHECKPOINT_PERIOD 1 OUTPUT_DIR {tmp_path}
    """.split()
    path = CONFIGS / "demo" / "shapes_MNV2_FPN_dk_l3.yaml"
    cfg = load_config(path, [*opts, "SOLVER.GAMMA", 20000.0])
    with pytest.raises(DivergedError) as caught:
        train(cfg, Trainer)
    story = str(caught.value)
    for part in (
        r"training has diverged at iteration (9|1\d|2\d): ",
        r"losses at iteration \d+: .*loss_cls \S+, .*loss_rpn_loc ",
        r"learning rate: 40 of weights, 40 of offset generators",
        r"(first output that is not finite: |every output in this process is finite; .* is of )\w",
        r"at iteration \d+, kernel offsets: mean \S+ cells, .*; worst: backbone.bottom_up.*conv2 ",
        r"pictures of this batch: \S+/00000\d.jpg, \S+/00000\d.jpg\n",
        r"to change: .*lower SOLVER.BASE_LR",
        r"--resume goes on from model_0000007.pth, the last that is good, instead of model_00000",
    ):
        assert re.search(part, story), (part, story)
    assert last_checkpoint(tmp_path) == "model_0000007.pth"
    assert (tmp_path / "model_0000008.pth").exists()
    assert_only_finite_checkpoints(tmp_path)

    lower = "SOLVER.GAMMA", 1.0, "SOLVER.BASE_LR", 0.001, "SOLVER.OFFSET_LR_FACTOR", 0.1
    resumed = train(load_config(path, [*opts, *lower, "SOLVER.MAX_ITER", 10]), Trainer, resume=True)
    assert resumed.start_iter == 8 and resumed.iter == 10
    assert resumed.storage.history("lr").latest() == 0.001
    assert resumed.storage.history("total_loss").latest() < 10
    assert last_checkpoint(tmp_path) == "model_final.pth"


def train_in_two_processes(folder, output) -> None:
    """The third step fails in the second process, with its pictures."""
    torch.set_num_threads(1)
    trainer = ClassificationTrainer(config(folder, output, "SOLVER.CHECKPOINT_PERIOD", 1))

    def spoil(module, inputs):
        return inputs[0] * (math.nan if trainer.iter == 2 and comm.get_rank() == 1 else 1)

    trainer.checkpointer.model.linear.register_forward_pre_hook(spoil)
    trainer.train()


def test_the_main_process_stops_a_job(pictures, tmp_path):
    with pytest.raises(ProcessRaisedException, match="Process 0 terminated") as caught:
        launch(train_in_two_processes, 2, dist_url="auto", args=(pictures, tmp_path))
    story = str(caught.value)
    assert "DivergedError: training has diverged at iteration 2: " in story
    assert "losses at iteration 2: loss_cls nan" in story
    assert "every output in this process is finite" in story
    assert story.count("/train/") == 2  # pictures of this process
    assert "--resume goes on from model_0000000.pth, the last that is good, instead of" in story
    assert last_checkpoint(tmp_path) == "model_0000000.pth"


def test_another_process_leaves_time_for_the_main_one(pictures, tmp_path, monkeypatch):
    """A detector's proposals may stop any process, while the main one waits for its gradients."""
    waited = []
    monkeypatch.setattr(divergence.time, "sleep", waited.append)
    trainer = ClassificationTrainer(config(pictures, tmp_path))
    message = "Predicted boxes or scores contain Inf/NaN."

    def fail(*args):
        monkeypatch.setattr(comm, "is_main_process", lambda: False)
        raise FloatingPointError(message)

    trainer.model.linear.register_forward_hook(fail)
    with pytest.raises(DivergedError, match=f"iteration 0: {message}"):
        trainer.train()
    assert waited == [divergence.PATIENCE]


@pytest.mark.parametrize(("iteration", "good"), [(98, True), (99, False)])
def test_the_weights_that_diverge_at_once_are_not_good(iteration, good):
    guard = DivergenceGuard(None, None)
    guard._bad = 100  # with the weights that iteration 99 has left
    assert guard._is_good({"iteration": iteration, "model": {}}) == good
    guard._bad, guard.since = 500, 100
    assert guard._is_good({"iteration": iteration, "model": {}}) == good

#!/usr/bin/env python
"""What the start of deformable kernels is worth: docs/start.md's tables.

    tools/study_start.py scratch --output output/start/scratch.jsonl --seeds 0 1 2 3 4
    tools/study_start.py fine-tuning --output output/start/fine_tuning.jsonl \\
        --config-file configs/demo/pretrained_MNV2_FPN_dk_l3.yaml \\
        --factors 1 0.1 --rates 0.0025 0.005 --opts MODEL.WEIGHTS mobilenet_v2-7ebf99e0.pth
    tools/study_start.py curvature --config-file ... --opts MODEL.WEIGHTS ...

Every finished run is a line of --output: the same command goes on after an interruption, and prints
the table of all that is in the file.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import shlex
import statistics
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from dk_detectron.analysis.ablation import outside, watch_taps
from dk_detectron.data.deformed import DigitDeformation, warp
from dk_detectron.data.shapes import CLASS_OBJECT_SIZES, OUTLINES, draw_image
from dk_detectron.engine import Trainer
from dk_detectron.evaluation.runs import execute, group_results
from dk_detectron.layers import LocalDeformKernel2d, ScopeConv2d
from dk_detectron.model_zoo import load_config
from dk_detectron.modeling.small import small_network
from dk_detectron.ops import rest_kernel, sample_kernel

# ---- starts
# ----------------------------------------------------------------------------------------


def read_in_centre(layer: ScopeConv2d) -> Tensor:
    """[K, S]: what each tap reads of each cell at the operator's zero."""
    cells = math.prod(layer.scope_size)
    units = torch.eye(cells, dtype=torch.float64).view(cells, 1, *layer.scope_size)
    return rest_kernel(units, layer.kernel_size).flatten(1).t()


@torch.no_grad()
def set_pseudo_inverse(layer: ScopeConv2d, rigid: Tensor) -> None:
    """Version 0.1's: the smallest scope whose kernel in the centre is ``rigid``."""
    layer.set_rigid_weight(rigid)
    inverse = torch.linalg.pinv(read_in_centre(layer))
    layer.weight.copy_((rigid.double().flatten(2) @ inverse.t()).view_as(layer.weight))
    nn.init.zeros_(layer.kernel_offset_generator.bias)


@torch.no_grad()
def draw_cells(layer: ScopeConv2d, rigid: Tensor) -> None:
    """Independent cells; the kernel in the centre has the variance of ``rigid``."""
    layer.set_drawn_weight(rigid)
    variance = float(read_in_centre(layer).square().sum(1).mean())
    layer.weight.normal_(0, float(rigid.std()) / math.sqrt(variance))


STARTS: dict[str, Callable[[ScopeConv2d, Tensor], None]] = {
    "centre": lambda layer, rigid: layer.set_drawn_weight(rigid),
    "spread": lambda layer, rigid: layer.set_rigid_weight(rigid),
    "independent cells": draw_cells,
    "pseudo-inverse": set_pseudo_inverse,
}


class ClampedGenerator(nn.Conv2d):
    """A generator of offsets whose clipped taps get torch.clamp's gradient: none."""

    scope_size = 4

    def forward(self, x: Tensor) -> Tensor:
        offset = super().forward(x)
        clipped = outside(offset.detach(), [self.scope_size] * 2, [3, 3])
        return torch.where(clipped, offset.detach(), offset)


LOOK = "moved", "clipped", "dead"


# ---- from scratch: small pictures of digits and shapes
# --------------------------------------------------

CHANNELS, WIDE_CHANNELS = 24, 64  # the wide rigid network has about the deformable one's parameters
PASSES, STEPS, BATCH, RATE = 30, 18, 64, 0.05
TRAIN_DIGITS = 1200
SHAPES, TRAIN_SHAPES, SHAPES_SIDE = 3600, 3000, 40


@dataclass(frozen=True)
class ScratchRun:
    """``data``: one of DATA; ``start``: one of STARTS, "rigid" or "wide"."""

    data: str
    start: str
    scope: int
    factor: float
    limit: float
    clamp: bool
    seed: int


def draw_digits(digits: Tensor, generator: torch.Generator, size: int = 32) -> Tensor:
    """[N, 1, 8, 8] -> [N, 1, size, size]: at 0.4 to 1 of it, stretched, turned by any angle."""
    n = len(digits)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape or (n,)).uniform_(low, high, generator=generator)

    scale, angle = uniform(math.log(0.4), 0).exp(), uniform(-math.pi, math.pi)
    aspect = uniform(-0.4, 0.4).exp()
    shift = uniform(-1, 1, n, 2) * (1 - scale)[:, None]
    return warp(digits, DigitDeformation(scale, angle, aspect, shift), size)


@dataclass
class Pictures:
    """Pictures [N, C, H, W] with their classes, a split, and how one is drawn for a step."""

    images: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor
    draw: Callable[[Tensor, torch.Generator], Tensor]


def load_digit_pictures() -> Pictures:
    """scikit-learn's digits, turned, scaled and stretched anew in every step."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN_DIGITS], order[TRAIN_DIGITS:]
    return Pictures(images, torch.tensor(data.target), train, test, draw_digits)


def draw_shape_pictures() -> Pictures:
    """One of the six shapes of `make demo` a picture, bent and stretched; flipped in training."""
    images = []
    for index in range(SHAPES):
        rng = np.random.default_rng([0, index])
        name = [*OUTLINES][index % len(OUTLINES)]
        image, _ = draw_image(SHAPES_SIDE, rng, [name], CLASS_OBJECT_SIZES)
        images.append(cv2.resize(image, (SHAPES_SIDE, SHAPES_SIDE), interpolation=cv2.INTER_AREA))
    pictures = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    index = torch.arange(SHAPES)
    return Pictures(
        pictures, index % len(OUTLINES), index[:TRAIN_SHAPES], index[TRAIN_SHAPES:], flip
    )


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """[N, C, H, W]: each flipped along either axis or not, by chance."""
    for axis in 2, 3:
        chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(chosen, images.flip(axis), images)
    return images


DATA: dict[str, Callable[[], Pictures]] = {
    "digits": load_digit_pictures,
    "shapes": draw_shape_pictures,
}


def depthwise(run: ScratchRun, channels: int, stride: int) -> nn.Module:
    arguments = {"stride": stride, "padding": 1, "groups": channels, "bias": False}
    if run.start in ("rigid", "wide"):
        return nn.Conv2d(channels, channels, 3, **arguments)
    layer = LocalDeformKernel2d(channels, channels, 3, scope_size=run.scope, **arguments)
    rigid = nn.init.kaiming_normal_(torch.empty(layer.rigid_shape), mode="fan_out")
    STARTS[run.start](layer, rigid)
    if run.clamp:
        layer.kernel_offset_generator.__class__ = ClampedGenerator
        layer.kernel_offset_generator.scope_size = run.scope
    return layer


def build_network(run: ScratchRun, colours: int, classes: int) -> nn.Module:
    channels = WIDE_CHANNELS if run.start == "wide" else CHANNELS
    return small_network(
        lambda index, stride: depthwise(run, channels, stride), channels, colours, classes
    )


def train_small_network(run: ScratchRun) -> dict:
    """Test error in percent after 30 passes, and where the taps are then."""
    torch.set_num_threads(1)
    data = DATA[run.data]()
    images, labels, train, test = data.images, data.labels, data.train, data.test
    torch.manual_seed(run.seed)
    model = build_network(run, images.shape[1], int(labels.max()) + 1)
    model.to(memory_format=torch.channels_last)
    generators = [m for n, m in model.named_modules() if n.endswith("offset_generator")]
    slow = {p for generator in generators for p in generator.parameters()}
    groups = [{"params": [p for p in model.parameters() if p not in slow], "lr": RATE}]
    groups += [{"params": list(slow), "lr": RATE * run.factor}] if slow else []
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True, weight_decay=4e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in groups], total_steps=PASSES * STEPS, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(PASSES):
        for batch in train[torch.randperm(len(train), generator=generator)].split(BATCH)[:STEPS]:
            loss = F.cross_entropy(model(data.draw(images[batch], generator)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if run.limit:
                for module in generators:
                    nn.utils.clip_grad_norm_(module.parameters(), run.limit)
            optimizer.step()
            schedule.step()
    generator.manual_seed(99)
    with watch_taps(model.eval()) as seen, torch.no_grad():
        right = [
            model(data.draw(images[test], generator)).argmax(1) == labels[test] for _ in range(3)
        ]
    error = 100 - 100 * float(torch.cat(right).float().mean())
    return {"error": error, **_mean_of(seen.values())}


def _mean_of(looks: Iterable[dict[str, float]]) -> dict[str, float]:
    looks = list(looks)
    return {
        key: statistics.mean(look[key] for look in looks) for key in (looks[0] if looks else ())
    }


# ---- from rigid weights: the first steps of fine-tuning a detector
# ---------------------------------

# A loss that no detector has and comes back from.
DIVERGED = 50.0


@dataclass(frozen=True)
class FineTuningRun:
    """``start``: "ours", what the network has anyway, or "pseudo-inverse", version 0.1's."""

    config: str
    opts: str
    start: str
    limit: float
    factor: float
    rate: float
    seed: int
    steps: int


def build_trainer(config: str, opts: list[str]) -> Trainer:
    cfg = load_config(config, opts)
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR:  # nothing is written later
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
    return trainer


def restart(model: nn.Module, start: str) -> None:
    """Gives every layer with a scope another start from the kernel that it has at rest."""
    for layer in model.modules():
        if isinstance(layer, ScopeConv2d) and start != "ours":
            rest = layer.kernel_offset_generator.bias.detach().double().unsqueeze(0)
            rigid = sample_kernel(layer.weight.detach().double(), rest, layer.kernel_size)[0]
            STARTS[start](layer, rigid.to(layer.weight))


def first_steps(run: FineTuningRun) -> dict:
    """The step at which the loss is infinite or beyond DIVERGED, if it is, and the last losses."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    opts = [*shlex.split(run.opts), "SOLVER.BASE_LR", run.rate, "SEED", run.seed]
    opts += ["SOLVER.OFFSET_LR_FACTOR", run.factor, "SOLVER.CLIP_OFFSET_GRADIENTS", run.limit]
    trainer = build_trainer(run.config, opts)
    model = trainer.model.train()
    restart(model, run.start)
    losses, diverged = [], None
    images = iter(trainer.data_loader)
    with EventStorage(0), watch_taps(model) as seen:
        for step in range(run.steps):
            seed_all_rng(1000 * run.seed + step)
            try:
                loss = sum(model(next(images)).values())
            except FloatingPointError:  # detectron2's own check of its boxes
                diverged = step
                break
            trainer.optimizer.zero_grad()
            loss.backward()
            trainer.optimizer.step()
            trainer.scheduler.step()
            losses.append(float(loss.detach()))
            if not losses[-1] < DIVERGED:
                diverged = step
                break
    last = statistics.mean(losses[-30:]) if diverged is None else None
    return {"diverged": diverged, "loss": last, **_mean_of(seen.values())}


# ---- curvature
# -------------------------------------------------------------------------------------


def curvature(trainer: Trainer, iterations: int = 10, batches: int = 2) -> dict[str, float]:
    """The largest curvature of the loss along each offset generator's weight, and along all.

    By power iteration, with products of the Hessian by differences of gradients. SGD with a
    momentum of m is stable below a rate of 2 * (1 + m) over the curvature.
    """
    model = trainer.model.train()
    images = iter(trainer.data_loader)
    data = [next(images) for _ in range(batches)]
    weights = {name: p for name, p in model.named_parameters() if "offset_generator.weight" in name}
    weights = {name: p for name, p in weights.items() if p.requires_grad}

    def gradients(names) -> list[Tensor]:
        total = None
        for seed, batch in enumerate(data):
            seed_all_rng(seed)
            loss = sum(model(batch).values()) / len(data)
            new = torch.autograd.grad(loss, [weights[name] for name in names])
            total = new if total is None else [a + b for a, b in zip(total, new, strict=True)]
        return total

    def moved(names, direction, distance: float) -> list[Tensor]:
        with shifted([weights[name] for name in names], direction, distance):
            return gradients(names)

    def largest(names) -> float:
        vector = gradients(names)
        for _ in range(iterations):
            norm = _norm(vector)
            vector = [v / norm for v in vector]
            plus, minus = (moved(names, vector, sign * 1e-3) for sign in (1, -1))
            vector = [(a - b) / 2e-3 for a, b in zip(plus, minus, strict=True)]
        return _norm(vector)

    with EventStorage(0):
        names = [[name] for name in weights] + [list(weights)]
        found = [largest(group) for group in tqdm(names, desc="power iteration")]
    return dict(zip([*weights, "all"], found, strict=True))


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


@contextmanager
def shifted(parameters, direction, distance: float):
    with torch.no_grad():
        for p, v in zip(parameters, direction, strict=True):
            p.add_(v, alpha=distance)
        try:
            with torch.enable_grad():
                yield
        finally:
            for p, v in zip(parameters, direction, strict=True):
                p.sub_(v, alpha=distance)


# ---- command line
# ----------------------------------------------------------------------------------


def tabulate_scratch(results: list[dict]) -> str:
    """A row for each setting, over its seeds."""
    keys = "data", "start", "scope", "factor", "limit", "clamp"
    rows = []
    for setting, group in group_results(results, keys):
        errors = [r["error"] for r in group]
        deviation = statistics.stdev(errors) if len(errors) > 1 else None
        looks = [{key: r[key] for key in LOOK} for r in group if "moved" in r]
        taps = [_mean_of(looks).get(key) for key in LOOK]
        rows.append([*setting, len(group), statistics.mean(errors), deviation, *taps])
    header = [*keys, "seeds", "error %", "±", *LOOK]
    return tabulate(rows, header, tablefmt="github", floatfmt=".3g")


def tabulate_first_steps(results: list[dict]) -> str:
    """Rows by setting, columns by rate: by seed, the last loss or the step of divergence."""
    rates = sorted({r["rate"] for r in results})
    keys = "config", "opts", "start", "limit", "factor", "steps"
    rows = []
    for setting, group in group_results(results, keys):
        cells = [
            ", ".join(
                f"{r['loss']:.2f}" if r["diverged"] is None else f"† {r['diverged']}"
                for r in sorted(group, key=lambda r: r["seed"])
                if r["rate"] == rate
            )
            for rate in rates
        ]
        rows.append([kernels(*setting[:2]), *setting[2:], *cells])
    header = ["kernels", *keys[2:], *map(str, rates)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def kernels(config: str, opts: str) -> str:
    """What a network's convolutions are, in short."""
    cfg = load_config(config, shlex.split(opts)).MODEL.DEFORM_KERNEL
    parts = [f"1x1 {cfg.CONV_1X1}"] if cfg.CONV_1X1 != "rigid" else []
    parts += ["DCN"] if any(cfg.DATA_OFFSET_ON_PER_STAGE) else []
    return ", ".join([*parts, f"3x3 {cfg.CONV_3X3}"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name) for name in ("scratch", "fine-tuning", "curvature")}
    for name in "scratch", "fine-tuning":
        add = parsers[name].add_argument
        add("--output", type=Path, required=True, metavar="FILE.jsonl")
        add("--factors", type=float, nargs="+", default=[0.1], help="SOLVER.OFFSET_LR_FACTOR")
        add("--limits", type=float, nargs="+", default=[0.1], help="CLIP_OFFSET_GRADIENTS")
        add("--seeds", type=int, nargs="+", default=[0])
        add("--workers", type=int, default=2, help="processes, of one thread each")
    add = parsers["scratch"].add_argument
    add("--data", nargs="+", default=["digits"], choices=[*DATA])
    add("--starts", nargs="+", default=["rigid", "wide", *STARTS])
    add("--scopes", type=int, nargs="+", default=[4])
    add("--clamp", action="store_true", help="clipped taps get no gradient")
    add = parsers["fine-tuning"].add_argument
    add("--starts", nargs="+", default=["ours"], choices=["ours", "pseudo-inverse"])
    add("--rates", type=float, nargs="+", default=[0.005], help="SOLVER.BASE_LR")
    add("--steps", type=int, default=200)
    parsers["curvature"].add_argument("--start", default="ours", choices=["ours", "pseudo-inverse"])
    for name in "fine-tuning", "curvature":
        parsers[name].add_argument("--config-file", required=True)
        parsers[name].add_argument(
            "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
            help="last: overrides of the configuration",
        )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.command == "scratch":
        settings = itertools.product(
            args.seeds, args.data, args.starts, args.scopes, args.factors, args.limits
        )
        runs = [ScratchRun(*setting, args.clamp, seed) for seed, *setting in settings]
        results = execute(runs, train_small_network, args.output, workers=args.workers)
        print(tabulate_scratch(results))
    elif args.command == "fine-tuning":
        settings = itertools.product(args.seeds, args.starts, args.limits, args.factors, args.rates)
        network = args.config_file, shlex.join(args.opts)
        runs = [FineTuningRun(*network, *s, seed, args.steps) for seed, *s in settings]
        results = execute(runs, first_steps, args.output, workers=args.workers)
        print(tabulate_first_steps(results))
    else:
        logging.disable(logging.CRITICAL)
        trainer = build_trainer(args.config_file, args.opts)
        restart(trainer.model, args.start)
        rows = list(curvature(trainer).items())
        print(tabulate(rows, ["generator", "largest curvature"], tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""From scratch: what the start of deformable kernels is worth, on turned and scaled digits.

    tools/study_starts.py --output output/starts.jsonl --seeds 0 1 2 3 4
    tools/study_starts.py --output output/starts.jsonl --starts rigid drawn --factors 0.1 1

Prints the table of what is finished; the same command goes on after an interruption. Needs
scikit-learn, whose 1,797 digits of 8x8 are drawn at 0.4 to 1 of a 32x32 picture, stretched, and
turned by any angle. A run takes half a minute of one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from dk_detectron.layers import LocalDeformKernel2d

CHANNELS = 24
# As many parameters as the deformable network of 24 channels has, in channels.
WIDE_CHANNELS = 64
PASSES, STEPS, BATCH, RATE = 30, 18, 64, 0.05
TRAIN = 1200


@dataclass(frozen=True)
class Run:
    """One training. ``start`` is one of :data:`STARTS`, "rigid" or "wide"."""

    start: str
    scope: int
    factor: float
    inward: bool
    seed: int
    rule: str = "plain"


def draw(digits: Tensor, generator: torch.Generator, size: int = 32) -> Tensor:
    """[N, 1, 8, 8] -> [N, 1, size, size]: scaled, stretched, turned and moved."""
    n = len(digits)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape or (n,)).uniform_(low, high, generator=generator)

    scale, angle = uniform(math.log(0.4), 0).exp(), uniform(-math.pi, math.pi)
    aspect = uniform(-0.4, 0.4).exp()
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() / scale * aspect, angle.sin() / scale
    affine[:, 1, 0], affine[:, 1, 1] = -angle.sin() / scale * aspect, angle.cos() / scale
    shift = uniform(-1, 1, n, 2) * (1 - scale)[:, None]
    affine[:, :, 2] = -(affine[:, :, :2] @ shift[:, :, None])[:, :, 0]
    grid = F.affine_grid(affine, (n, 1, size, size), align_corners=False)
    return F.grid_sample(digits, grid, align_corners=False)


def bilinear(taps: Tensor, size: int) -> Tensor:
    """[K, S]: what taps at these places read of each cell."""
    return (1 - (taps[:, None] - torch.arange(size)).abs()).clamp(min=0)


def smoothest(taps: Tensor, size: int) -> Tensor:
    """[S, K]: from values at the taps to the cells that give them with the least differences."""
    read = bilinear(taps.double(), size)
    difference = torch.eye(size, dtype=torch.float64).diff(dim=0)
    k = len(taps)
    system = torch.zeros(size + k, size + k, dtype=torch.float64)
    system[:size, :size] = difference.t() @ difference
    system[:size, size:], system[size:, :size] = read.t(), read
    return torch.linalg.inv(system)[:size, size:]


def lift(rigid: Tensor, inverse: Tensor) -> Tensor:
    return torch.einsum("ai,bj,ocij->ocab", inverse, inverse, rigid.double())


def move_taps(layer: LocalDeformKernel2d, taps: Tensor) -> None:
    """Puts the start of the taps, along each axis, into the generator's bias."""
    offset = taps - (torch.arange(3) + (layer.scope_size[0] - 3) / 2)
    both = torch.stack(torch.meshgrid(offset, offset, indexing="ij"), -1)
    layer.kernel_offset_generator.bias.copy_(both.flatten())


def centred(size: int) -> Tensor:
    return torch.arange(3) + (size - 3) / 2


def spread(size: int, edge: float = 0.0) -> Tensor:
    return torch.linspace(edge, size - 1 - edge, 3)


def start_drawn(layer, rigid, gain: float = 1.0):
    layer.weight.normal_(0, float(rigid.std()) * gain)


def start_he(layer, rigid):
    size = layer.scope_size[0]
    start_drawn(layer, rigid, 1 / float(bilinear(centred(size), size).square().sum(1).mean()))


def start_smooth(layer, rigid):
    """Drawn smooth, taps in the centre."""
    size = layer.scope_size[0]
    layer.weight.copy_(lift(rigid, smoothest(spread(size), size)))


def start_pinv(layer, rigid):
    size = layer.scope_size[0]
    layer.weight.copy_(lift(rigid, torch.linalg.pinv(bilinear(centred(size).double(), size))))


def start_spread(layer, rigid, edge: float = 0.0):
    size = layer.scope_size[0]
    layer.weight.copy_(lift(rigid, smoothest(spread(size, edge), size)))
    move_taps(layer, spread(size, edge))


def start_doubled(layer, rigid):
    size = layer.scope_size[0]
    layer.weight.copy_(lift(rigid, torch.linalg.pinv(bilinear(spread(size).double(), size))))
    move_taps(layer, spread(size))


def start_spread_drawn(layer, rigid):
    start_he(layer, rigid)
    move_taps(layer, spread(layer.scope_size[0]))


STARTS = {
    "drawn": start_drawn,
    "he": start_he,
    "smooth": start_smooth,
    "pinv": start_pinv,
    "doubled": start_doubled,
    "spread": start_spread,
    "spread .25": lambda layer, rigid: start_spread(layer, rigid, 0.25),
    "spread .5 drawn": start_he,
    "spread drawn": start_spread_drawn,
}


class Inward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, offset, low, high):
        ctx.save_for_backward(offset)
        ctx.low, ctx.high = low, high
        return offset.clamp(low, high)

    @staticmethod
    def backward(ctx, grad):
        (offset,) = ctx.saved_tensors
        outward = ((offset < ctx.low) & (grad > 0)) | ((offset > ctx.high) & (grad < 0))
        return grad.masked_fill(outward, 0), None, None


class InwardOffsets(nn.Conv2d):
    """An offset generator whose taps keep within the scope; back inside they get a gradient."""

    size = 4

    normed = False

    def forward(self, x):
        if self.normed:
            x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() / 3
        offset = super().forward(x)
        rest = centred(self.size)
        rest = torch.stack(torch.meshgrid(rest, rest, indexing="ij"), -1).flatten()[:, None, None]
        return Inward.apply(offset, -rest, self.size - 1 - rest)


@torch.no_grad()
def depthwise(run: Run, channels: int, stride: int) -> nn.Module:
    arguments = {"stride": stride, "padding": 1, "groups": channels, "bias": False}
    if run.start in ("rigid", "wide"):
        return nn.Conv2d(channels, channels, 3, **arguments)
    layer = LocalDeformKernel2d(channels, channels, 3, scope_size=run.scope, **arguments)
    rigid = nn.init.kaiming_normal_(torch.empty(channels, 1, 3, 3), mode="fan_out")
    STARTS[run.start](layer, rigid)
    if run.inward:
        layer.kernel_offset_generator.__class__ = InwardOffsets
        layer.kernel_offset_generator.size = run.scope
    layer.kernel_offset_generator.normed = run.rule == "normed"
    return layer


def network(run: Run) -> nn.Module:
    channels = WIDE_CHANNELS if run.start == "wide" else CHANNELS

    def normed(convolution: nn.Module):
        return convolution, nn.BatchNorm2d(channels), nn.ReLU()

    layers = [*normed(nn.Conv2d(1, channels, 3, 1, 1, bias=False))]
    for stride in (2, 1, 2, 1, 2):
        layers += normed(depthwise(run, channels, stride))
        layers += normed(nn.Conv2d(channels, channels, 1, bias=False))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def watch(model: nn.Module) -> dict:
    """Taps of the layers on their last input: share outside the scope, and of dead ones."""
    seen = {}

    def hook(layer, inputs, _):
        offset = F.conv2d(
            inputs[0], layer.kernel_offset_generator.weight, layer.kernel_offset_generator.bias,
            layer.stride, layer.padding,
        ).detach()  # fmt: skip
        size = layer.scope_size[0]
        rest = centred(size)
        rest = torch.stack(torch.meshgrid(rest, rest, indexing="ij"), -1).flatten()[:, None, None]
        outside = (offset + rest < 0) | (offset + rest > size - 1)
        start = layer.kernel_offset_generator.bias.detach()[:, None, None]
        seen[layer] = (
            float(outside.float().mean()),
            float(outside.flatten(2).all(2).all(0).float().mean()),
            float((offset - start).abs().mean()),
        )

    for layer in model.modules():
        if isinstance(layer, LocalDeformKernel2d):
            layer.register_forward_hook(hook)
    return seen


def train(run: Run) -> dict:
    torch.set_num_threads(1)
    data = load_digits()
    digits = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]
    torch.manual_seed(run.seed)
    model = network(run).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(run.seed)
    offsets = [p for n, p in model.named_parameters() if "offset_generator" in n]
    others = [p for n, p in model.named_parameters() if "offset_generator" not in n]
    groups = [{"params": others, "lr": RATE}, {"params": offsets, "lr": RATE * run.factor}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True, weight_decay=4e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in groups], total_steps=PASSES * STEPS, pct_start=0.1
    )
    for _ in range(PASSES):
        for batch in train[torch.randperm(TRAIN, generator=generator)].split(BATCH)[:STEPS]:
            loss = F.cross_entropy(model(draw(digits[batch], generator)), labels[batch])
            if not loss.isfinite():
                return asdict(run) | {"error": None}
            optimizer.zero_grad()
            loss.backward()
            if run.rule.startswith("clip"):
                for p in offsets:
                    nn.utils.clip_grad_norm_(p, float(run.rule[4:]))
            if run.rule.startswith("all"):
                nn.utils.clip_grad_norm_(others, float(run.rule[3:]))
            optimizer.step()
            schedule.step()
    model.eval()
    generator.manual_seed(99)
    seen = watch(model)
    with torch.no_grad():
        right = [model(draw(digits[test], generator)).argmax(1) == labels[test] for _ in range(3)]
    result = asdict(run) | {"error": 100 - 100 * float(torch.cat(right).float().mean())}
    if seen:
        clipped, dead, moved = (statistics.mean(v) for v in zip(*seen.values(), strict=True))
        result |= {"clipped": clipped, "dead": dead, "moved": moved}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--starts", nargs="+", default=["rigid", "wide", *STARTS])
    parser.add_argument("--scopes", type=int, nargs="+", default=[4])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.1])
    parser.add_argument("--inward", action="store_true")
    parser.add_argument("--rule", default="plain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    done = []
    if args.output.exists():
        done = [json.loads(line) for line in args.output.read_text().splitlines()]
    finished = {Run(**{k: d[k] for k in Run.__annotations__ if k in d}) for d in done}
    runs = [
        Run(start, scope, factor, args.inward, seed, args.rule)
        for seed, start, scope, factor in itertools.product(
            args.seeds, args.starts, args.scopes, args.factors
        )
    ]
    runs = [run for run in runs if run not in finished]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers) as pool:
        futures = [pool.submit(train, run) for run in runs]
        for future in tqdm(as_completed(futures), total=len(futures)):
            done.append(future.result())
            with open(args.output, "a") as file:
                file.write(json.dumps(future.result()) + "\n")
    rows = {}
    for result in done:
        key = (
            result["start"],
            result["scope"],
            result["factor"],
            result["inward"],
            result.get("rule", "plain"),
        )
        rows.setdefault(key, []).append(result)
    table = []
    for key, results in rows.items():
        errors = [r["error"] for r in results if r["error"] is not None]
        spread_ = statistics.stdev(errors) if len(errors) > 1 else 0
        means = [
            statistics.mean(r[k] for r in results if k in r)
            if any(k in r for r in results)
            else None
            for k in ("clipped", "dead", "moved")
        ]
        table.append(
            [*key, len(results), statistics.mean(errors) if errors else None, spread_, *means]
        )
    print(
        tabulate(
            table,
            [
                "start",
                "scope",
                "factor",
                "inward",
                "rule",
                "runs",
                "error",
                "±",
                "clipped",
                "dead",
                "moved",
            ],
            floatfmt=".2f",
        )
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env python
r"""Measures how many training images a second a configuration's data loader gives.

    tools/benchmark_data.py --config-file configs/demo/shapes_MNV2_FPN_dk_l3.yaml --workers 0 1 2
    tools/benchmark_data.py --config-file \
        configs/COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml \
        --workers 0 2 4 8 --images 500 --steps 20 MODEL.DEVICE cuda

The first table says where the time of one image goes in one process, the second what a number of
worker processes gives. With --steps the training step is timed, too, and the recommended
DATALOADER.NUM_WORKERS is what feeds it; otherwise it is where more workers no longer help. It is
for each training process: eight GPUs start eight times as many workers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from dk_detectron.engine import Trainer
from dk_detectron.engine.amp import PRECISIONS
from dk_detectron.model_zoo import load_config, merge_options

# Fed means this much faster than the model, since the time of an image varies.
MARGIN = 1.2
# More workers must bring at least this much.
GAIN = 1.1


@contextmanager
def stopwatch(owner: object, name: str) -> Iterator[list[float]]:
    """Yields a list of the seconds of every call of ``owner.name`` in this process."""
    seconds = []
    function = getattr(owner, name)

    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    with mock.patch.object(owner, name, timed):
        yield seconds


def load_images(cfg: CfgNode, workers: int, count: int) -> tuple[int, float]:
    """Takes at least ``count`` images: how many they were, and in how many seconds.

    What the workers load in advance while they start is left out.
    """
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = workers
    batches = iter(Trainer.build_train_loader(cfg))
    ahead = 2 * workers + 1  # the DataLoader's prefetch_factor is 2
    while ahead > 0:
        ahead -= len(next(batches))
    images, start = 0, time.perf_counter()
    while images < count:
        images += len(next(batches))
    return images, time.perf_counter() - start


def stages(cfg: CfgNode, count: int) -> dict[str, float]:
    """Milliseconds of one image, by stage, without workers."""
    with (
        stopwatch(detection_utils, "read_image") as reads,
        stopwatch(DatasetMapper, "__call__") as maps,
    ):
        images, total = load_images(cfg, 0, count)
    read, mapped = sum(reads) / len(reads), sum(maps) / len(maps)
    seconds = {
        "decode": read,
        "augment": mapped - read,
        "collate": max(0.0, total / images - mapped),
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def step_rate(cfg: CfgNode, steps: int) -> float:
    """Images a second that training consumes, on one batch over and over; the first step warms up.

    Random weights: only the speed is of interest.
    """
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0
    batch = next(iter(Trainer.build_train_loader(cfg)))
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    amp = {"dtype": PRECISIONS[cfg.SOLVER.AMP.PRECISION], "enabled": cfg.SOLVER.AMP.ENABLED}
    with EventStorage():
        for step in range(steps + 1):
            if step == 1:
                start = time.perf_counter()
            with torch.autocast(cfg.MODEL.DEVICE, **amp):
                losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            sum(losses.values()).item()  # waits for the GPU
    return steps * len(batch) / (time.perf_counter() - start)


def recommend(rates: dict[int, float], need: float | None) -> int:
    """The fewest workers that feed ``need`` images a second, else those that still bring more.

    Without workers, training stands still while images load: only if nothing else was measured.
    """
    ordered = sorted(filter(None, rates)) or [0]
    if need is not None:
        for workers in ordered:
            if rates[workers] >= MARGIN * need:
                return workers
    best = ordered[0]
    for workers in ordered:
        if rates[workers] >= GAIN * rates[best]:
            best = workers
    return best


def advice(rates: dict[int, float], need: float | None, costs: dict[str, float]) -> str:
    workers = recommend(rates, need)
    text = f"DATALOADER.NUM_WORKERS {workers}"
    if need is not None and rates[workers] < MARGIN * need:
        slowest = max(costs, key=costs.get)
        text += (
            f", but the model waits for data: it takes {need:.1f} images/s and gets "
            f"{rates[workers]:.1f}. Most of the time is in: {slowest}. More CPU cores, or smaller "
            "image files, help"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--images", type=int, default=200, help="to load for each figure")
    parser.add_argument("--steps", type=int, default=0, help="of training to time (default: none)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="of the config")
    args = parser.parse_args()
    if min(args.workers) < 0 or args.images < 1 or args.steps < 0:
        parser.error("--workers, --steps: expected no negative number; --images: at least 1")
    cfg = load_config(args.config_file)
    merge_options(cfg, args.opts)  # after load_config has chosen the CPU
    Trainer.check_datasets(cfg, cfg.DATASETS.TRAIN)
    cfg = Trainer.auto_scale_workers(cfg, 1)  # the batch of one process

    costs = stages(cfg, args.images)
    total = sum(costs.values())
    shares = [[name, value, 100 * value / total] for name, value in costs.items()]
    header = ["stage of one image", "ms", "share, %"]
    print(tabulate(shares, header, tablefmt="github", floatfmt=("", ".2f", ".0f")), end="\n\n")

    rates = {}
    for workers in sorted(set(args.workers)):
        images, seconds = load_images(cfg, workers, args.images)
        rates[workers] = images / seconds
    need = step_rate(cfg, args.steps) if args.steps else None
    rows = [[n, rate, *([rate / need] if need else [])] for n, rate in rates.items()]
    header = ["workers", "images/s", *(["/ training"] if need else [])]
    print(tabulate(rows, header, tablefmt="github", floatfmt=("", ".1f", ".2f")), end="\n\n")
    if need:
        print(f"Training takes {need:.1f} images/s.")
    print(f"Recommended: {advice(rates, need, costs)}")


if __name__ == "__main__":
    main()

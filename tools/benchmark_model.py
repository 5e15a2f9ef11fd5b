#!/usr/bin/env python
"""Times a training step and inference of the detectors of Tables 3 and 4.

    tools/benchmark_model.py --family MNV2 --size 320 416 --json models.json
    tools/benchmark_model.py --device cuda --dtype bfloat16 --batch 2 --size 800 1216

Weights and images are random, so the figures are of speed alone; what is kept equal is the work of
the heads. The networks of a family take turns in one process, and are compared with the rigid one.
"torchvision" is the paper's DCN with torchvision.ops.deform_conv2d in place of our operator.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn
from torchvision.ops import deform_conv2d
from tqdm import tqdm

from dk_detectron.layers import DeformConv2d
from dk_detectron.model_zoo import CONFIGS, load_config, paper_rows
from dk_detectron.modeling import to_channels_last

FAMILIES = "R_50_DW", "MNV2"
PASSES = "training step", "inference"
OBJECTS = 8


class TorchvisionDeformConv2d(DeformConv2d):
    """The same layer over torchvision's operator."""

    def _convolve(self, x, seen):
        offset = self.data_offset_generator(seen)
        sizes = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return deform_conv2d(x, offset, self.weight, self.bias, **sizes)


def use_torchvision(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is DeformConv2d:
            module.__class__ = TorchvisionDeformConv2d
    return model


def networks(family: str) -> dict[str, str]:
    """Name of each network -> its configuration; the rigid one first."""
    names = {}
    for row in paper_rows(3, 4):
        stem = row["config"].rsplit("/", 1)[-1].removesuffix("_1x.yaml")
        prefix = f"faster_rcnn_{family}_FPN"
        if stem.startswith(prefix):
            names[stem.removeprefix(prefix).lstrip("_") or "rigid"] = row["config"]
    return {"rigid": names.pop("rigid"), **names}


def build(config: str, device: str, channels_last: bool = True) -> nn.Module:
    torch.manual_seed(0)
    cfg = load_config(CONFIGS / config, ["MODEL.WEIGHTS", ""])
    cfg.MODEL.DEVICE = device
    # Untrained, the number of proposals would depend on chance.
    cfg.MODEL.RPN.NMS_THRESH = 1.0
    model = build_model(cfg)
    return to_channels_last(model) if channels_last else model


def draw_batch(count: int, size: list[int]) -> list[dict]:
    """Images of noise with a few boxes, as detectron2's mapper would give them."""
    height, width = size
    batch = []
    for _ in range(count):
        corner = torch.rand(OBJECTS, 2) * torch.tensor([width / 2, height / 2])
        extent = (0.1 + 0.4 * torch.rand(OBJECTS, 2)) * torch.tensor([width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances.gt_classes = torch.randint(80, (OBJECTS,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def passes(model: nn.Module, batch: list[dict], device: str, dtype: torch.dtype) -> list[Callable]:
    """The training step, without the optimizer's, and inference."""
    autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)

    def train() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        with autocast, EventStorage():
            losses = model(batch)
        sum(losses.values()).backward()

    def infer() -> None:
        model.eval()
        with torch.no_grad(), autocast:
            model(batch)

    return [train, infer]


def seconds(call: Callable, device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(family: str, args: argparse.Namespace) -> list[dict]:
    """A row per network: milliseconds, and times those of the rigid network."""
    dtype = getattr(torch, args.dtype)
    batch = draw_batch(args.batch, args.size)
    chosen = {k: v for k, v in networks(family).items() if not args.only or k in args.only}
    calls = {}
    for name, config in {"rigid": networks(family)["rigid"], **chosen}.items():
        model = build(config, args.device)
        calls[name] = passes(model, batch, args.device, dtype)
        if args.contiguous:
            other = build(config, args.device, channels_last=False)
            calls[f"{name}, contiguous"] = passes(other, batch, args.device, dtype)
        if name == "dcn" and dtype != torch.bfloat16:  # for which torchvision has no kernel
            other = use_torchvision(build(config, args.device))
            calls["dcn, torchvision"] = passes(other, batch, args.device, dtype)
    times = {(name, i): [] for name in calls for i in range(len(PASSES))}
    for round_ in tqdm(range(args.rounds + 1), desc=family):
        for name, i in times:
            elapsed = seconds(calls[name][i], args.device)
            if round_ > 0:  # the first warms up
                times[name, i].append(elapsed)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return [
        {
            "family": family,
            "network": name,
            "pass": what,
            "milliseconds": medians[name, i] * 1e3,
            "range": [min(times[name, i]) * 1e3, max(times[name, i]) * 1e3],
            "over_rigid": medians[name, i] / medians["rigid", i],
        }
        for name in calls
        for i, what in enumerate(PASSES)
    ]


def print_table(rows: list[dict]) -> None:
    table = {}
    for row in rows:
        line = table.setdefault((row["family"], row["network"]), [row["family"], row["network"]])
        line += [row["milliseconds"], "{:.0f}-{:.0f}".format(*row["range"]), row["over_rigid"]]
    header = ["", ""] + [f"{what}{of}" for what in PASSES for of in (", ms", ", range", " / rigid")]
    formats = "", "", ".0f", "", ".2f", ".0f", "", ".2f"
    print(tabulate(list(table.values()), header, tablefmt="github", floatfmt=formats))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, help="default: both")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="such as dk_l3 dcn_dk_l3")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="on a CPU")
    parser.add_argument("--batch", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--size", type=int, nargs=2, default=[320, 416], metavar=("H", "W"))
    parser.add_argument("--contiguous", action="store_true", help="also without channels_last")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is available")
    families = [args.family] if args.family else FAMILIES
    known = {name for family in families for name in networks(family)}
    if unknown := set(args.only or ()) - known:
        parser.error(f"--only: expected some of {', '.join(sorted(known))}, got {sorted(unknown)}")
    torch.set_num_threads(args.threads)
    rows = [row for family in families for row in measure(family, args)]
    print_table(rows)
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"arguments": vars(args), "torch": torch.__version__, "rows": rows}, f)


if __name__ == "__main__":
    main()

"""The networks that a command looks at, of run directories or one configuration; its files."""

from __future__ import annotations

import argparse
import csv
import io
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from matplotlib.figure import Figure
from torch import nn

from ..data.cache import state_of
from ..engine.record import get_own_config
from ..model_zoo import merge_options
from ..weights import Checkpointer, replacing, write_text

CONFIG, WEIGHTS = "config.yaml", "model_final.pth"


@dataclass
class Network:
    """A network to look at.

    Attributes:
        name: what tells it from the others.
    """

    name: str
    cfg: CfgNode
    model: nn.Module

    @property
    def stem(self) -> str:
        """What its files are called by."""
        return _stem(self.name)

    @property
    def settings(self) -> dict:
        """What its results depend on; weights that are drawn at random are never the same."""
        weights, network = self.cfg.MODEL.WEIGHTS, self.cfg.MODEL.clone()
        network.WEIGHTS = network.DEVICE = ""
        return {
            "weights": weights,
            "state": state_of([weights]) if weights else secrets.token_hex(),
            "size": [self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST],
            "format": self.cfg.INPUT.FORMAT,
            "network": network.dump(),  # options make another of the same weights
        }


def _stem(name: str) -> str:
    return name.replace("/", "_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which networks."""
    parser.add_argument(
        "runs", nargs="*", metavar="RUN",
        help=f"folders that training has left, with {CONFIG} and {WEIGHTS}",
    )  # fmt: skip
    parser.add_argument(
        "--config-file",
        help="instead of runs, one network: a YAML file; then KEY VALUE pairs, such as "
        "MODEL.WEIGHTS FILE, take the place of RUN",
    )


def load_networks(args: argparse.Namespace) -> list[Network]:
    """The networks of the command line.

    Raises:
        ValueError, OSError: one of them is not there, or cannot be loaded.
    """
    if args.config_file:
        return [_load(Path(args.config_file).stem, args.config_file, args.runs)]
    if not args.runs:
        raise ValueError("RUN: expected folders of finished runs, or --config-file, got neither")
    folders = [Path(run) for run in args.runs]
    names = distinct_names(folders)
    if len({*map(_stem, names)}) < len({*names}):
        raise ValueError(
            f"RUN: expected folders whose names differ by more than / and _, got "
            f"{', '.join(names)}, whose files would be the same: rename one"
        )
    for folder in folders:
        for file in CONFIG, WEIGHTS:
            if not (folder / file).is_file():
                raise FileNotFoundError(
                    f"{folder}: expected a finished run, with {CONFIG} and {WEIGHTS}, got none "
                    f"with {file}; other weights are for --config-file ... MODEL.WEIGHTS FILE"
                )
    return [
        _load(name, folder / CONFIG, ["MODEL.WEIGHTS", str(folder / WEIGHTS)])
        for name, folder in zip(names, folders, strict=True)
    ]


def _load(name: str, config_file: str | Path, opts: Sequence[str]) -> Network:
    cfg = get_own_config(config_file)
    merge_options(cfg, opts)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(cfg)
    checkpointer = Checkpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    report = checkpointer.report
    if not cfg.MODEL.WEIGHTS or (report and report.initialised):
        what = "some weights are" if cfg.MODEL.WEIGHTS else "without MODEL.WEIGHTS, weights are"
        print(f"{name}: {what} not trained, but drawn at random", file=sys.stderr)
    return Network(name, cfg, model.eval())


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Of folders such as .../rigid/seed_0 and .../local/seed_0, what differs: rigid and local."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) == 1:
        return [part[-1] for part in parts]
    for end, rest in (0, slice(1, None)), (-1, slice(-1)):
        while min(map(len, parts)) > 1 and len({part[end] for part in parts}) == 1:
            parts = [part[rest] for part in parts]
    return ["/".join(part) for part in parts]


@contextmanager
def named(network: Network) -> Iterator[None]:
    """Within it, errors tell which network they are about."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        kind = NotImplementedError if isinstance(error, NotImplementedError) else ValueError
        raise kind(f"{network.name}: {error}") from error


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, whole or not at all, and says where."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    print(path)


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a CSV file of all keys of its rows, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, {key: None for row in rows for key in row})
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())

"""The configurations of this project, by name: from a clone as from an installed package."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from .config import add_dk_config

PACKAGE = Path(__file__).resolve().parent
# A wheel has them in the package, a clone beside it.
CONFIGS = next(
    (folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()),
    PACKAGE / "configs",
)


def get_config_file(config_path: str | Path) -> str:
    """The path of a configuration: a file as it is, else one of this project by its name.

    Args:
        config_path: such as "COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml".

    Raises:
        FileNotFoundError: it is neither.
    """
    for path in Path(config_path), CONFIGS / str(config_path).removeprefix("configs/"):
        if path.is_file():
            return str(path)
    names = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob(f"*/{Path(config_path).name}"))
    hint = f"did you mean {' or '.join(names)}?" if names else f"they are in {CONFIGS}"
    raise FileNotFoundError(
        "--config-file: expected a YAML file, or the name of a configuration of dk_detectron, got "
        f"{str(config_path)!r}; {hint}"
    )


def load_config(config_path: str | Path, opts: Sequence = ()) -> CfgNode:
    """detectron2's defaults with this project's keys, the file's and ``opts``, on the CPU.

    Args:
        config_path: as of :func:`get_config_file`.
        opts: KEY, VALUE, ...

    Raises:
        FileNotFoundError: there is no such file or name.
    """
    cfg = get_config(config_path)
    cfg.merge_from_list(list(opts))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def get_config(config_path: str | Path, trained: bool = False) -> CfgNode:
    """As ``detectron2.model_zoo.get_config``.

    Raises:
        FileNotFoundError: there is no such file or name.
        ValueError: the file is no plain YAML; or ``trained``, as no weights have been published.
    """
    if trained:
        raise ValueError(
            f"trained: expected False, as no weights of {config_path} have been published: train "
            "it by dk-train, and load its model_final.pth by MODEL.WEIGHTS"
        )
    cfg = get_cfg()
    add_dk_config(cfg)
    path = get_config_file(config_path)
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path}: expected plain YAML, which runs no code when it is read, got: {error}"
        ) from error
    return cfg


def get(config_path: str | Path, trained: bool = False, device: str | None = None) -> nn.Module:
    """As ``detectron2.model_zoo.get``: the network of a configuration, its weights drawn anew.

    Args:
        device: in place of MODEL.DEVICE.

    Raises:
        FileNotFoundError, ValueError: as :func:`get_config`.
    """
    cfg = get_config(config_path, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def paper_rows(*tables: int) -> list[dict[str, str]]:
    """Rows of the paper's Tables 1-4 (``configs/paper_tables.csv``), with the config of each."""
    with open(CONFIGS / "paper_tables.csv", newline="") as f:
        return [row for row in csv.DictReader(f) if int(row["table"]) in tables]

"""The configurations of this project, by name: from a clone as from an installed package."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from fvcore.common.config import BASE_KEY
from torch import nn

from .config import add_dk_config
from .data.faults import shortened

PACKAGE = Path(__file__).resolve().parent
# A wheel has them in the package, a clone beside it.
CONFIGS = next(
    (folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()),
    PACKAGE / "configs",
)
MOST_VALUES = 100_000


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
    wanted = Path(config_path).name
    names = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("*/*") if p.name == wanted)
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
        FileNotFoundError, ValueError: as :func:`get_config` and :func:`merge_options`.
    """
    cfg = get_config(config_path)
    merge_options(cfg, opts)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def merge_options(cfg: CfgNode, opts: Sequence) -> None:
    """``cfg.merge_from_list``, whose errors say what to do.

    Args:
        opts: KEY, VALUE, ...

    Raises:
        ValueError: a key is unknown, a value of the wrong type, or there is no value.
    """
    with _explained(cfg, "options KEY VALUE ..."):
        cfg.merge_from_list(list(opts))


def get_config(config_path: str | Path, trained: bool = False) -> CfgNode:
    """As ``detectron2.model_zoo.get_config``.

    Raises:
        FileNotFoundError: there is no such file or name, or not the one that it builds on.
        ValueError: the file is no plain YAML, or has other keys, or values of other types, than a
            configuration; or ``trained``, as no weights have been published.
    """
    if trained:
        raise ValueError(
            f"trained: expected False, as no weights of {config_path} have been published: train "
            "it by dk-train, and load its model_final.pth by MODEL.WEIGHTS"
        )
    cfg = get_cfg()
    add_dk_config(cfg)
    path = get_config_file(config_path)
    if path.endswith(".py"):
        raise ValueError(
            f"{path}: expected YAML, got Python, as of a LazyConfig: train it by detectron2's "
            "tools/lazyconfig_train_net.py, or take one of the YAML files"
        )
    with _explained(cfg, path):
        _check_size(CfgNode.load_yaml_with_base(path))
        cfg.merge_from_file(path, allow_unsafe=False)
    return cfg


@contextmanager
def _explained(cfg: CfgNode, source: str) -> Iterator[None]:
    """What is wrong with a source of keys and values, as an error that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source}: expected the file that its {BASE_KEY} names, got {error.filename}: no such "
            "file"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"{source}: expected plain YAML, which runs no code when it is read, got: {error}"
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{source}: expected values of few levels, got a {BASE_KEY} that leads back to its own "
            "file, or a value inside itself"
        ) from error
    # Whatever YAML, yacs and detectron2 raise here, in many ways, is about the source.
    except Exception as error:
        reason = shortened(error.args[0] if len(error.args) == 1 else error)
        if not isinstance(error, AssertionError | KeyError | ValueError):
            reason = f"what cannot be merged ({type(error).__name__}: {reason})"
        raise ValueError(
            f"{source}: expected keys and values of detectron2's and dk_detectron's configuration, "
            f"got: {reason}{_near(cfg, reason)}"
        ) from error


def _near(cfg: CfgNode, reason: str) -> str:
    """A key that may have been meant, if yacs does not know one."""
    unknown = re.search(r"Non-existent (?:config )?key: (\S+)", reason)
    near = difflib.get_close_matches(unknown[1], _keys(cfg), 1) if unknown else []
    return f"; did you mean {near[0]}?" if near else ""


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def _check_size(loaded: object) -> None:
    """Raises on more values than a configuration has: an alias of YAML can stand for billions."""
    waiting, count = [loaded], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, or a value inside itself")
        if isinstance(value, dict | list | set | tuple):
            waiting += value.values() if isinstance(value, dict) else value


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

"""What a run leaves in its OUTPUT_DIR, so that it can be repeated, resumed and used.

training.yaml    the configuration as training was started: what --resume compares with
config.yaml      the same for use: MODEL.WEIGHTS is the last checkpoint
classes.json     the categories in the order of the network's outputs, COCO's "id" and "name" of
                 each; every checkpoint has them too, under "classes"
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from torch import nn

from ..model_zoo import get_config
from ..weights import LAST_CHECKPOINT, Checkpointer, CheckpointError, write_text

# Below detectron2's, whose handlers write to the terminal and to log.txt.
LOGGER = logging.getLogger("detectron2.dk_detectron.engine.record")

TRAINING_FILE, CONFIG_FILE, CLASSES_FILE = "training.yaml", "config.yaml", "classes.json"
# The last checkpoint of a run that is finished.
FINAL = "model_final.pth"


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that a run would resume from, if there is one."""
    tag = Path(folder, LAST_CHECKPOINT)
    name = tag.read_text().strip() if tag.is_file() else ""
    return Path(folder, name) if name else None


def run_config(folder: str | Path) -> CfgNode:
    """A run's configuration, for use.

    Raises:
        FileNotFoundError: the folder is no run's.
    """
    path = Path(folder, CONFIG_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"RUN_DIR: expected the OUTPUT_DIR of a training, got {str(folder)!r}, which has no "
            f"{CONFIG_FILE}"
        )
    return get_config(path)


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of a run's metrics.json; none if there is no file.

    Those that an interruption or a full disk has torn are left out.
    """
    path, found = Path(folder, "metrics.json"), []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [entry for entry in found if "iteration" in entry]


def run_of(config_file: str | Path) -> Path | None:
    """The folder of the run whose config.yaml a file is."""
    path = Path(config_file)
    is_run = path.name == CONFIG_FILE and (path.parent / TRAINING_FILE).is_file()
    return path.parent if is_run else None


def get_own_config(config_file: str | Path, *, resume: bool = False) -> CfgNode:
    """:func:`get_config`, but a run's config.yaml is about the folder that it is in.

    It names the one that it was written in, where after a copy another run may be.

    Args:
        resume: so is the training.yaml of a run that there is to resume.

    Raises:
        FileNotFoundError, ValueError: as :func:`get_config`.
    """
    cfg = get_config(config_file)
    folder = run_of(config_file)
    if resume and Path(config_file).name == TRAINING_FILE:
        folder = Path(config_file).parent if last_checkpoint(Path(config_file).parent) else None
    if folder and folder.resolve() != Path(cfg.OUTPUT_DIR).resolve():
        LOGGER.warning(
            "%s: the run was moved or copied from %s: OUTPUT_DIR and MODEL.WEIGHTS are in %s",
            config_file,
            cfg.OUTPUT_DIR,
            folder,
        )
        cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(folder), str(_weights(folder))
    return cfg


def keep_training(folder: str | Path) -> None:
    """Writes training.yaml of a run of version 0.1, whose config.yaml is the only record of it."""
    training, config = Path(folder, TRAINING_FILE), Path(folder, CONFIG_FILE)
    if last_checkpoint(folder) and config.is_file() and not training.is_file():
        write_text(training, config.read_text())


def record_training(cfg: CfgNode, *, resumes: bool) -> None:
    """Writes training.yaml; a run that resumes keeps the weights that it had started from."""
    path = Path(cfg.OUTPUT_DIR, TRAINING_FILE)
    content = yaml.safe_load(cfg.dump())
    if resumes and path.is_file():
        content["MODEL"]["WEIGHTS"] = yaml.safe_load(path.read_text())["MODEL"]["WEIGHTS"]
    write_text(path, yaml.safe_dump(content))


def refresh_config(folder: str | Path) -> None:
    """Has config.yaml name the run's own weights.

    So nothing is predicted, in silence, with the weights that training started from. A folder that
    no training was started in is left alone.
    """
    training = Path(folder, TRAINING_FILE)
    if training.is_file():
        content = yaml.safe_load(training.read_text())
        content["MODEL"]["WEIGHTS"] = os.path.abspath(_weights(folder))
        write_text(Path(folder, CONFIG_FILE), yaml.safe_dump(content))


def _weights(folder: str | Path) -> Path:
    """The last checkpoint; until there is one, the final one that is to come."""
    return last_checkpoint(folder) or Path(folder, FINAL)


def compare_classes(source: str, saved: Sequence[dict] | None, names: Sequence[str]) -> None:
    """Warns if the classes of a checkpoint have other names than those of the data.

    Args:
        saved: what the checkpoint has under "classes"; nothing if it knows none.
        names: of the data, in their order.

    Raises:
        CheckpointError: a class of the same name has another place, so that all outputs would be
            taken for those of other classes.
    """
    learnt = [c["name"] for c in saved or () if isinstance(c, dict)]  # another project's have none
    pairs = list(zip(learnt, names, strict=False))
    differing = [(k, old, new) for k, (old, new) in enumerate(pairs) if old != new]
    for k, old, new in differing:
        if old in names:
            raise CheckpointError(
                f"{source}: expected the classes of the data in their order, in which class {k} is "
                f"{new!r}, got weights that were trained with {old!r} in its place: give the data "
                "the order of that training (of COCO's categories by id, of class folders by name)"
            )
    if differing:
        k, old, new = differing[0]
        LOGGER.warning(
            "%s: %d of %d classes had other names in training: class %d, which is %r in the data, "
            "was %r",
            source, len(differing), len(pairs), k, new, old,
        )  # fmt: skip


class RunCheckpointer(Checkpointer):
    """Keeps what else a run leaves in step with its checkpoints."""

    def __init__(self, model: nn.Module, save_dir: str, classes: list[dict], **checkpointables):
        """
        Args:
            classes: "id" and "name" of each, in the order of the network's outputs.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.classes = classes

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        checkpoint = super().load(path, checkpointables)
        if self._resuming:
            names = [kind["name"] for kind in self.classes]
            compare_classes(path, checkpoint.get("classes"), names)
        return checkpoint

    def save(self, name: str, **kwargs) -> None:
        super().save(name, classes=self.classes, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        super().tag_last_checkpoint(last_filename_basename)
        write_text(Path(self.save_dir, CLASSES_FILE), json.dumps(self.classes, indent=2))
        refresh_config(self.save_dir)

    def rewind(self, is_good: Callable[[dict], bool]) -> str | None:
        good = super().rewind(is_good)
        refresh_config(self.save_dir)
        return good

"""What a trained detector finds, in three lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Instances

from ..config import is_classifier
from ..data.entries import THINNEST
from ..data.inputs import read_picture
from ..data.pictures import check_format
from ..model_zoo import merge_options
from ..weights import Checkpointer
from .checks import check_weights
from .detection import Trainer
from .record import CLASSES_FILE, TRAINING_FILE, last_checkpoint, run_config

LOGGER = logging.getLogger("detectron2.dk_detectron.engine.prediction")

Picture = str | Path | np.ndarray
T = TypeVar("T")


class Predictor:
    """The detector that a run has trained::

        from dk_detectron import Predictor

        predictor = Predictor("output/mnv2_dk_l3")
        instances = predictor("street.jpg")

    It does what detectron2's ``DefaultPredictor`` does with the run's config.yaml, and finds the
    same (on a CPU to the bit) if pictures come one by one: in a batch, smaller ones are padded. As
    there, MODEL.BACKBONE.COMPILE and MODEL.CHANNELS_LAST are off, unless ``opts`` has them.

    Attributes:
        cfg: the configuration.
        weights: the checkpoint that is used.
        model: the network, in evaluation mode.
        classes: "id" (in the training data) and "name" of each, in the order of ``pred_classes``.
        metadata: of these classes, for detectron2's ``Visualizer``.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        weights: str | Path | None = None,
        device: str | None = None,
        threshold: float | None = None,
        batch_size: int = 1,
        opts: Sequence = (),
    ):
        """
        Args:
            run_dir: the OUTPUT_DIR of a training, finished or not, or of an evaluation.
            weights: a checkpoint, or its name in ``run_dir``, such as "model_final_ema.pth", in the
                place of the run's last, and of MODEL.WEIGHTS in ``opts``.
            device: such as "cpu", "cuda" or "cuda:1"; by default that of the training if it is
                there, else the CPU.
            threshold: the least score, 0 to 1; by default that of the configuration.
            batch_size: how many pictures of a list go through the network at once.
            opts: KEY, VALUE, ... over the run's configuration.

        Raises:
            FileNotFoundError, ValueError: the folder is no run's, has no checkpoint yet, or an
                argument cannot be.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        self.batch_size = batch_size
        self.cfg = cfg = _config(Path(run_dir), device, threshold, opts)
        if weights is None and "MODEL.WEIGHTS" in opts[::2]:
            weights = cfg.MODEL.WEIGHTS
        cfg.MODEL.WEIGHTS = str(_find_weights(Path(run_dir), cfg, weights))
        check_weights(cfg, needed=True, resume=False)
        self.weights = cfg.MODEL.WEIGHTS
        self.model = Trainer.build_model(cfg).eval()
        checkpointer = Checkpointer(self.model)
        checkpoint = checkpointer.load(self.weights)
        assert checkpointer.report
        checkpointer.report.check_complete()
        self.classes = _classes(checkpoint.get("classes"), Path(run_dir), cfg)
        self.metadata = Metadata(thing_classes=[c["name"] for c in self.classes])
        self._resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        cfg.freeze()
        LOGGER.info("Predicting with %s", self.weights)

    @overload
    def __call__(self, pictures: Picture) -> Instances: ...

    @overload
    def __call__(self, pictures: Sequence[Picture]) -> list[Instances]: ...

    def __call__(self, pictures):
        """
        Args:
            pictures: a file, or a uint8 array [H, W, 3] with **blue first** (BGR), as of
                ``cv2.imread`` and for ``DefaultPredictor``; or a list of them.

        Returns:
            ``Instances`` on the CPU, or a list of them, with ``pred_boxes`` in pixels of the
            picture, ``scores`` and ``pred_classes``; with masks, ``pred_masks`` too.

        Raises:
            ValueError: a file cannot be read, or an array is no picture.
        """
        if isinstance(pictures, (str, Path, np.ndarray)):
            return self.predict([self.prepare(pictures)])[0]
        return [
            instances
            for batch in batches(map(self.prepare, pictures), self.batch_size)
            for instances in self.predict(batch)
        ]

    def prepare(self, picture: Picture) -> dict:
        """What the network takes for a picture.

        Raises:
            ValueError: as of a call.
        """
        if not isinstance(picture, np.ndarray):
            picture = read_picture(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                "expected a picture as uint8 [H, W, 3], blue first, got "
                f"{picture.dtype} {list(picture.shape)}"
            )
        height, width = picture.shape[:2]
        if min(height, width) < 1 or max(height, width) > THINNEST * min(height, width):
            raise ValueError(
                f"expected a picture with sides of at least 1, and at most {THINNEST} : 1, got "
                f"{width} x {height}"
            )
        if self.cfg.INPUT.FORMAT == "RGB":
            picture = picture[:, :, ::-1]
        image = self._resize.get_transform(picture).apply_image(picture)
        image = np.ascontiguousarray(image.astype("float32").transpose(2, 0, 1))
        return {"image": torch.from_numpy(image), "height": height, "width": width}

    @torch.no_grad()
    def predict(self, inputs: list[dict]) -> list[Instances]:
        """The network's answers to what :meth:`prepare` gave, in one batch, on the CPU."""
        return [output["instances"].to("cpu") for output in self.model(inputs)]


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size``, the last of what is left."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def check_detects(cfg: CfgNode, run: Path) -> None:
    """Raises ``ValueError`` if a run is a classifier's."""
    if is_classifier(cfg):
        raise ValueError(f"RUN_DIR: expected the run of a detector, {run} is a classifier's")


def _config(run: Path, device: str | None, threshold: float | None, opts: Sequence) -> CfgNode:
    cfg = run_config(run)
    # Switches of speed: the one takes longer than most predictions, the other rounds differently.
    cfg.MODEL.BACKBONE.COMPILE = cfg.MODEL.CHANNELS_LAST = False
    merge_options(cfg, opts)
    check_detects(cfg, run)
    check_format(cfg.INPUT.FORMAT)
    if threshold is not None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a score from 0 to 1, got {threshold}")
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
    if device is not None:
        cfg.MODEL.DEVICE = device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device: expected one that this torch has, such as cpu, got {device!r}: "
                + str(error).partition("\n")[0]
            ) from None
    elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        LOGGER.warning("MODEL.DEVICE: no GPU is available, using the CPU")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _find_weights(run: Path, cfg: CfgNode, weights: str | Path | None) -> str | Path:
    """Those named, by path or in the run's folder; else its last; else what was evaluated in it."""
    if weights is not None:
        return weights if Path(weights).is_file() or "://" in str(weights) else run / weights
    if last := last_checkpoint(run):
        return last
    if (run / TRAINING_FILE).is_file():
        raise FileNotFoundError(
            f"RUN_DIR: expected a checkpoint in {run}, where training has saved none yet: wait for "
            "the first (SOLVER.CHECKPOINT_PERIOD), or name one"
        )
    return cfg.MODEL.WEIGHTS


def _classes(saved: list[dict] | None, run: Path, cfg: CfgNode) -> list[dict]:
    """Of the checkpoint, else of the run; numbers in the place of names that neither has."""
    file = run / CLASSES_FILE
    classes = saved or (json.loads(file.read_text()) if file.is_file() else [])
    head = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    beyond = max((c["id"] for c in classes), default=-1) + 1 - len(classes)
    unnamed = range(len(classes), cfg.MODEL[head].NUM_CLASSES)
    return [*classes, *({"id": beyond + i, "name": str(i)} for i in unnamed)]

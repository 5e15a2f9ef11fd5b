"""What predictions become: drawn pictures and videos, COCO's results, a table, and crops."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer

from ..data.inputs import Inputs, Video, distinct_names, is_webcam, read_pictures
from ..data.writing import write_coco
from ..weights import replacing
from .drawing import give_colours, write_picture
from .prediction import Predictor, batches

LOGGER = logging.getLogger("detectron2.dk_detectron.engine.outputs")

RESULTS_FILE, IMAGES_FILE, TABLE_FILE = (
    "coco_instances_results.json",
    "image_info.json",
    "predictions.csv",
)
COLUMNS = "file", "frame", "class", "score", "x1", "y1", "x2", "y2"
DRAWN_AS = ".jpg", ".jpeg", ".png"


@dataclass
class Summary:
    """What has been predicted.

    Attributes:
        images: pictures and frames that the network has seen.
        objects: what it found in them.
        faults: what could not be read, and why.
    """

    images: int = 0
    objects: int = 0
    faults: list[str] = field(default_factory=list)


class Outputs:
    """A folder that predictions are written into, one by one.

    ====================================  =====================================================
    pictures, videos                      drawn, each under a name that no other has
    coco_instances_results.json           COCO's results, with the training data's categories
    image_info.json                       the images that they are of; pycocotools reads both by
                                          ``COCO(image_info).loadRes(results)``
    predictions.csv                       the results as a table, with corners in pixels
    crops/CLASS                           what is in the boxes, if it is asked for
    ====================================  =====================================================

    A picture is there whole or not at all; results, table and videos are there when all is done.
    """

    def __init__(self, folder: Path, predictor: Predictor, *, crops: bool = False):
        """
        Raises:
            FileExistsError: the folder has something in it.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"--output: expected a folder that is new or empty, got {folder}, which is not: "
                "give another, or remove it"
            )
        self.folder = folder
        self.classes = predictor.classes
        # matplotlib reads what is between two dollars as a formula.
        names = [kind["name"].replace("$", r"\$") for kind in self.classes]
        self.metadata = give_colours(Metadata(thing_classes=names))
        self.crops = crops
        self.summary = Summary()
        self._images: list[dict] = []

    def __enter__(self) -> Outputs:
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._results = stack.enter_context(_written(self.folder / RESULTS_FILE))
            self._results.write("[")
            self._table = csv.writer(stack.enter_context(_written(self.folder / TABLE_FILE)))
            self._table.writerow(COLUMNS)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            self._results.write("]\n")
            with replacing(self.folder / IMAGES_FILE) as temporary:
                write_coco(Path(temporary), self._images, self.classes, None)
        self._stack.__exit__(kind, *error)

    def note(self, fault: str) -> None:
        """Names and counts what could not be read."""
        self.summary.faults.append(fault)
        LOGGER.warning("%s", fault)

    def add_picture(self, path: str, name: str, picture: np.ndarray, instances: Instances) -> None:
        """
        Args:
            name: of what is written, without a suffix.
            picture: uint8 [H, W, 3], BGR.
        """
        # With boxes alone, a colour for each class; masks in such colours would hide the objects.
        mode = ColorMode.IMAGE if instances.has("pred_masks") else ColorMode.SEGMENTATION
        visualizer = Visualizer(picture[:, :, ::-1], self.metadata, instance_mode=mode)
        drawn = visualizer.draw_instance_predictions(instances, jittering=False).get_image()
        suffix = Path(path).suffix.lower()
        suffix = suffix if suffix in DRAWN_AS else ".png"
        write_picture(self.folder / f"{name}{suffix}", drawn[:, :, ::-1])
        self._add(path, None, name, picture, instances)

    @contextmanager
    def video(
        self, source: str, name: str, frames_per_second: float
    ) -> Iterator[Callable[[np.ndarray, Instances], None]]:
        """Yields what adds a frame, uint8 [H, W, 3], BGR; the drawn video is there at the end."""
        visualizer = VideoVisualizer(self.metadata)
        writer, count = None, 0

        def add(frame: np.ndarray, instances: Instances) -> None:
            nonlocal writer, count
            drawn = visualizer.draw_instance_predictions(frame[:, :, ::-1], instances).get_image()
            if writer is None:
                writer = _open_video(path, frames_per_second, drawn.shape)
            writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
            self._add(source, count, f"{name}/{count:06}", frame, instances)
            count += 1

        with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as folder:
            path = os.path.join(folder, f"{name}.mp4")
            try:
                yield add
            finally:
                if writer is not None:
                    writer.release()
            if count:
                os.replace(path, self.folder / f"{name}.mp4")

    def _add(
        self, path: str, frame: int | None, name: str, picture: np.ndarray, instances: Instances
    ) -> None:
        identifier, (height, width) = len(self._images) + 1, picture.shape[:2]
        file_name = path if frame is None else f"{path}#{frame}"
        size = {"width": width, "height": height}
        self._images.append({"id": identifier, "file_name": file_name, **size})
        corners = instances.pred_boxes.tensor.tolist()
        for k, result in enumerate(instances_to_coco_json(instances, identifier)):
            kind = self.classes[result["category_id"]]
            result["category_id"] = kind["id"]
            self._results.write(",\n" if self.summary.objects else "\n")
            json.dump(result, self._results)
            score, box = f"{result['score']:.6f}", [f"{x:.2f}" for x in corners[k]]
            self._table.writerow([path, "" if frame is None else frame, kind["name"], score, *box])
            if self.crops:
                self._crop(picture, corners[k], kind["name"], f"{name}_{k}")
            self.summary.objects += 1
        self.summary.images += 1

    def _crop(self, picture: np.ndarray, corners: list[float], kind: str, name: str) -> None:
        height, width = picture.shape[:2]
        left, top = min(int(corners[0]), width - 1), min(int(corners[1]), height - 1)
        right, bottom = max(ceil(corners[2]), left + 1), max(ceil(corners[3]), top + 1)
        folder = self.folder / "crops" / (re.sub(r"[^\w .-]", "_", kind).strip(". ") or "_")
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_picture(path, picture[top:bottom, left:right])


@contextmanager
def _written(path: Path) -> Iterator[IO[str]]:
    """A file of text that appears at the end."""
    with (
        replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        yield file


def _open_video(path: str, frames_per_second: float, shape: Sequence[int]) -> cv2.VideoWriter:
    codec = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(path, codec, frames_per_second, (shape[1], shape[0]))
    if not writer.isOpened():
        raise OSError(f"{path}: expected an OpenCV that writes MPEG-4, this one cannot")
    return writer


def predict_into(
    folder: Path,
    predictor: Predictor,
    inputs: Inputs,
    *,
    crops: bool = False,
    progress: Callable[..., Iterable] = lambda items, **_: items,
) -> Summary:
    """Predicts on all that was found, and writes what comes out (see :class:`Outputs`).

    What cannot be read is named, counted and left out. A webcam goes on until Ctrl-C.

    Args:
        progress: shows it, called as `tqdm` is.

    Raises:
        FileExistsError: the folder has something in it.
    """
    videos = [f"webcam_{source}" if is_webcam(source) else source for source in inputs.videos]
    names = distinct_names([*inputs.pictures, *videos])
    with Outputs(folder, predictor, crops=crops) as outputs:
        for fault in inputs.faults:
            outputs.note(fault)
        if inputs.pictures:
            _predict_pictures(inputs.pictures, names, predictor, outputs, progress)
        for source, name in zip(inputs.videos, names[len(inputs.pictures) :], strict=True):
            _predict_video(source, name, predictor, outputs, progress)
    return outputs.summary


def _predict_pictures(
    paths: list[str], names: list[str], predictor: Predictor, outputs: Outputs, progress: Callable
) -> None:
    def prepared() -> Iterator[tuple]:
        read = progress(read_pictures(paths), total=len(paths), unit="image", desc="pictures")
        for picture, path, name in zip(read, paths, names, strict=False):  # names are of videos too
            if isinstance(picture, str):
                outputs.note(picture)
                continue
            try:
                yield path, name, picture, predictor.prepare(picture)
            except ValueError as error:
                outputs.note(f"{path}: {error}")

    for batch in batches(prepared(), predictor.batch_size):
        found = predictor.predict([inputs for *_, inputs in batch])
        for (path, name, picture, _), instances in zip(batch, found, strict=True):
            outputs.add_picture(path, name, picture, instances)


def _predict_video(
    source: str, name: str, predictor: Predictor, outputs: Outputs, progress: Callable
) -> None:
    try:
        video = Video(source)
    except ValueError as error:
        outputs.note(str(error))
        return
    frames = progress(video, total=video.announced or None, unit="frame", desc=name)
    with outputs.video(source, name, video.frames_per_second) as add, _interruptible(video):
        for batch in batches(frames, predictor.batch_size):
            for frame, instances in zip(batch, predictor(batch), strict=True):
                add(frame, instances)
    if video.fault:
        outputs.note(video.fault)


@contextmanager
def _interruptible(video: Video) -> Iterator[None]:
    """Ctrl-C ends a webcam between two frames, and all else at once."""
    if not video.is_live:
        yield
        return
    before = signal.signal(signal.SIGINT, video.stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

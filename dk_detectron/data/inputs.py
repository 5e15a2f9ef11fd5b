"""What to predict on: pictures, folders of them, videos, webcams; and names for what comes out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from .pictures import divert_warnings, picture_fault, reading_fault

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
# Of a webcam that does not say.
FRAMES_PER_SECOND = 25.0
# A name may have 255 bytes on most disks, of which what is appended needs some.
LONGEST = 200


@dataclass
class Inputs:
    """What was found.

    Attributes:
        pictures: files.
        videos: files, and numbers of webcams.
        others: files in the folders that are no pictures by their names.
        faults: folders that cannot be read.
    """

    pictures: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def find_inputs(names: Sequence[str], leave_out: Path) -> Inputs:
    """Sorts out what pictures, folders, videos and webcams are meant; each is taken once.

    Args:
        names: folders are searched with all below them, links too, but for what is hidden
            (``.name``).
        leave_out: a folder that is not searched, such as that of the output.

    Raises:
        ValueError: there is nothing to predict on.
    """
    found = Inputs()
    for name in names:
        if os.path.isdir(name):
            _search(name, leave_out.resolve(), found)
        elif name.lower().endswith(VIDEO_EXTENSIONS) or is_webcam(name):
            found.videos.append(name)
        else:
            found.pictures.append(name)
    once: dict[str, str] = {}
    for path in found.pictures:
        once.setdefault(os.path.realpath(path), path)
    found.pictures = list(once.values())
    found.videos = list(dict.fromkeys(found.videos))
    there = filter(os.path.exists, (*found.pictures, *found.videos))
    if not any(there) and not any(map(is_webcam, found.videos)):
        others = f" but {len(found.others)} other files" if found.others else ""
        raise ValueError(
            f"INPUT: expected pictures ({', '.join(IMG_EXTENSIONS)}) in {', '.join(names)}, got "
            f"none{others}; name files of other kinds, and videos, themselves"
        )
    return found


def is_webcam(name: str) -> bool:
    """Whether it is a number, and no file of that name."""
    return name.isdecimal() and not os.path.exists(name)


def _search(root: str, leave_out: Path, found: Inputs) -> None:
    searched = {leave_out, Path(root).resolve()}  # a link may lead back
    walk = os.walk(root, onerror=lambda e: found.faults.append(str(e)), followlinks=True)
    for folder, folders, files in walk:
        below = {Path(folder, name).resolve(): name for name in folders if name[0] != "."}
        folders[:] = sorted(name for real, name in below.items() if real not in searched)
        searched |= below.keys()
        for name in sorted(files):
            if not name.startswith("."):  # "._name" is what macOS leaves on other disks
                kind = found.pictures if name.lower().endswith(IMG_EXTENSIONS) else found.others
                kind.append(os.path.join(folder, name))


def distinct_names(paths: Sequence[str]) -> list[str]:
    """A name for what comes of each file, without a suffix, such that none replaces another.

    The file's own name; where two are equal, with the folders below the common one; then with the
    suffix too; else all are numbered. Upper and lower case are no difference, as on some disks.
    """
    if not paths:
        return []
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    relative = [PurePath(os.path.relpath(path, root)) for path in absolute]
    names = [path.stem for path in relative]
    with_folders = ["_".join(path.with_suffix("").parts) for path in relative]
    suffixes = [path.suffix.replace(".", "_") for path in relative]
    with_suffixes = [name + suffix for name, suffix in zip(with_folders, suffixes, strict=True)]
    for longer in with_folders, with_suffixes:
        count = Counter(map(str.casefold, names))
        names = [
            other if count[name.casefold()] > 1 else name
            for name, other in zip(names, longer, strict=True)
        ]
    is_short = max(len(os.fsencode(name)) for name in names) <= LONGEST
    if is_short and len({*map(str.casefold, names)}) == len(names):
        return names
    digits = len(str(len(paths)))
    return [f"{i:0{digits}}_{path.stem[:40]}" for i, path in enumerate(relative)]


def read_picture(path: str | Path) -> np.ndarray:
    """A picture as training reads it, turned as its EXIF says: uint8 [H, W, 3], BGR.

    Damage inside a JPEG is found in workers alone (see :func:`read_pictures`).

    Raises:
        ValueError: it cannot be read, or would be read as something else; the file is named.
    """
    fault = picture_fault(str(path), None, decode=True)
    try:
        if fault is None:
            return np.ascontiguousarray(read_image(str(path), "BGR"))
    # Pillow reports a broken file in many ways.
    except Exception as error:
        fault = reading_fault(error)
    raise ValueError(f"{path}: {fault}")


class PictureFiles(Dataset):
    """Of each file the picture, or else what is wrong with it."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            return read_picture(self.paths[index])
        except ValueError as error:
            return str(error)


def read_pictures(paths: Sequence[str]) -> Iterator[np.ndarray | str]:
    """In order, by workers that read ahead: each picture, or what is wrong with it."""
    return iter(
        DataLoader(
            PictureFiles(paths),
            batch_size=None,
            num_workers=min(4, len(os.sched_getaffinity(0)), len(paths)),
            worker_init_fn=divert_warnings,
            collate_fn=_as_it_is,
        )
    )


def _as_it_is(sample):
    return sample


class Video:
    """The frames of a video or webcam, uint8 [H, W, 3], BGR.

    Attributes:
        announced: how many frames there should be; 0 if it is not known.
        count: how many have been read.
    """

    def __init__(self, source: str):
        """
        Args:
            source: a file, or the number of a webcam.

        Raises:
            ValueError: it cannot be opened.
        """
        self.is_live = is_webcam(source)
        self.source = source
        self.capture = cv2.VideoCapture(int(source) if self.is_live else source)
        if not self.capture.isOpened():
            kind = "webcam" if self.is_live else "video"
            raise ValueError(f"{source}: {kind} that cannot be opened")
        self.frames_per_second = self.capture.get(cv2.CAP_PROP_FPS) or FRAMES_PER_SECOND
        self.announced = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.count = 0
        self.stopped = False

    def stop(self, *_) -> None:
        """Lets the frame before be the last one; also a handler of signals."""
        self.stopped = True

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            while not self.stopped:
                there_is, frame = self.capture.read()
                if not there_is:
                    break
                self.count += 1
                yield frame
        finally:
            self.capture.release()

    @property
    def fault(self) -> str | None:
        """What was wrong with it, if it broke off. Announced numbers are estimates."""
        if self.count < 0.95 * self.announced or not self.count:
            return f"{self.source}: video of which {self.count} of {self.announced} frames are read"
        return None

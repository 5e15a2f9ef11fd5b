"""Picture files: there, whole, and read as what they are; and if not, what is there instead."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import DataLoader, Dataset

from .cache import cache_file, read, state_of, write
from .faults import Findings

BATCH = 32
# So many are decoded before every training of new data: ten seconds on two cores.
FEW = 2000
JPEGS = "JPEG", "MPO"  # as Pillow calls those of phones that have a second picture in them
END = b"\xff\xd9"  # of a JPEG
# What libjpeg says of JPEGs that it decodes to the right pixels.
HARMLESS = (
    b"Invalid SOS parameters for sequential JPEG",
    b"Warning: unknown JFIF revision number",
    b"Unknown Adobe color transform code",
)


class Folder:
    """A folder of pictures, searched for what a wrong name may mean."""

    def __init__(self, root: str):
        self.root = root

    @cached_property
    def _names(self) -> dict[str, str]:
        found = {}
        for folder, _, files in os.walk(self.root):
            for file in files:
                name = os.path.relpath(os.path.join(folder, file), self.root)
                found[_alike(name)] = name
        return found

    def near(self, name: str) -> str | None:
        """The file that differs by case, Unicode form, slashes or leading folders, if there is."""
        parts = PurePosixPath(_alike(name)).parts
        alike = (self._names.get("/".join(parts[start:])) for start in range(len(parts)))
        return next(filter(None, alike), None)


def _alike(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


class PictureFaults(Dataset):
    """What is wrong with each picture, None or the kind of fault; and the hash of its content.

    It is loaded by worker processes, whose standard error is a file that decoders write to.
    """

    def __init__(self, pictures: list[tuple[str, int, int]], root: str, *, decode: bool):
        """
        Args:
            pictures: file name, width and height.
            decode: decode every picture, also where nothing is odd about its head and its end;
                without it there are no hashes.
        """
        self.pictures = pictures
        self.root = root
        self.decode = decode

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[str | None, str | None]:
        name, *size = self.pictures[index]
        path = os.path.join(self.root, name)
        fault = picture_fault(path, (size[0], size[1]), self.decode)
        return fault, content_hash(path) if self.decode and fault is None else None


def content_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def divert_warnings(worker: int) -> None:
    """Has a worker's standard error be a file, as `picture_fault` needs it."""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
    cv2.setNumThreads(0)


@dataclass
class Looks:
    """What was found in pictures.

    Attributes:
        lines: each kind of fault, how often, and a few examples.
        faulty: the file names of all that have one.
        hashes: of the content of each sound picture, by name, if all were read.
    """

    lines: list[str]
    faulty: list[str]
    hashes: dict[str, str] = field(default_factory=dict)


def look_at_pictures(
    pictures: list[tuple[str, int, int]], root: str, progress: Callable | None = None
) -> Looks:
    """The faults that training would meet; what is sound is remembered until a file changes.

    The rest is looked at again: a right to read, or another Pillow, cures without such a change.
    Few pictures are decoded, of many only head and end are read: `dk-check-dataset` decodes all.
    """
    sizes = json.dumps(pictures)
    state = state_of([os.path.join(root, name) for name, _, _ in pictures] + [sizes])
    kept = cache_file("pictures", state)
    decode = len(pictures) <= FEW
    if (before := read(kept)) is not None:
        faulty = set(before)
        pictures = [picture for picture in pictures if picture[0] in faulty]
        if not pictures:
            return Looks([], [])
    looks = check_pictures(pictures, root, decode=decode, progress=progress)
    looks.hashes = {}
    write(kept, looks.faulty)
    return looks


def check_pictures(
    pictures: list[tuple[str, int, int]],
    root: str,
    *,
    decode: bool,
    progress: Callable | None = None,
) -> Looks:
    """The faults of all pictures, with names that are near to those of missing ones."""
    faults, folder, faulty, hashes = Findings(), Folder(root), [], {}
    found = DataLoader(
        PictureFaults(pictures, root, decode=decode),
        batch_size=BATCH,
        num_workers=max(1, len(os.sched_getaffinity(0))),
        worker_init_fn=divert_warnings,
        collate_fn=list,
    )
    results = (result for batch in found for result in batch)
    if progress:
        results = progress(results, total=len(pictures))
    for (name, _, _), (kind, content) in zip(pictures, results, strict=True):
        if content:
            hashes[name] = content
        if kind:
            faulty.append(name)
        if kind == MISSING and (near := folder.near(name)):
            faults.add("missing image, of a name that is nearly there", f"{name}: there is {near}")
        elif kind:
            faults.add(kind, name)
    return Looks(faults.lines(), faulty, hashes)


MISSING = "missing image"
UNREADABLE = "unreadable image"
UNKNOWN = "unreadable image, of no format that Pillow knows"
TOO_LARGE = "image of more pixels than Pillow decodes: cut it into tiles"
TOO_DEEP = "image of 16 bits or of floats, which would be read as white; convert it to 8 bits"
DRAWN = "image that a program would draw (EPS): convert it to PNG"
TWICE = "TIFF with an orientation, which Pillow and then detectron2 would apply: store it upright"
DAMAGED = "image that is damaged inside, of which part decodes to something else"
UNFINISHED = "image that is not whole: zeros to its end"


def picture_fault(path: str, size: tuple[int, int] | None, decode: bool) -> str | None:
    """What is wrong with a picture that should have this width and height, if anything is.

    Without a size, any is right.

    Standard error must be a file of this process (see `divert_warnings`).
    """
    try:
        content = Path(path).read_bytes() if decode else None
        with Image.open(path) as image:
            if fault := _format_fault(image):
                return fault
            kind, found = image.format, image.size
            turned = _orientation(image) in (5, 6, 7, 8)
            is_jpeg = kind in JPEGS
            if not is_jpeg and (decode or kind != "PNG"):
                image.load()
        if kind == "PNG":
            with Image.open(path) as image:
                image.verify()  # the sums of its parts, without decoding
        if is_jpeg and (fault := _jpeg_fault(path, content)):
            return fault
    # Pillow reports a broken file in many ways.
    except Exception as error:
        return reading_fault(error)
    if size is None or found[:: -1 if turned else 1] == size:  # detectron2 turns it
        return None
    if found == size:
        return "image that its EXIF turns, where the JSON has the size before; boxes may be turned"
    return "image of another size than the JSON says"


def reading_fault(error: Exception) -> str:
    """The kind of fault that an error in reading a picture tells of."""
    if isinstance(error, FileNotFoundError):
        return MISSING
    if isinstance(error, Image.DecompressionBombError):
        return TOO_LARGE
    if isinstance(error, UnidentifiedImageError):
        return UNKNOWN
    if isinstance(error, OSError) and error.strerror:  # of the system, not of Pillow
        return f"{UNREADABLE} ({error.strerror})"
    return UNREADABLE


def _format_fault(image: Image.Image) -> str | None:
    """Why a picture that has been opened must not be read, if so."""
    if image.format == "EPS":
        return DRAWN
    if image.format == "TIFF" and _orientation(image) in range(2, 9):
        return TWICE
    return TOO_DEEP if image.mode.startswith("I") or image.mode == "F" else None


def _orientation(image: Image.Image) -> int | None:
    """What EXIF says, by which detectron2 turns pictures; it ignores EXIF that is broken."""
    try:
        exif = image.getexif()
    except Exception:
        return None
    return exif.get(ExifTags.Base.Orientation)


def check_format(order: str) -> None:
    """Raises ``ValueError`` if ``INPUT.FORMAT`` names no order of channels, red or blue first."""
    if order not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT: expected RGB or BGR, got {order!r}")


class UnreadableError(ValueError):
    """A picture that cannot be read; the message begins with its file."""


def read_picture(path: str) -> Image.Image:
    """A picture in RGB, turned as its EXIF says: what detectors see of it.

    Raises:
        UnreadableError: it cannot be read, or not without loss.
    """
    try:
        with Image.open(path) as image:
            fault = _format_fault(image)
        if not fault:
            return Image.fromarray(read_image(path, "RGB"))
    # As above.
    except Exception as error:
        fault = f"what cannot be read: {error}"
    raise UnreadableError(f"{path}: expected a picture, got {fault}")


def _jpeg_fault(path: str, content: bytes | None) -> str | None:
    """What is wrong inside a JPEG, of an MPO inside its first picture, the one that is used.

    Without the content, it is read if the file ends otherwise than a picture does.
    """
    if content is None:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 4096))
            if file.read().rstrip(b"\0").endswith(END):
                return None
        content = Path(path).read_bytes()
    zeros = len(content) - len(content.rstrip(b"\0"))
    with JpegImageFile(path) as image:
        # What a camera appends, such as a film, may end in zeros, but the picture ends before it.
        if zeros > 64 and content.find(END, image.fp.tell()) < 0:
            return UNFINISHED
        image.draft("L", (1, 1))  # an eighth of the size: all is read, little computed
        image.load()
    return DAMAGED if _warns(content) else None


def _warns(jpeg: bytes) -> bool:
    """Whether libjpeg tells of damage; OpenCV lets it, on standard error."""
    before = os.fstat(2).st_size
    cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
    if os.fstat(2).st_size <= before:
        return False
    with open("/dev/stderr", "rb") as said:
        said.seek(before)
        return not all(line.startswith(HARMLESS) for line in said)

"""Annotations and pictures of strangers: read as everybody reads them, or refused by name."""

import contextlib
import gzip
import io
import json
import os
import struct
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import (
    annotations_to_instances,
    read_image,
    transform_instance_annotations,
)
from detectron2.data.transforms import TransformList
from fuzzing import READERS, attempt, cases, damaged, spoilt
from hypothesis import event
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dk_detectron.data import coco
from dk_detectron.data.pictures import picture_fault, read_picture

PIXELS = 10**6  # of a mask that is decoded here


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@contextlib.contextmanager
def file_of(content: bytes, name: str):
    """In a folder of its own, as a file of the same name, size and time would not be read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        yield str(path)


# ---- annotations ---------------------------------------------------------------------------------

CONTENT = {
    "images": [
        {"id": 5, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 9, "file_name": "b.jpg", "width": 30, "height": 30},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 90, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 5, "category_id": 1, "bbox": [1, 2, 30.5, 20], "area": 600.0,
         "iscrowd": 0, "segmentation": [[1, 2, 31, 2, 31, 22], [3, 3, 9, 3, 9, 9, 3, 9]]},
        {"id": 2, "image_id": 5, "category_id": 90, "bbox": [0, 0, 40, 30], "area": 1200,
         "iscrowd": 1, "segmentation": {"size": [30, 40], "counts": [0, 1200]}},
        {"id": 7, "image_id": 9, "category_id": 90, "bbox": [3, 4, 5, 6], "area": 30, "iscrowd": 0,
         "segmentation": {"size": [30, 30], "counts": "n26h00000000`d0"}, "keypoints": [3, 4, 2]},
    ],
}  # fmt: skip
WRITTEN = {
    "utf-8": lambda text: text.encode("utf-8", "surrogatepass"),
    "utf-8-sig": lambda text: text.encode("utf-8-sig", "surrogatepass"),
    "utf-16": lambda text: text.encode("utf-16", "surrogatepass"),
    "gzip": lambda text: gzip.compress(text.encode("utf-8", "surrogatepass"), 1),
}


@st.composite
def annotation_files(draw) -> bytes:
    text = json.dumps(draw(spoilt(CONTENT)), ensure_ascii=draw(st.booleans()))
    raw = WRITTEN[draw(st.sampled_from(["utf-8"] * 5 + list(WRITTEN)))](text)
    return draw(damaged(raw, most=draw(st.sampled_from([0, 0, 0, 2]))))


@cases(READERS, 0.35, raw=annotation_files())
def test_annotations(raw):
    with file_of(raw, "found.json") as path, contextlib.redirect_stdout(io.StringIO()):
        found = attempt(coco.survey, path, names=path)
        if isinstance(found, Exception):
            return
        event(f"{len(found.faults) > 0} faults, {len(found.repairs) > 0} repairs")
        for line in (*found.faults, *found.repairs, *found.notes):
            assert line.encode() and len(line) < 2000
        if not found.faults:
            check_what_others_read(found)
        with file_of(raw, "again.json") as other:
            again = asdict(coco.survey(other))
        expected = asdict(found) | ({"path": other} if found.path == path else {})
        assert again == json.loads(json.dumps(expected))  # whose tuples are lists


def check_what_others_read(found: coco.Survey) -> None:
    content = COCO(found.path)
    if found.has_annotations:
        check_annotations(content)
        check_evaluation(content)
    name = "fuzz"
    try:
        records = load_coco_json(found.path, "", name)
        assert MetadataCatalog.get(name).thing_classes == found.classes
    finally:
        MetadataCatalog.remove(name)
    assert name not in DatasetCatalog.list()
    assert sorted((r["file_name"], r["width"], r["height"]) for r in records) == sorted(
        map(tuple, found.images)
    )
    for record in records:
        size = record["height"], record["width"]
        if size[0] * size[1] < PIXELS:
            check_record(record, size, found)


def check_annotations(content: COCO) -> None:
    annotations = content.dataset["annotations"]
    identifiers = [annotation["id"] for annotation in annotations]
    assert len(set(identifiers)) == len(identifiers) and min(identifiers, default=1) > 0
    for annotation in annotations:
        assert annotation["category_id"] in content.cats and annotation["iscrowd"] in (0, 1)
        image = content.imgs[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert np.isfinite([x, y, width, height, annotation["area"]]).all()
        assert 0 <= width and 0 <= height and annotation["area"] >= 0
        assert -width <= x <= image["width"] and -height <= y <= image["height"]
        if annotation.get("segmentation") and image["width"] * image["height"] < PIXELS:
            mask = content.annToMask(annotation)
            assert mask.shape == (image["height"], image["width"]) and mask.max(initial=0) <= 1


def check_evaluation(content: COCO) -> None:
    """Every object that counts is found if it is said to be where it is."""
    results = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for a in content.dataset["annotations"]
    ]
    if results:
        evaluation = COCOeval(content, content.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        for found in filter(None, evaluation.evalImgs):
            counts = ~found["gtIgnore"].astype(bool) & [
                content.anns[i]["bbox"][2] * content.anns[i]["bbox"][3] > 0 for i in found["gtIds"]
            ]
            assert (found["gtMatches"][:, counts] > 0).all()


def check_record(record: dict, size: tuple[int, int], found: coco.Survey) -> None:
    annotations = [a for a in record["annotations"] if not a["iscrowd"]]
    for key in "segmentation", "keypoints":  # detectron2 wants one of every object, or of none
        if not all(a.get(key) for a in annotations):
            annotations = [{k: v for k, v in a.items() if k != key} for a in annotations]
    annotations = [
        transform_instance_annotations(annotation, TransformList([]), size)
        for annotation in annotations
    ]
    mask_format = "bitmask" if found.run_lengths else "polygon"
    instances = annotations_to_instances(annotations, size, mask_format)
    boxes = instances.gt_boxes.tensor
    assert boxes.isfinite().all() and (boxes >= 0).all()
    assert (boxes[:, 0::2] <= size[1]).all() and (boxes[:, 1::2] <= size[0]).all()
    assert ((0 <= instances.gt_classes) & (instances.gt_classes < len(found.classes))).all()


# ---- pictures ------------------------------------------------------------------------------------


def encoded(kind: str, mode: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture = (
        picture.convert("L").convert(mode) if mode in ("I", "I;16", "F") else picture.convert(mode)
    )
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6
PICTURES = [
    encoded("JPEG", "RGB"), encoded("JPEG", "L"), encoded("JPEG", "CMYK"),
    encoded("JPEG", "RGB", progressive=True), encoded("JPEG", "RGB", exif=TURNED),
    encoded("PNG", "RGB"), encoded("PNG", "P"), encoded("PNG", "LA"), encoded("PNG", "1"),
    encoded("PNG", "I;16"), encoded("PNG", "RGBA", exif=TURNED),
    encoded("GIF", "P"), encoded("BMP", "RGB"), encoded("PPM", "RGB"), encoded("EPS", "RGB"),
    encoded("TIFF", "RGB"), encoded("TIFF", "F"), encoded("TIFF", "I;16"), encoded("TIFF", "LAB"),
    encoded("TIFF", "L", compression="tiff_lzw"), encoded("TIFF", "CMYK", compression="packbits"),
    encoded("WEBP", "RGB"), encoded("WEBP", "RGBA", lossless=True), encoded("ICO", "RGB"),
    encoded("MPO", "RGB"), encoded("TGA", "RGB"), encoded("PCX", "P"), encoded("DDS", "RGBA"),
    b"<html>not found</html>", b"",
]  # fmt: skip
SIDES = st.sampled_from([0, 1, 23, 25, 37, 255, 1000, 30_000, 65_535, 2**31 - 1, 2**32 - 1])


@st.composite
def picture_files(draw) -> bytes:
    raw = draw(st.sampled_from(PICTURES))
    if draw(st.booleans()):
        return draw(damaged(raw))
    raw = bytearray(raw)
    if raw[1:4] == b"PNG":  # of other sides, under the right checksum
        struct.pack_into(">II", raw, 16, draw(SIDES), draw(SIDES))
        struct.pack_into(">I", raw, 29, zlib.crc32(raw[12:29]))
    elif (at := max(raw.find(b"\xff\xc0"), raw.find(b"\xff\xc2"))) > 0:
        struct.pack_into(">HH", raw, at + 5, draw(SIDES) % 2**16, draw(SIDES) % 2**16)
    return bytes(raw)


def claimed_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
            return image.size[:: -1 if turned else 1]
    except Exception:
        return 36, 24


@contextlib.contextmanager
def decoders_diverted():
    """Standard error is a file, as in the processes that check pictures."""
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is odd
@cases(READERS, 0.2, raw=picture_files())
def test_pictures(raw):
    with file_of(raw, "picture.jpg") as path, decoders_diverted():
        size = claimed_size(path)
        picture = attempt(read_picture, path, names=path)
        fault = picture_fault(path, size, decode=True)
        event(f"{fault}")
        picture_fault(path, size, decode=False)
        if fault is None:
            pixels = read_image(path, "BGR")[:, :, ::-1]
            assert pixels.dtype == np.uint8 and pixels.shape == (*size[::-1], 3)
            assert (np.asarray(picture) == pixels).all()
        elif not isinstance(picture, Exception):
            assert picture.mode == "RGB"

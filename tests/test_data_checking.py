"""tools/check_dataset.py on data sets that are whole, and on every kind of damage."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from pycocotools import mask as mask_util
from running import run_tool

from dk_detectron.commands import check_dataset as command
from dk_detectron.data import checking, coco, entries, pictures
from dk_detectron.data.checking import Release, check_dataset, class_conflict, gate, shared_images
from dk_detectron.data.datasets import adopt, repaired

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 40, 30


def write_dataset(root: Path, split: str = "val", suffix: str = "jpg") -> Path:
    """Three images with an object each, in the folders of the shapes."""
    (root / "shapes" / split).mkdir(parents=True)
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for i in 1, 2, 3:
        name = f"{i:06d}.{suffix}"
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "shapes" / split / name)
        images.append({"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT})
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 30.5, 20], "area": 600.0,
             "iscrowd": 0}
        )  # fmt: skip
    categories = [{"id": 1, "name": "square"}]
    path = root / "shapes" / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is remembered from other tests."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tmp_path):
    """Name, JSON file and image folder of a sound data set."""
    json_file = write_dataset(tmp_path)
    folder = tmp_path / "shapes" / "val"
    register_coco_instances("sound", {}, str(json_file), str(folder))
    yield "sound", json_file, folder
    DatasetCatalog.remove("sound")
    MetadataCatalog.remove("sound")


def edit(json_file: Path, change) -> None:
    content = json.loads(json_file.read_text())
    change(content)
    json_file.write_text(json.dumps(content))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_sound_one(tmp_path, suffix):
    json_file = write_dataset(tmp_path, suffix=suffix)
    register_coco_instances("sound", {}, str(json_file), str(tmp_path / "shapes" / "val"))
    try:
        report = check_dataset("sound")
    finally:
        DatasetCatalog.remove("sound")
        MetadataCatalog.remove("sound")
    assert (report.images, report.annotations, report.categories) == (3, 3, 1)
    assert report.problems == [] and report.notes == []


def test_a_test_set_has_no_annotations(dataset):
    edit(dataset[1], lambda content: content.pop("annotations"))
    report = check_dataset("sound")
    assert report.problems == [] and report.annotations == 0


def first(key):
    """Changes the first entry of a list of the JSON."""
    return lambda **values: lambda content: content[key][0].update(values)


image, annotation, category = first("images"), first("annotations"), first("categories")


def boxes(*values):
    return lambda content: [
        annotation.update(bbox=box)
        for annotation, box in zip(content["annotations"], values, strict=True)
    ]


def every(**values):
    return lambda content: [entry.update(values) for entry in content["annotations"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (image(width="wide"), "image without a proper width: 1 "),
        (image(id=2), "image whose id is taken: 1 .*2"),
        (category(name=None), "category without a proper name: 1"),
        (annotation(category_id=7), "annotation of an unknown category: 1 .*id 1"),
        (annotation(bbox=[1, 2, 3]), "bbox is not four finite numbers: 1 .*id 1"),
        (annotation(bbox=[1, 2, 3, float("nan")]), "bbox is not four finite numbers: 1"),
        (annotation(bbox=[1, 2, -3, 4]), "bbox of negative size: 1"),
        (annotation(bbox=[50, 2, 3, 4]), "bbox outside its image: 1"),
        (lambda c: c["annotations"].append("cat"), "annotation without a proper id, image_id"),
        (annotation(iscrowd=2), "iscrowd is neither 0 nor 1: 1 .*id 1"),
        (annotation(segmentation={"counts": [5]}), "more or fewer pixels than its image: 1 .*id 1"),
        (annotation(segmentation={"counts": [1200], "size": [40, 30]}), "not .height, width"),
        (annotation(segmentation=[["a"] * 6]), "something else than numbers: 1"),
        (annotation(segmentation=[[float("nan")] * 6]), "not finite: 1"),
        (image(width=1334, height=1), "beyond 1333 : 1: 1 .*1334x1"),
        (every(bbox=[0.1, 0.2, 0.5, 0.5]), "in fractions of the image.*: 3 .*id 1"),
        # An object as large as its image.
        (boxes([0.1, 0.2, 0.5, 0.5], [0, 0, 1, 1], [0, 0, 1, 0.7]), "in fractions .*: 3 .*id 1"),
        (every(bbox=[20, 10, 35, 25]), "are corners .*: 3 .*id 1"),
        # Corners of objects on the left and above do not stick out, when read as sizes.
        (boxes([1, 2, 10, 12], [3, 4, 20, 16], [20, 10, 35, 25]), "are corners .*: 3 .*id 1"),
        (every(iscrowd=1), "all crowds .*: 3 .*id 1"),
        (every(image_id=7), "annotations none of which can be used: 3 .*id 1"),
        (annotation(keypoints=[3, 4, 2, 5, 6]), "no list of x, y, visibility, ...: 1 .*id 1"),
        (lambda c: [category(keypoints=["l", "r"])(c), annotation(keypoints=[3, 4, 2])(c)],
         "not the 2 that the category names: 1 .*id 1: 1"),
        (lambda c: c.update(images=[]), "expected images and categories, found an empty list"),
        (lambda c: c.pop("images"), "found no list of images"),
    ],
)  # fmt: skip
def test_faults_of_the_json(dataset, change, message):
    edit(dataset[1], change)
    problems = check_dataset("sound").problems
    texts = [text for text, _ in problems]
    assert any(re.search(message, text) for text in texts), texts
    assert all(str(dataset[1]) in text for text in texts if "another size" not in text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (category(name=None), "category without a proper name: 1"),
        (lambda c: [entry.update(width=0.5) for entry in c["images"]], "without a proper width: 3"),
    ],
)
def test_annotations_of_what_is_refused_are_not_at_fault(dataset, change, message):
    edit(dataset[1], change)
    report = check_dataset("sound")
    ((text, _),) = report.problems
    assert message in text and report.repairs == []


def test_boxes_of_one_pixel_are_no_fractions(dataset):
    edit(dataset[1], boxes([0, 0, 1, 1], [7.5, 4.25, 1, 1], [0.5, 0.5, 1, 1]))
    assert check_dataset("sound").problems == []


POLYGON = [1.0, 2.0, 31.0, 2.0, 31.0, 22.0]


@pytest.mark.parametrize(
    ("change", "repair", "key", "value"),
    [
        (annotation(area=None), "area was missing", "area", 610),
        (annotation(area=0), "area was missing", "area", 610),
        (annotation(area=-1), "area was missing", "area", 610),
        (annotation(area=float("nan")), "area was missing", "area", 610),
        (annotation(area=610 * 640 * 480), "area was missing", "area", 610),
        (annotation(id=3), "ids that are taken", "id", 1),
        (annotation(id=0), "not above 0", "id", 1),
        (annotation(id="x7"), "no integers", "id", 1),
        (annotation(iscrowd="0"), "iscrowd was no number", "iscrowd", 0),
        (annotation(iscrowd=None), "iscrowd was no number", "iscrowd", 0),
        (annotation(ignore=1), "treated as a crowd", "iscrowd", 1),
        (annotation(image_id="1"), "image_id was not written as an integer", "image_id", 1),
        (annotation(bbox=["1", "2", "30.5", "20"]), "as strings", "bbox", [1, 2, 30.5, 20]),
        (annotation(segmentation=POLYGON), "not in a list", "segmentation", [POLYGON]),
        (annotation(segmentation=[[1, 2], [31, 2], [31, 22]]), "of pairs", "segmentation",
         [POLYGON]),
        (annotation(segmentation=[[1, 2, 31, 22]]), "placeholder", "segmentation", []),
        (annotation(segmentation=[[]]), "placeholder", "segmentation", []),
        (annotation(segmentation=[POLYGON, [1, 2]]), "no polygon", "segmentation", [POLYGON]),
        (annotation(segmentation={"counts": [0, 1200]}), "without its size", "segmentation",
         {"counts": [0, 1200], "size": [HEIGHT, WIDTH]}),
        (annotation(image_id=7), "unknown image, left out: 1 .*id 1", "id", 2),
        # pycocotools would look for an object that detectron2 never learnt.
        (annotation(bbox=[3, 2, 20, 0]), "without area, left out: 1 .*id 1", "id", 2),
        (annotation(bbox=[3, 2, 0, 0], segmentation=[POLYGON]), "around its mask", "bbox",
         [1, 2, 30, 20]),
        (annotation(bbox=None, segmentation={"counts": [62, 5, 25, 3, 1105]}), "around its mask",
         "bbox", [2, 2, 2, 5]),
        (annotation(keypoints=[3, 4, 2, 5, 6, 1, 0, 0, 0]), "without num_keypoints",
         "num_keypoints", 2),
        (image(width="40"), "width was not written as an integer", "id", 1),
    ],
)  # fmt: skip
def test_what_is_repaired_is_said_and_read_so_by_all(dataset, change, repair, key, value):
    edit(dataset[1], change)
    report = check_dataset("sound")
    assert report.problems == []
    assert any(re.search(repair, line) for line in report.repairs), report.repairs
    read = json.loads(Path(coco.survey(str(dataset[1])).path).read_text())
    assert read["annotations"][0][key] == value
    adopt("sound")
    assert len(DatasetCatalog.get("sound")) == 3
    with repaired("sound"):
        assert MetadataCatalog.get("sound").json_file == coco.survey(str(dataset[1])).path
    assert MetadataCatalog.get("sound").json_file == str(dataset[1])


def test_annotations_that_are_there_twice_are_learnt_once(dataset):
    def merge(content):
        crowd, other, third = content["annotations"]
        crowd["iscrowd"] = 1
        renumbered = {**other, "id": 7}
        # Of two outlines of one object nobody knows which is meant.
        refined = {**third, "id": 8, "segmentation": [POLYGON]}
        content["annotations"] += [dict(crowd), renumbered, refined]

    edit(dataset[1], merge)
    report = check_dataset("sound")
    assert report.problems == [] and report.annotations == 4 and report.survey.crowds == 1
    assert report.repairs == [
        "annotation that repeats another one, left out: 2 (such as id 1, id 7)"
    ]
    assert report.notes == [
        "annotation of the same image, category and box as another one: 1 (such as id 8)"
    ]
    read = json.loads(Path(coco.survey(str(dataset[1])).path).read_text())
    assert [annotation["id"] for annotation in read["annotations"]] == [1, 2, 3, 8]


def test_a_few_annotations_that_are_there_twice_are_noted(dataset, monkeypatch):
    monkeypatch.setattr(entries, "REPEATED", 0.25)
    edit(dataset[1], lambda c: c["annotations"].append({**c["annotations"][0], "id": 7}))
    report = check_dataset("sound")
    assert report.notes == ["annotation that repeats another one: 1 (such as id 7)"]
    assert report.annotations == 4 and report.problems == report.repairs == []


@pytest.mark.parametrize(
    ("write", "repair"),
    [
        (lambda raw: raw, None),
        (lambda raw: b"\xef\xbb\xbf" + raw, "utf-8-sig"),
        (lambda raw: raw.decode().encode("utf-16"), "utf-16"),
        (gzip.compress, "gzip"),
    ],
)
def test_encodings(dataset, write, repair):
    dataset[1].write_bytes(write(dataset[1].read_bytes()))
    report = check_dataset("sound")
    assert report.problems == [] and (report.images, report.annotations) == (3, 3)
    assert repair in report.repairs[0] if repair else report.repairs == []


def test_the_compressed_masks_of_pycocotools(dataset):
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    pixels[2:22, 1:31] = 1
    rle = mask_util.encode(pixels)
    rle["counts"] = rle["counts"].decode()
    edit(dataset[1], annotation(segmentation=rle))
    assert check_dataset("sound").repairs == []
    edit(dataset[1], annotation(segmentation={**rle, "counts": rle["counts"][:-3]}))
    ((text, _),) = check_dataset("sound").problems
    assert "RLE" in text and "id 1" in text


@pytest.mark.parametrize(
    "listed", ["000002.JPG", "val/000002.jpg", "/000002.jpg", "VAL\\000002.jpg", "./x/000002.jpg"]
)
def test_names_that_are_nearly_there(dataset, listed):
    edit(dataset[1], lambda content: content["images"][1].update(file_name=listed))
    ((text, _),) = check_dataset("sound").problems
    assert f"{listed}: there is 000002.jpg" in text


def test_classes_that_differ(dataset, tmp_path):
    swapped = tmp_path / "swapped.json"
    swapped.write_text(dataset[1].read_text().replace("square", "disc"))
    reports = [check_dataset(n) for n in ("sound", f"coco:{swapped}:{dataset[2]}")]
    assert "class 0 is 'square' and 'disc'" in class_conflict(reports)
    assert class_conflict(reports[:1] * 2) is None
    DatasetCatalog.remove(reports[1].name)
    MetadataCatalog.remove(reports[1].name)


def test_images_that_are_twice_in_one_set_or_in_two(dataset, tmp_path):
    """By content, as copies have other names; by path where the content has not been read."""
    folder = dataset[2]
    assert check_dataset("sound").notes == []
    shutil.copyfile(folder / "000001.jpg", folder / "000003.jpg")
    copies = tmp_path / "copies"
    copies.mkdir()
    shutil.copyfile(folder / "000002.jpg", copies / "another.jpg")
    content = json.loads(dataset[1].read_text())
    content |= {"images": [{**content["images"][1], "file_name": "another.jpg"}], "annotations": []}
    (tmp_path / "copies.json").write_text(json.dumps(content))

    name = f"coco:{tmp_path / 'copies.json'}:{copies}"
    reports = check_dataset("sound"), check_dataset(name)
    assert reports[0].notes == [
        "image whose content another one has: 1 (such as 000003.jpg, as 000001.jpg)"
    ]
    (text,) = shared_images(reports)
    assert text.startswith(f"1 images are in sound as well as in {name}, such as 000002.jpg: if")
    assert shared_images([gate("sound"), gate(name)]) == []
    assert len(shared_images([gate("sound"), gate("sound")])) == 1
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("box", "note"),
    [([30, 2, 20, 4], "sticks out of its image"), ([-0.5, 0, 40.9, 30.6], None)],
)  # fmt: skip
def test_what_detectron2_copes_with_is_only_noted(dataset, box, note):
    edit(dataset[1], annotation(bbox=box))
    report = check_dataset("sound")
    assert report.problems == []
    assert note in report.notes[0] if note else report.notes == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def hole(path):
    """In the second half of the picture, or of the first of two."""
    content = bytearray(path.read_bytes())
    size = content.index(b"\xff\xd9")
    start, end = size // 2, size * 3 // 4
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def zeros(path, start=0.5):
    content = path.read_bytes()
    whole = int(start * len(content))
    path.write_bytes(content[:whole] + bytes(len(content) - whole))


def to_mpo(path):
    """As phones write it: with a second picture, here of the same size."""
    with Image.open(path) as picture:
        picture.save(path, "MPO", save_all=True, append_images=[picture.copy()])
    return path


def replace(before, after):
    """Changes a JPEG's first bytes of that kind."""

    def change(path):
        content = path.read_bytes()
        assert before in content
        path.write_bytes(content.replace(before, after, 1))

    return change


def append(path, more):
    path.write_bytes(path.read_bytes() + more)


def turn_without_size(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, exif=exif)


def turn(path):
    """The same picture stored on its side, with the note that says so."""
    with Image.open(path) as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(path, exif=exif)


def to_tiff(orientation):
    """Of a file whose name still says JPEG."""

    def change(path):
        with Image.open(path) as picture:
            picture.save(path, "TIFF", tiffinfo={0x0112: orientation})

    return change


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (Path.unlink, "missing image"),
        (truncate, "unreadable image"),
        (lambda path: path.write_bytes(b""), "unreadable image, of no format that Pillow knows: 1"),
        (hole, "image that is damaged inside"),
        (lambda path: hole(to_mpo(path)), "image that is damaged inside"),
        (to_mpo, None),
        (lambda path: zeros(to_mpo(path), 0.4), "image that is not whole: zeros to its end"),
        (lambda path: zeros(to_mpo(path), 0.8), None),  # inside the second, which nobody reads
        (zeros, "image that is not whole: zeros to its end"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-300] + b"\xff\xd9"),
            "image that is damaged",
        ),
        (
            lambda path: Image.fromarray(np.zeros((30, 40), np.uint16)).save(path, "PNG"),
            "image of 16",
        ),
        (turn_without_size, "image that its EXIF turns"),
        (to_tiff(1), None),
        (to_tiff(3), "TIFF with an orientation"),
        (to_tiff(6), "TIFF with an orientation"),
        (
            lambda path: path.write_text("<html>not found</html>"),
            "unreadable image, of no format that Pillow knows: 1",
        ),
        (lambda path: [path.unlink(), path.mkdir()], r"unreadable image (Is a directory): 1"),
        (lambda path: Image.new("1", (14000, 14000)).save(path, "PNG"), "image of more pixels"),
        # What libjpeg remarks on, and decodes as it is meant.
        (replace(b"JFIF\0\1", b"JFIF\0\3"), None),
        (replace(b"\0\x3f\0", b"\0\0\0"), None),  # the spectrum of the scan
        (replace(b"\xff\xd9", b"\x12" * 9 + b"\xff\xd9"), "image that is damaged inside"),
        (lambda path: Image.new("RGB", (30, 40)).save(path), "image of another size"),
        (turn, None),
        (lambda path: append(path, b"\0\0"), None),
        (lambda path: append(path, b"a film" + bytes(100)), None),
    ],
)
def test_faults_of_images(dataset, damage, kind):
    _, _, folder = dataset
    damage(folder / "000002.jpg")
    problems = check_dataset("sound").problems
    if kind is None:
        assert problems == []
    else:
        ((text, cure),) = problems
        assert text.startswith(f"{folder}: {kind}") and "1 (such as 000002.jpg)" in text
        assert "image_root" in cure


def test_only_what_was_sound_is_remembered(dataset, monkeypatch):
    """What cannot be read today, for want of a right, may be tomorrow, and the file is the same."""

    def unreadable(*names):
        found = dict.fromkeys((str(dataset[2] / name) for name in names), "unreadable image")
        monkeypatch.setattr(pictures, "picture_fault", lambda path, *_: found.get(path))

    unreadable("000002.jpg")
    with pytest.raises(ValueError, match="unreadable image: 1 .such as 000002.jpg"):
        gate("sound")
    unreadable("000001.jpg", "000003.jpg")
    for _ in range(2):
        assert gate("sound").problems == []


@pytest.mark.parametrize(
    ("count", "crowd", "is_said"), [(100, 0, False), (101, 0, True), (101, 1, False)]
)
def test_more_objects_than_coco_looks_for_are_noted(count, crowd, is_said, dataset):
    """Their average precision is low, however well they are found."""

    def multiply(content):
        first = {**content["annotations"][0], "iscrowd": crowd}
        more = ({**first, "id": 100 + i, "bbox": [1, 2, 30, 5 + i / 9]} for i in range(count))
        content["annotations"] = [*content["annotations"][1:], *more]

    edit(dataset[1], multiply)
    notes = check_dataset("sound").notes
    assert (
        any(
            f"than the 100 that COCO's AP looks for: 1 (such as 000001.jpg: {count})" in note
            for note in notes
        )
        == is_said
    ), notes


def test_examples_are_few(dataset):
    edit(dataset[1], lambda c: [c["annotations"].append({"id": i}) for i in range(2000)])
    ((text, _),) = check_dataset("sound").problems
    assert "2,000 (such as id 0, id 1, id 2, ...)" in text


def test_counts_and_archives_of_coco(dataset, monkeypatch):
    release = Release(4, "zips/val2017.zip", "annotations/annotations_trainval2017.zip", 1)
    monkeypatch.setitem(checking.COCO, "sound", release)
    ((text, cure),) = check_dataset("sound").problems
    assert "expected 4 images, got 3" in text
    assert cure == (
        "wget -c http://images.cocodataset.org/annotations/annotations_trainval2017.zip && "
        f"unzip -qo annotations_trainval2017.zip -d {dataset[1].parent.parent}"
    )


@pytest.mark.parametrize("name", ["cats", "voc_2007_val"])
def test_names_that_cannot_be_checked(name):
    with pytest.raises(ValueError, match=f"{name}: expected a"):
        check_dataset(name)


def run(root: Path, *names) -> subprocess.CompletedProcess:
    return run_tool("check_dataset.py", *names, DETECTRON2_DATASETS=str(root))


def run_alone(root: Path, *names) -> subprocess.CompletedProcess:
    """In a new Python: :func:`run`'s has registered COCO where it was before."""
    env = {**os.environ, "DETECTRON2_DATASETS": str(root), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "check_dataset.py"), *names]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_tool(tmp_path):
    write_dataset(tmp_path)
    result = run(tmp_path, "shapes_val")
    assert result.returncode == 0, result.stderr
    assert "shapes_val: complete; 3 images, 3 annotations, 1 categories" in result.stdout

    edit(tmp_path / "shapes/annotations/instances_val.json", annotation(iscrowd=1))
    table = run(tmp_path, "shapes_val").stdout
    assert "3 annotations, 1 of them crowds, which are not learnt" in table
    assert re.search(r"\| all +\| +2 \|", table)

    result = run_alone(tmp_path, "shapes_val", "shapes_train", "coco_2017_test-dev")
    assert result.returncode == 1
    assert "shapes_val: complete" in result.stdout
    assert "do: make it with dk-prepare-shapes" in result.stdout
    for archive in "annotations/image_info_test2017.zip", "zips/test2017.zip":
        name = archive.rsplit("/", 1)[-1]
        assert (
            f"do: wget -c http://images.cocodataset.org/{archive} && "
            f"unzip -qo {name} -d {tmp_path}/coco"
        ) in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["shapes_val", "cats"], "cats: expected a data set; DATASETS: expected"),
        (["shapes_val", "voc_2007_val"], "voc_2007_val: expected a data set that is registered in"),
        (["--html", "."], "--html: expected a file, got the folder '.'"),
        (["--json-report", "/dev/null/report.json"], "--json-report: expected a file in a folder"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_the_first_picture(
    monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(command, "check_dataset", lambda *_: pytest.fail("has begun"))
    monkeypatch.setattr(sys, "argv", ["dk-check-dataset", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_folders_of_what_is_written_are_made(dataset, tmp_path, monkeypatch):
    report, page = tmp_path / "new" / "report.json", tmp_path / "other" / "page.html"
    arguments = ["sound", "--json-report", str(report), "--html", str(page)]
    monkeypatch.setattr(sys, "argv", ["dk-check-dataset", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 0
    assert json.loads(report.read_text())[0]["name"] == "sound" and page.exists()


def test_coco_is_what_detectron2_registers():
    assert {name: release.images for name, release in checking.COCO.items()} == {
        "coco_2017_train": 118287, "coco_2017_val": 5000, "coco_2017_test-dev": 20288,
    }  # fmt: skip
    for name, release in checking.COCO.items():
        image_root = MetadataCatalog.get(name).image_root
        assert Path(release.image_archive).stem == Path(image_root).name


def test_the_page_stands_alone(dataset, tmp_path):
    """Charts, the strangest boxes and what was found; names of strangers are text, no markup."""
    edit(dataset[1], annotation(bbox=[30, 2, 20, 4]))
    edit(dataset[1], category(name="<b>square</b>"))
    shutil.copyfile(dataset[2] / "000001.jpg", dataset[2] / "000003.jpg")
    page = tmp_path / "page.html"
    json_file, folder = map(str, dataset[1:])
    result = run(tmp_path, "--json", json_file, "--images", folder, "--html", str(page))
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    assert "&lt;b&gt;square&lt;/b&gt;" in text and "<b>square" not in text
    assert "000003.jpg = 000001.jpg" in text and "sticks out of its image" in text
    assert text.count("<svg") == 2
    # Of three boxes each the smallest, the longest and the largest; the one that sticks out.
    drawings = re.findall('src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(drawings) == 3 * 3 + 1
    assert all(b64decode(drawing)[:3] == b"\xff\xd8\xff" for drawing in drawings)
    assert not re.search(r'(src|href)="(?!data:|#)', text)

    (dataset[2] / "000001.jpg").unlink()
    result = run(tmp_path, "--json", json_file, "--images", folder, "--html", str(page))
    assert result.returncode == 1 and "missing image: 1" in page.read_text()


def test_the_same_classes_in_another_order_are_a_conflict():
    one, other = (
        checking.Report(name, survey=coco.Survey("", classes=classes))
        for name, classes in {"one": ["cat", "dog"], "other": ["dog", "cat"]}.items()
    )
    assert "class 0 is 'cat' and 'dog'" in class_conflict([one, other])


def test_what_is_remembered_of_pictures_is_of_these_files_and_sizes(tmp_path):
    path = tmp_path / "1.png"
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(path)
    assert pictures.look_at_pictures([("1.png", 40, 30)], str(tmp_path)).lines == []
    corrected = [("1.png", 41, 30)]  # in a JSON of other sizes
    (line,) = pictures.look_at_pictures(corrected, str(tmp_path)).lines
    assert line.startswith("image of another size")
    content, changed = path.read_bytes(), path.stat().st_mtime_ns + 10**9
    path.write_bytes(content[:40] + bytes(len(content) - 40))  # of the same size
    os.utime(path, ns=(changed, changed))
    (line,) = pictures.look_at_pictures([("1.png", 40, 30)], str(tmp_path)).lines
    assert line.startswith("unreadable image")

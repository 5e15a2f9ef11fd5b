"""Results of strangers: what is submitted is what COCO's evaluation reads, or they are refused."""

import gzip
import json
import tempfile
import zipfile
from pathlib import Path

from fuzzing import READERS, attempt, cases, damaged, spoilt
from hypothesis import event
from hypothesis import strategies as st

from dk_detectron.evaluation import submission
from dk_detectron.evaluation.results import read_results

IMAGES, CATEGORIES = {7: (40, 30), 9: (64, 48)}, {1, 2, 90}
MASK = {"size": [30, 40], "counts": "`0h00000000000000o3"}
RESULTS = [
    {"image_id": 7, "category_id": 90, "bbox": [1.0, 2.0, 30.0, 20.0], "score": 0.5},
    {"image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], "score": 1.0, "segmentation": MASK},
    {"image_id": 9, "category_id": 2, "bbox": [3.123, 4.5, 5, 6.75], "score": 0.123456789},
]


@st.composite
def result_files(draw) -> bytes:
    raw = json.dumps(draw(spoilt(RESULTS)), ensure_ascii=False).encode("utf-8", "surrogatepass")
    if draw(st.sampled_from([False] * 4 + [True])):
        raw = gzip.compress(raw, 1)
    return draw(damaged(raw, most=draw(st.sampled_from([0, 0, 0, 2]))))


def submit(path: Path, task: str | None, folder: Path) -> submission.Submission:
    found = submission.collect(read_results(path), IMAGES, CATEGORIES, task, str(path))
    submission.write(found, folder, "fuzz")
    return found


@cases(READERS, 0.1, raw=result_files(), task=st.sampled_from([None, *submission.TASKS]))
def test_results(raw, task):
    with tempfile.TemporaryDirectory() as folder:
        path, made = Path(folder, "found.json"), Path(folder, "made")
        path.write_bytes(raw)
        found = attempt(submit, path, task, made, names=str(path))
        if isinstance(found, Exception):
            assert not made.exists() or list(made.iterdir()) == []
            return
        event(f"kept {found.kept} of {found.total}, {found.task}")
        for line in (*found.violations.lines(), *found.notes.lines()):
            assert line.encode() and len(line) < 2000
        check_what_is_sent(found, made)


def check_what_is_sent(found: submission.Submission, folder: Path) -> None:
    (archive,) = folder.glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        (name,) = file.namelist()
        sent = json.loads(file.read(name))
    assert len(sent) == found.kept
    for result in sent:
        width, height = IMAGES[result["image_id"]]
        assert result["category_id"] in CATEGORIES and 0 <= result["score"] <= 1
        if found.task == "bbox":
            x, y, w, h = result["bbox"]
            assert 0 <= x <= width and 0 <= y <= height and w >= 0 and h >= 0
            assert x + w <= width + 0.01 and y + h <= height + 0.01  # by rounding
        else:
            assert result["segmentation"]["size"] == [height, width]

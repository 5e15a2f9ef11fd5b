"""Reading a file of results: in pieces, compressed, in any encoding; and what is none."""

import gzip
import json
from pathlib import Path

import pytest

from dk_detectron.data.faults import Findings
from dk_detectron.evaluation import results
from dk_detectron.evaluation.results import read_results

RESULT = {"image_id": 7, "category_id": 90, "bbox": [1.0, 2.0, 30.0, 40.0], "score": 0.5}


def parse(folder: Path, content: str | bytes, notes: Findings | None = None) -> list:
    path = folder / "results.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_results(path, notes))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("chunk", "expected"),
    [(1, [{}, {}, {}]), (200, [{**RESULT, "score": i / 7, "note": '"},{["é'} for i in range(9)])],
)
def test_reading_in_pieces_is_reading_at_once(chunk, expected, indent, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "CHUNK", chunk)
    assert parse(tmp_path, json.dumps(expected, indent=indent, ensure_ascii=False)) == expected
    assert parse(tmp_path, " [ ] \n") == []


@pytest.mark.parametrize(
    ("write", "note"),
    [
        (lambda raw: raw, None),
        (lambda raw: b"\xef\xbb\xbf" + raw, "utf-8-sig"),
        (lambda raw: raw.decode().encode("utf-16"), "utf-16"),
        (lambda raw: raw.decode().encode("utf-16-be"), "utf-16-be"),
        (gzip.compress, "gzip"),
        (lambda raw: gzip.compress(raw.decode().encode("utf-16")), "gzip"),
    ],
)
def test_encodings(write, note, tmp_path):
    notes = Findings()
    raw = write(json.dumps([RESULT] * 3).encode())
    assert parse(tmp_path, raw, notes) == [RESULT] * 3
    assert note in notes.lines()[0] if note else notes.lines() == []


def test_progress_comes_to_the_size_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "CHUNK", 100)
    path = tmp_path / "results.json.gz"
    path.write_bytes(gzip.compress(json.dumps([RESULT] * 50).encode()))
    steps = []
    assert len(list(read_results(path, progress=steps.append))) == 50
    assert sum(steps) == path.stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "'\\[' at character 0, got the end of the file"),
        ('{"annotations": [{}]}', "'\\[' at character 0, got '{'; a file of results is the list"),
        ("[[{}]]", "'{' at character 1, got '\\['; .*coco_instances_results.json"),
        ("[1, 2]", "'{' at character 1, got '1'"),
        ('[{"a": 1}, {"a": ', "JSON at character 17, got Expecting value"),
        ('[{"a": 1}', "',' or '\\]' at character 9, got the end of the file, which is not whole"),
        ('[{"a": 1},]', "'{' at character 10, got '\\]'"),
        ('[{"a": 1}] x', "its end at character 11, got 'x'"),
        ('[{"a": cat}, ' + '{"a": 1},' * 300_000, "JSON at character 7, got Expecting value"),
        ('[{"a": ' + "[" * 100_000, "a result at character 1, got maximum recursion"),
        ('[{"a": ' + "9" * 5000 + "}]", "a result at character 1, got Exceeds the limit"),
        (b"\x80\x02}q\x00", "got what is no text, or not whole: 'utf-8' codec"),
        (gzip.compress(b"[" + b"{}, " * 99, mtime=0)[:-9], "not whole: Compressed file ended"),
        (gzip.compress(b"[]", mtime=0)[:5], "got what is no text, or not whole"),
        (gzip.compress(b"[]", mtime=0)[:10] + b"\xff" * 20, "got what is no text, or not whole"),
    ],
)  # fmt: skip
def test_what_is_no_results_file(content, message, tmp_path):
    with pytest.raises(ValueError, match=f"results.json: expected .*{message}"):
        parse(tmp_path, content)

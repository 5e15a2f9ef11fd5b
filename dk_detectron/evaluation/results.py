"""Results in COCO's format, read one after the other, however long the file is."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..data.faults import Findings

CHUNK = 2**20  # characters that are read at once
SPACE = re.compile(r"[ \t\r\n]*")
EXPECTED = (
    "the list of results that detectron2's evaluation writes, coco_instances_results.json: "
    '[{"image_id": ..., "category_id": ..., "bbox": ..., "score": ...}, ...]'
)


class _JsonReader:
    """A JSON file in pieces: characters, and values of less than `CHUNK` characters."""

    def __init__(self, name: str, text: TextIO, progress: Callable[[], object]) -> None:
        self.name = name
        self.text = text
        self.progress = progress
        self.buffer = ""
        self.position = 0  # in the buffer
        self.dropped = 0  # characters that have left the buffer
        self.decoder = json.JSONDecoder()

    @property
    def place(self) -> int:
        """Characters before the next one, in the file."""
        return self.dropped + self.position

    def fill(self) -> bool:
        with _readable(self.name):
            text = self.text.read(CHUNK)
        self.buffer = self.buffer[self.position :] + text
        self.dropped += self.position
        self.position = 0
        self.progress()
        return bool(text)

    def error(self, expected: str, got: str, place: int) -> ValueError:
        return ValueError(
            f"{self.name}: expected {expected} at character {place:,}, got {got}; a file of "
            f"results is {EXPECTED}"
        )

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            if space := SPACE.match(self.buffer, self.position):
                self.position = space.end()
            if self.position < len(self.buffer) or not self.fill():
                return self.buffer[self.position : self.position + 1]

    def expect(self, *characters: str) -> str:
        found = self.peek()
        if found not in characters:
            got = repr(found) if found else "the end of the file, which is not whole"
            raise self.error(" or ".join(map(repr, characters)), got, self.place)
        self.position += 1
        return found

    def value(self) -> Any:
        while True:
            try:
                value, self.position = self.decoder.raw_decode(self.buffer, self.position)
                return value
            except json.JSONDecodeError as error:
                place = self.dropped + error.pos
                # It may continue after the end of the buffer.
                if len(self.buffer) - self.position > CHUNK or not self.fill():
                    raise self.error("JSON", error.msg, place) from error
            except (RecursionError, ValueError) as error:  # of too many levels, or digits
                raise self.error("a result", str(error), self.place) from error


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, UnicodeError, zlib.error) as error:
        raise ValueError(
            f"{name}: expected {EXPECTED}, got what is no text, or not whole: {error}"
        ) from error


def _as_text(file: io.BufferedReader, name: str, notes: Findings) -> TextIO:
    """The characters of a file, unpacked and in whichever encoding JSON may have."""
    with _readable(name):
        if file.peek(2)[:2] == b"\x1f\x8b":
            file = io.BufferedReader(gzip.GzipFile(fileobj=file))
            notes.add("file compressed by gzip, unpacked", name)
        encoding = json.detect_encoding(file.peek(4)[:4])
    if encoding != "utf-8":
        notes.add(f"file in {encoding}, read as such", name)
    return io.TextIOWrapper(file, encoding=encoding)


def read_results(
    path: str | Path, notes: Findings | None = None, progress: Callable[[int], object] | None = None
) -> Iterator[dict]:
    """The objects of a file's JSON array, one after the other.

    Args:
        notes: takes what was done to read the file: gzip, UTF-16, a byte order mark.
        progress: called with the number of bytes after each read.

    Raises:
        OSError: the file cannot be opened.
        ValueError: this is no array of objects, or not a whole one.
    """
    with open(path, "rb") as file:
        before = 0

        def report() -> None:
            nonlocal before
            if progress:
                progress(file.tell() - before)
            before = file.tell()

        reader = _JsonReader(str(path), _as_text(file, str(path), notes or Findings()), report)
        reader.expect("[")
        if reader.peek() == "]":
            reader.expect("]")
        else:
            separator = ","
            while separator == ",":
                reader.expect("{")
                reader.position -= 1
                yield reader.value()
                separator = reader.expect(",", "]")
        if found := reader.peek():
            raise reader.error("its end", repr(found), reader.place)

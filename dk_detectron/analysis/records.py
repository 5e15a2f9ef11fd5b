"""Rows of a CSV file that are there as soon as they are known, and survive an interruption."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEY = "image_id"
FORM = ".6g"  # of floats


class Records:
    """A CSV file that grows picture by picture, and a JSON file beside it of what it depends on.

    Attributes:
        done: identifiers of the pictures whose rows are there.
    """

    def __init__(self, path: Path, columns: Sequence[str], settings: dict):
        """Opens a file, or goes on with one of the same settings.

        Args:
            columns: "image_id" and the others.
            settings: what the rows depend on.

        Raises:
            FileExistsError: it was made with other settings, or by somebody else.
        """
        self.path, self._columns = path, list(columns)
        settings = json.loads(json.dumps(settings | {"columns": self._columns}))
        record = path.with_suffix(".json")
        if path.exists():
            found = json.loads(record.read_text()) if record.is_file() else None
            if found != settings:
                keys = (
                    settings
                    if found is None
                    else (k for k in settings if found.get(k) != settings[k])
                )
                raise FileExistsError(
                    f"{path}: expected rows of the same network and settings to go on with, got "
                    f"others ({', '.join(keys)}); take another --output-dir, or move it away"
                )
            self._drop_torn_rows()
        else:
            record.write_text(json.dumps(settings, indent=2))
            path.write_text(self._text([dict(zip(self._columns, self._columns, strict=True))]))
        self.done = {row[KEY] for row in self.rows()}

    def _text(self, rows: Sequence[dict[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue()

    def _drop_torn_rows(self) -> None:
        """Those of a picture during which the process was killed."""
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole == text and text:
            return
        rows = list(csv.DictReader(io.StringIO(whole)))
        kept = [row for row in rows if row[KEY] != rows[-1][KEY]]
        header = dict(zip(self._columns, self._columns, strict=True))
        self.path.write_text(self._text([header, *kept]))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """The rows of one picture, at once."""
        shown = [
            {name: format(v, FORM) if isinstance(v, float) else v for name, v in row.items()}
            for row in rows
        ]
        with open(self.path, "a") as file:
            file.write(self._text(shown))
        self.done |= {row[KEY] for row in rows}

    def rows(self) -> list[dict[str, Any]]:
        """All that there are; numbers as such."""
        with open(self.path, newline="") as file:
            return [
                {name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)
            ]


def _number(text: str) -> Any:
    """The number that a text is, if it is how :meth:`Records.add` writes it: not a class' "007"."""
    for kind, form in (int, "d"), (float, FORM):
        try:
            number = kind(text)
        except ValueError:
            continue
        if format(number, form) == text:
            return number
    return text

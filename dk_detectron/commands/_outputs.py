"""Arguments that name what a command writes."""

from __future__ import annotations

import argparse
from pathlib import Path


def output_file(text: str) -> Path:
    """A file that is written at the end, in a folder that is made at once.

    Raises:
        argparse.ArgumentTypeError: it is a folder, or none can be made for it.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a file in a folder that can be made, got {text!r} ({error}): give another"
        ) from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}: name a file")
    return path

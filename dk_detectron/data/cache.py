"""What took long to find out about files, kept until they change."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from iopath.common.file_io import get_cache_dir

# Part of every key: whoever changes what is judged, or what is kept, raises it.
RULES = 9


def cache_file(kind: str, key: str) -> Path:
    """Where it is kept: under ``FVCORE_CACHE``, or ~/.torch/iopath_cache as detectron2's own."""
    return Path(get_cache_dir(), "dk_detectron", f"{kind}-{RULES}-{key}.json")


def read(path: Path) -> Any:
    """What was kept; None if it was not, or is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write(path: Path, content: object) -> None:
    """Whole or not at all, whichever of a job's processes comes first."""
    text = json.dumps(content)  # json.dump would do without the encoder in C
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.remove(file.name)
            raise


def state_of(paths: Iterable[str]) -> str:
    """A key that changes with the size or the time of any of the files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            status = os.stat(path)
            state = f"{path} {status.st_size} {status.st_mtime_ns}\n"
        except OSError:
            state = f"{path}\n"
        digest.update(os.fsencode(state))
    return digest.hexdigest()

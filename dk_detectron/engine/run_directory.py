"""OUTPUT_DIR: one run each. What is in it is resumed, or stays as it is."""

from __future__ import annotations

import fcntl
import re
from itertools import count
from pathlib import Path
from typing import IO

from detectron2.utils import comm

from ..weights import LAST_CHECKPOINT
from .record import last_checkpoint

# What a trainer writes; other weights may lie beside them.
CHECKPOINT = re.compile(r"model_(\d{7}|final|final_ema)\.pth")
# What `replacing` leaves of one if the process is killed while it writes.
UNFINISHED = re.compile(CHECKPOINT.pattern + r"\.[0-9a-f]{8}\.tmp")
# What a run appends to, so that the next would be mixed with it.
APPENDED = "metrics.json", "events.out.tfevents.*"

# Open for as long as the process lives, and locked as long.
_CLAIMED: list[IO] = []


def claim(folder: str | Path) -> None:
    """Keeps other jobs from training in a folder, until this process ends; in all of a job's.

    What a job that was killed has left of a checkpoint is removed.

    Raises:
        FileExistsError: another job trains there.
    """
    is_free = not comm.is_main_process() or _lock(Path(folder))
    if not comm.all_gather(is_free)[0]:
        raise FileExistsError(
            f"OUTPUT_DIR: expected a folder that no other job is training in, got {folder}: wait "
            "for it, stop it, or take another folder"
        )


def _lock(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    _CLAIMED.append(file)
    try:
        # Of this process alone: data workers that outlive it do not hold it on.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    for path in folder.glob("*.tmp"):
        if UNFINISHED.fullmatch(path.name):
            path.unlink()
    return True


def checkpoints(folder: str | Path) -> list[str]:
    """The names of a run's checkpoints; none if there is no folder."""
    last = last_checkpoint(folder)
    paths = Path(folder).glob("*.pth")
    return sorted(p.name for p in paths if CHECKPOINT.fullmatch(p.name) or p == last)


def how_to_go_on(folder: str | Path) -> str:
    """What to do after a run has stopped, as a sentence."""
    if last := last_checkpoint(folder):
        return f"the same command with --resume goes on from {last.name}"
    return "there is no checkpoint yet: start again"


def is_new(folder: str | Path, *, resume: bool) -> bool:
    """Whether a run starts there, and does not go on."""
    return not resume or last_checkpoint(folder) is None


def check_unused(folder: str | Path, *, resume: bool) -> None:
    """Raises ``FileExistsError`` if a new run would overwrite the checkpoints of another.

    A run that ended before its first checkpoint is no obstacle.
    """
    found = checkpoints(folder)
    if not found or not is_new(folder, resume=resume):
        return
    some = ", ".join(found[:3]) + (f", ... ({len(found)})" if len(found) > 3 else "")
    cure = (
        f"write the name of one of them into {Path(folder, LAST_CHECKPOINT)} to go on from it"
        if resume
        else "--resume goes on with it"
    )
    raise FileExistsError(
        f"OUTPUT_DIR: expected a folder without checkpoints to start a run in, got {folder} with "
        f"{some} of an earlier run: {cure}; else take another OUTPUT_DIR, or remove them"
    )


def set_aside(folder: str | Path) -> Path | None:
    """Moves away what a new run would mix with its own; in the main process.

    Returns:
        Where it is now; None if there is nothing.
    """
    folder = Path(folder)
    if not comm.is_main_process():
        return None
    # A tag without checkpoints would be resumed in the place of this run.
    (folder / LAST_CHECKPOINT).unlink(missing_ok=True)
    metrics = folder / "metrics.json"
    if not metrics.exists() or not metrics.stat().st_size:
        return None
    names = (folder / f"unfinished_{number}" for number in count(1))
    target = next(name for name in names if not name.exists())
    target.mkdir()
    for pattern in APPENDED:
        for path in folder.glob(pattern):
            path.rename(target / path.name)
    return target

"""Studies of many runs: each result a line of JSON, so that any interruption costs one run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

Run = Any  # a frozen dataclass of JSON's types


def read_results(path: Path) -> list[dict]:
    """The results in a file of JSON lines; none if there is no file.

    A last line that a killed process left unfinished does not count: its run is done again.

    Raises:
        ValueError: another line is not JSON.
    """
    if not path.exists():
        return []
    *lines, last = path.read_text().split("\n")
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results += [json.loads(line)] if line else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: expected JSON in line {number}, got {line[:60]!r} ({error}): "
                "remove the line, and its run is done again"
            ) from error
    return results


def of_run(run: Run, results: Sequence[dict]) -> dict | None:
    """The result of a run, if it is finished."""
    return next((r for r in results if all(r.get(k) == v for k, v in asdict(run).items())), None)


@contextmanager
def _claim(path: Path, run: Run) -> Iterator[bool]:
    """Whether this process alone has the run; the claim of a process ends with it.

    A lock on one byte, the run's, of a file beside the results.

    Raises:
        OSError: there are no locks on the file system of the results.
    """
    digest = sha256(json.dumps(asdict(run), sort_keys=True).encode()).digest()
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.lockf(
                file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int.from_bytes(digest[:7], "big") + 1
            )
        except (BlockingIOError, PermissionError):  # systems differ in what they call it
            yield False
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path}: expected a file system where files can be locked, got {error.strerror}: "
                "keep the results on another",
            ) from error
        else:
            yield True


def _append(path: Path, result: dict) -> None:
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # After a line that was not finished: what follows is a line of its own.
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                _cut_last_line(file)
        file.write(json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_last_line(file) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def _finish(path: Path, run: Run, train: Callable[[Run], dict]) -> None:
    """Trains and records a run, unless it is finished or another process is at it."""
    with _claim(path, run) as mine:
        if mine and of_run(run, read_results(path)) is None:
            _append(path, {**asdict(run), **train(run)})


def execute(
    runs: Sequence[Run],
    train: Callable[[Run], dict],
    path: Path,
    *,
    workers: int = 1,
    cost: Callable[[Run], float] = lambda run: 1,
) -> list[dict]:
    """Does the runs that are not finished, with a bar of what is done and of the time left.

    Several such processes may work on the same file: no run is done twice.

    Args:
        runs: frozen dataclasses, in the order to do them.
        train: the result of a run, beyond the run itself.
        path: of the results, JSON lines.
        workers: processes; 1 for this one.
        cost: of a run relative to others, for the estimate of the time left.

    Returns:
        All results in the file.

    Raises:
        OSError: the results are where no file can be locked or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    results = read_results(path)
    waiting = [run for run in runs if of_run(run, results) is None]
    total = sum(map(cost, waiting))
    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed} so far, {remaining} left{postfix}"
    with tqdm(total=total, desc=f"{len(waiting)} runs", bar_format=form) as bar:
        for number, run in enumerate(_each(waiting, train, path, workers), start=1):
            bar.update(cost(run))
            bar.set_postfix_str(f"{number} of {len(waiting)} done")
    return read_results(path)


def _each(waiting: Sequence[Run], train, path: Path, workers: int) -> Iterator[Run]:
    """Runs as they finish."""
    if workers == 1:
        for run in waiting:
            _finish(path, run, train)
            yield run
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(_finish, path, run, train): run for run in waiting}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:  # after an error, the runs at work end, and no other begins
        pool.shutdown(cancel_futures=True)


def group_results(results: Sequence[dict], keys: Sequence[str]) -> list[tuple[tuple, list[dict]]]:
    """Results by the values of ``keys``, in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return list(groups.items())

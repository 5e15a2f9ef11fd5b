"""Tools as their users start them, in processes of their own, but for the seconds of imports.

They are forked from one process that has imported torch and detectron2, nothing of this project.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
PRELOADED = ["torch._dynamo", "torchvision", "detectron2.engine", "detectron2.modeling"]


def _run(script: str, arguments: Sequence[str], environment: dict, files: Sequence[str]) -> None:
    for stream, path in enumerate(files, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    # What this one starts itself, such as workers, it starts as a process of its own would.
    multiprocessing.set_start_method(None, force=True)
    # A shell has what it starts in the background ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


class Tool:
    """A running script: what tests use of ``subprocess.Popen``."""

    _context = multiprocessing.get_context("forkserver")

    def __init__(self, script: Path, arguments: Sequence[str], environment: dict):
        self.args = [sys.executable, str(script), *arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        self._context.set_forkserver_preload(PRELOADED)
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            forkserver.ensure_running()
        what = str(script), arguments, environment, list(map(str, self._files))
        self._process = self._context.Process(target=_run, args=what)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self) -> tuple[str, str]:
        self._process.join()
        return tuple(file.read_text() for file in self._files)


def run_tool(name: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
    """A script of tools/, of which every argument becomes a string."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return finish(Tool(ROOT / "tools" / name, [*map(str, arguments)], env))


def finish(job: Tool | subprocess.Popen) -> subprocess.CompletedProcess:
    output, errors = job.communicate()
    return subprocess.CompletedProcess(job.args, job.returncode, output, errors)

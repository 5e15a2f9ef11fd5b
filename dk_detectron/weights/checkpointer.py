"""detectron2's checkpointer, with this project's reading, converting and writing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from .convert import Report, convert
from .files import (
    CheckpointError,
    NonFiniteCheckpointError,
    UnreadableCheckpointError,
    non_finite,
    read_checkpoint,
    refuse_pickle,
    write_checkpoint,
    write_text,
)
from .names import pixels_conflict

# The file that names the checkpoint which --resume takes.
LAST_CHECKPOINT = "last_checkpoint"


class Checkpointer(DetectionCheckpointer):
    """detectron2's, which also converts what it loads, and neither trusts nor leaves half a file.

    With something to load beside the model (a trainer), :meth:`load` resumes: then the checkpoint
    must be of exactly the same network.

    Attributes:
        report: what became of every tensor of what was loaded last.
        resumed: the name of the file that a run was resumed from.
    """

    report: Report | None = None
    resumed: str | None = None

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """As in the base class.

        Raises:
            CheckpointError: the file cannot be read, or is not of the model's network.
        """
        refuse_pickle(path or "")
        self._resuming = checkpointables is None and bool(self.checkpointables)
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # which the base class leaves behind an error

    def _load_file(self, filename: str) -> dict:
        checkpoint = read_checkpoint(filename)
        checkpoint["model"], report = convert(checkpoint["model"], self.model, filename)
        if self._resuming and (report.resampled or report.initialised or report.unused):
            raise CheckpointError(
                f"{filename}: expected a checkpoint of the very same network to resume from, got "
                "another's; resume with the configuration of the run, or start a run from it with "
                f"MODEL.WEIGHTS and another OUTPUT_DIR\n\n{report}"
            )
        report.check()
        self.report = report
        self.logger.info("Loading %s:\n%s", filename, report)
        if conflict := pixels_conflict(report.kind, self.model):
            self.logger.warning("%s: %s", filename, conflict)
        return checkpoint

    def _load_model(self, checkpoint: dict) -> None:
        # Over the whole of the model's own, so that torch sees a complete and current state dict.
        state = self.model.state_dict()
        state.update(checkpoint.pop("model"))
        self.model.load_state_dict(state)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As in the base class; a last checkpoint that is damaged gives way to those before.

        Raises:
            CheckpointError: all of them are damaged, or the processes have different ones.
        """
        resumes = resume and self.has_checkpoint()
        self._agree(os.path.basename(self.get_checkpoint_file()) if resumes else "none")
        if not resumes:
            return self.load(path, checkpointables=[])
        candidates = self._resumable()
        for candidate in candidates:
            try:
                if not os.path.isfile(candidate):
                    raise UnreadableCheckpointError(f"{candidate}: no such file")
                checkpoint = self.load(candidate)
                self.resumed = os.path.basename(candidate)
                self._agree(f"{self.resumed} of iteration {checkpoint.get('iteration')}")
                return checkpoint
            except (UnreadableCheckpointError, NonFiniteCheckpointError) as error:
                self.logger.warning("Trying the checkpoint before, since: %s", error)
        raise CheckpointError(
            f"{self.save_dir}: expected a checkpoint to resume from, but all are damaged: "
            f"{', '.join(map(os.path.basename, candidates))}; start again without --resume, in "
            "another OUTPUT_DIR or after removing them"
        )

    def _agree(self, found: str) -> None:
        """Raises ``CheckpointError`` in all processes if one has found another to resume from."""
        first, *others = comm.all_gather(found)
        for process, other in enumerate(others, start=1):
            if other != first:
                raise CheckpointError(
                    f"{self.save_dir}: expected the same checkpoint on every machine to resume "
                    f"from, got {first} on process 0 and {other} on process {process}: share the "
                    "folder (OUTPUT_DIR), or copy it there"
                )

    def _resumable(self) -> list[str]:
        """The last checkpoint, then those of fewer iterations, latest first."""

        def iteration(path: str) -> float:
            number = re.search(r"_(\d+)\.pth$", path)
            return int(number[1]) if number else float("inf")

        last = self.get_checkpoint_file()
        before = [p for p in self.get_all_checkpoint_files() if iteration(p) < iteration(last)]
        return [last, *sorted(before, key=iteration, reverse=True)]

    def last_tagged(self) -> int | None:
        """When the last checkpoint was tagged, in nanoseconds; None if there is none."""
        path = Path(self.save_dir, LAST_CHECKPOINT)
        return path.stat().st_mtime_ns if path.exists() else None

    def rewind(self, is_good: Callable[[dict], bool]) -> str | None:
        """Makes the latest good checkpoint the last one; if none is good, there is no last one.

        Args:
            is_good: judges what :func:`read_checkpoint` returns.

        Returns:
            Its file's name.
        """
        for path in self._resumable():
            try:
                good = is_good(read_checkpoint(path))
            except (FileNotFoundError, CheckpointError):
                continue
            if good:
                self.tag_last_checkpoint(os.path.basename(path))
                return os.path.basename(path)
        os.remove(os.path.join(self.save_dir, LAST_CHECKPOINT))
        return None

    def save(self, name: str, **kwargs) -> None:
        """As in the base class, but a file appears whole or not at all.

        Raises:
            FloatingPointError: a weight is not finite; nothing has been written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        checkpoint = {"model": self.model.state_dict()}
        if bad := non_finite(checkpoint["model"]):
            raise FloatingPointError(
                f"{name}.pth: expected finite weights to save, got {len(bad)} that are not, such "
                f"as {bad[0]}; nothing has been written"
            )
        checkpoint |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_checkpoint(checkpoint | kwargs, path)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir, LAST_CHECKPOINT), last_filename_basename)

"""SIGINT and SIGTERM, of Ctrl-C or a scheduler: a run stops between two steps, with a checkpoint.

SIGTERM may come again and again, from whoever ends a job; only a second SIGINT stops at once.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm

# Below detectron2's, whose handlers write to the terminal and to log.txt.
LOGGER = logging.getLogger("detectron2.dk_detectron.engine.signals")

SIGNALS = signal.SIGINT, signal.SIGTERM

# Seconds for which another process leaves it to the main one to save a checkpoint.
PATIENCE = 60


def exit_status(signum: int) -> int:
    """Of a process that has stopped because of a signal, as shells have it."""
    return 128 + signum


class Stopped(SystemExit):
    """A run has stopped because of a signal; uncaught, it ends the process with that status."""

    def __init__(self, signum: int):
        super().__init__(exit_status(signum))


@contextmanager
def handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Within it, ``handler`` gets the signals, but for those that the process is to ignore."""
    # Python has all signals in the main thread, and only there can say what becomes of them.
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


class StopRequest:
    """What signals have asked of this process.

    Attributes:
        signum: the first signal; 0 if there was none.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._interrupts = 0
        self._at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals are requests to stop."""
        self._process = os.getpid()
        with handled(self._note):
            yield

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that loads data, which its process ends
        self._interrupts += signum == signal.SIGINT
        if self._interrupts > 1:
            for worker in multiprocessing.active_children():
                worker.kill()
            raise KeyboardInterrupt
        if not self.signum and comm.is_main_process():
            # Not through a stream, whose lock the interrupted code may hold.
            name = signal.Signals(signum).name
            text = (
                f"\n{name}: stopping after this step, with a checkpoint (Ctrl-C again: at once)\n"
            )
            os.write(2, text.encode())
        self.signum = self.signum or signum
        if self._at_once:
            raise Stopped(self.signum)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it, no step is interrupted: a request raises ``Stopped`` where it comes."""
        self._at_once = True
        try:
            if self.signum:
                raise Stopped(self.signum)
            yield
        finally:
            self._at_once = False

    def leave_it_to_the_main_process(self) -> None:
        """Waits while that saves a checkpoint: an end of this process would soon end it as well."""
        if not comm.is_main_process():
            self._at_once = True  # the next signal is of the launcher, which ends what is left
            time.sleep(PATIENCE)

    def agreed(self) -> bool:
        """Whether any process of the job has a request; all must ask, after the same step."""
        self.signum = max(comm.all_gather(self.signum))
        return bool(self.signum)


class StopHook(HookBase):
    """Ends training between two steps if a signal asks for it. It comes before evaluation."""

    def after_step(self):
        trainer = self.trainer
        if trainer.iter + 1 < trainer.max_iter and trainer.stop_request.agreed():
            leave_off(trainer)
            comm.synchronize()  # a process that ends first would take the main one with it
            raise Stopped(trainer.stop_request.signum)


class EvaluationHook(EvalHook):
    """detectron2's hook, which a signal ends at once.

    detectron2's own would also evaluate what fails in the very last iteration.

    Attributes:
        stopped: what has ended the last evaluation, which must not keep metrics from being written.
    """

    stopped: Stopped | None = None

    def _do_eval(self):
        trainer = self.trainer
        try:
            with trainer.stop_request.at_once():
                super()._do_eval()
        except Stopped:
            leave_off(trainer)
            trainer.stop_request.leave_it_to_the_main_process()
            raise

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:
            try:
                super().after_train()
            except Stopped as stopped:
                self.stopped = stopped


def leave_off(trainer) -> None:
    """Between two steps: saves a checkpoint, unless there is one of this step; how to go on."""
    if not comm.is_main_process():
        return
    name = signal.Signals(trainer.stop_request.signum).name
    if trainer.iter >= trainer.max_iter:
        LOGGER.warning(
            "Stopped by %s after all iterations, before their evaluation was done: the same "
            "command with --resume does it",
            name,
        )
        return
    checkpoint = f"model_{trainer.iter:07d}"
    if (trainer.iter + 1) % trainer.cfg.SOLVER.CHECKPOINT_PERIOD:
        trainer.checkpointer.save(checkpoint, iteration=trainer.iter)
    LOGGER.warning(
        "Stopped by %s after %d of %d iterations: the same command with --resume goes on from "
        "%s.pth",
        name,
        trainer.iter + 1,
        trainer.max_iter,
        checkpoint,
    )

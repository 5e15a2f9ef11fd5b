"""The processes of a job: started here on each machine, as by detectron2, or by torchrun."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import detectron2.engine
import torch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException

from .signals import SIGNALS, Stopped, exit_status, handled


def launch(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Runs ``main(args)`` in every process: with NCCL on GPUs, with gloo on CPUs.

    Under torchrun its environment says which processes there are, on this machine and others. Else
    ``args`` does, which is of ``detectron2.engine.default_argument_parser``: --num-gpus processes
    on each of --num-machines.

    Raises:
        ValueError: both say it, or nothing says where the first of several machines is.
        Stopped: a signal has stopped the job.
        SystemExit: a process was killed; its number and the signal are named.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join(main, args)
        return
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError(
            f"--dist-url: expected the address of the first of {args.num_machines} machines and a "
            "free port there, the same on all, such as tcp://10.0.0.1:29500, got nothing"
        )
    start = partial(
        detectron2.engine.launch,
        partial(_run, main),
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
    if args.num_gpus * args.num_machines == 1:
        start()  # in this very process
    else:
        _watch(start)


def _watch(start: Callable[[], None]) -> None:
    """Runs the processes of this machine, and passes on what signals ask of them."""
    try:
        with _passing_on() as signals:
            start()
    except ProcessExitedException as error:
        statuses = {exit_status(signum): signum for signum in SIGNALS}
        if signum := signals[0] if signals else statuses.get(error.exit_code):
            raise Stopped(signum) from None
        sys.exit(
            f"The job has stopped: {error}. A system that is short of memory kills processes like "
            "this; the same command with --resume goes on from the last checkpoint"
        )
    if signals:
        raise Stopped(signals[0])


@contextmanager
def _passing_on() -> Iterator[list[int]]:
    """Within it, the processes get SIGTERM for any signal, and SIGKILL for a second SIGINT.

    A terminal sends SIGINT to them as well; they would take another one for the second.

    Yields:
        The signals so far.
    """
    signals: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        at_once = signals.count(signal.SIGINT) > 1
        for process in multiprocessing.active_children():
            process.kill() if at_once else process.terminate()
        if at_once:
            raise KeyboardInterrupt

    with handled(pass_on):
        yield signals


def _join(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Runs ``main`` in this process, one of torchrun's."""
    if (args.num_gpus, args.num_machines) != (1, 1):
        raise ValueError(
            "--num-gpus, --num-machines: expected none under torchrun, whose --nproc-per-node and "
            f"--nnodes say how many processes there are, got {args.num_gpus} and "
            f"{args.num_machines}"
        )
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if has_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
    _run(main, args)


def _run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Runs ``main``, and leaves the processes' group, if there is one, together.

    Else the threads of a group are still running when Python exits, which can abort the process
    after all its work is done. What has been stopped leaves alone.
    """
    try:
        main(args)
        comm.synchronize()
    except Stopped:
        _leave()
        raise
    _leave()


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()

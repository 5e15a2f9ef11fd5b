"""Memory, worker processes and disk that give out: recognised, with what helps and how to go on."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..config import is_classifier
from .run_directory import how_to_go_on

# As torch's allocators, this project's operators, cuBLAS and cuDNN say it.
OUT_OF_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory|"
    r"cannot allocate memory|Unable to allocate|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
# As torch's loader says it, of its processes and of the shared memory that tensors pass through.
WORKER = re.compile(
    r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)|"
    r"unable to (open|write|mmap|resize).*</torch_"
)
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
SHARED_MEMORY = "/dev/shm"


class OutOfMemoryError(torch.OutOfMemoryError):
    """torch's, of a GPU or the CPU, and the keys to change."""


class WorkerError(RuntimeError):
    """A process that loads data has died; the message says of what, most likely."""


class DiskError(OSError):
    """A disk is full, or a quota used up."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: torch has a type for GPUs alone, operators and the CPU a text."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))
    )


@contextmanager
def explained(cfg: CfgNode, *, training: bool) -> Iterator[None]:
    """Adds what helps to the errors of what gives out; the whole of their own text stays.

    Args:
        training: whether what is within trains, and can be gone on with; or evaluates.

    Raises:
        OutOfMemoryError, WorkerError, DiskError: in the place of torch's and Python's.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        go_on = f"\n  {how_to_go_on(cfg.OUTPUT_DIR)}" if training else ""
        if isinstance(error, OutOfMemoryError | WorkerError | DiskError):
            # Of an evaluation within, which does not know whether there is a run to go on with.
            *number, text = error.args
            raise type(error)(*number, text + go_on) from error.__cause__
        # A worker's own shortage of memory comes as that, with the worker's traceback.
        if WORKER.search(str(error)):
            raise WorkerError(f"{error}\n  {_cure_of_workers(cfg)}{go_on}") from error
        if is_out_of_memory(error):
            keys = "; ".join(_smaller(cfg) if training else _smaller_evaluation(cfg))
            raise OutOfMemoryError(
                f"out of memory in {'training' if training else 'evaluation'}: {error}\n"
                f"  to change: {keys}{go_on}"
            ) from error
        if isinstance(error, OSError) and error.errno in FULL:
            free = shutil.disk_usage(cfg.OUTPUT_DIR).free / 2**30
            raise DiskError(
                error.errno,
                f"{error.strerror}\n  OUTPUT_DIR {cfg.OUTPUT_DIR} has {free:.2f} GiB free: make "
                f"room, within your quota as well{go_on}",
            ) from error
        raise


def _now(cfg: CfgNode, verb: str, *keys: str) -> str:
    values = []
    for key in keys:
        value = cfg
        for part in key.split("."):
            value = value[part]
        values.append(f"{key} (now {value})")
    return f"{verb} {', '.join(values)}"


def _smaller(cfg: CfgNode) -> Iterator[str]:
    each = max(1, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())
    if each > 1:
        yield (
            f"lower SOLVER.IMS_PER_BATCH (now {each} images in each process), and SOLVER.BASE_LR "
            "in proportion"
        )
    if is_classifier(cfg):
        yield _now(cfg, "lower", "INPUT.CROP_SIZE")
    else:
        yield _now(cfg, "lower", "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN")
    if not cfg.SOLVER.AMP.ENABLED:
        yield "set SOLVER.AMP.ENABLED True"
    if not cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING:
        yield "set MODEL.BACKBONE.GRADIENT_CHECKPOINTING True"


def _smaller_evaluation(cfg: CfgNode) -> Iterator[str]:
    if is_classifier(cfg):
        yield _now(cfg, "lower", "SOLVER.IMS_PER_BATCH", "INPUT.CROP_SIZE")
    else:
        yield _now(cfg, "lower", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST")
        yield _now(cfg, "lower", "MODEL.RPN.POST_NMS_TOPK_TEST", "TEST.DETECTIONS_PER_IMAGE")
    if cfg.TEST.AUG.ENABLED:
        yield _now(cfg, "lower", "TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE")


def _cure_of_workers(cfg: CfgNode) -> str:
    shared = ""
    if os.path.isdir(SHARED_MEMORY):
        usage = shutil.disk_usage(SHARED_MEMORY)
        shared = (
            f" ({SHARED_MEMORY} has {usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB free)"
        )
    return (
        "a worker that loads data is killed if memory is short (the kernel's log, dmesg, then says "
        f"so), or shared memory{shared}: lower DATALOADER.NUM_WORKERS (now "
        f"{cfg.DATALOADER.NUM_WORKERS} in each process), or give a container more by --shm-size "
        "or --ipc=host"
    )

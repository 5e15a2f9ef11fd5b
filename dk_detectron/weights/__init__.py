"""Checkpoints: read safely, fitted to the model, written whole.

Any checkpoint goes through :func:`convert`, which gives a deformable network the weights of a rigid
one of the same family (exact warm start), and accounts for every tensor on both sides.
"""

from .checkpointer import LAST_CHECKPOINT, Checkpointer
from .convert import Report, convert, convert_file
from .files import (
    CheckpointError,
    NonFiniteCheckpointError,
    UnreadableCheckpointError,
    non_finite,
    read_checkpoint,
    refuse_pickle,
    replacing,
    write_checkpoint,
    write_text,
)
from .optimizer_state import state_by_name

__all__ = [
    "LAST_CHECKPOINT",
    "CheckpointError",
    "Checkpointer",
    "NonFiniteCheckpointError",
    "Report",
    "UnreadableCheckpointError",
    "convert",
    "convert_file",
    "non_finite",
    "read_checkpoint",
    "refuse_pickle",
    "replacing",
    "state_by_name",
    "write_checkpoint",
    "write_text",
]

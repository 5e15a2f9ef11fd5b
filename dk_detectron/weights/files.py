"""Files of weights: read without running code from them, written whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why, and what helps."""


class UnreadableCheckpointError(CheckpointError):
    """A file that is truncated, corrupt, or no checkpoint at all."""


# Reading and writing
def refuse_pickle(path: str) -> None:
    """Raises ``CheckpointError`` for the names of detectron2's and Caffe2's pickle files."""
    if path.partition("?")[0].endswith((".pkl", ".pickle", ".pyth")):
        raise CheckpointError(
            f"{path}: expected .pth, .pt or .safetensors, got a pickle file, which can run any "
            "code when it is read. If you trust it, unpickle it yourself and save its tensors: "
            "torch.save({'model': {name: torch.as_tensor(array), ...}}, 'weights.pth')"
        )


def read_checkpoint(path: str) -> dict:
    """Reads a file without running any code from it.

    Returns:
        What the file holds, with the weights, by name and without "module.", under "model".

    Raises:
        FileNotFoundError: no such file.
        UnreadableCheckpointError: it is truncated, corrupt, or of another format.
        CheckpointError: it needs arbitrary unpickling, or holds no weights.
    """
    refuse_pickle(path)
    with open(path, "rb") as f:
        content: Any
        try:
            if path.endswith(".safetensors"):
                content = safetensors.torch.load_file(path)
            else:
                content = torch.load(f, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            code = re.search(r"GLOBAL (\S+)", str(error))
            if isinstance(error, pickle.UnpicklingError) and code:
                raise CheckpointError(
                    f"{path}: expected tensors and plain values, got {code[1]}, which only runs "
                    "by unpickling, and that can run any code. If you trust the file, load it "
                    "yourself with weights_only=False and save its state dict with torch.save"
                ) from None
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise UnreadableCheckpointError(
                f"{path}: expected a checkpoint, got a file that is truncated, corrupt or of "
                f"another format ({reason}); fetch or write it again"
            ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a state dict, got a {type(content).__name__}")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
    elif "model" not in content and "state_dict" in content:
        content["model"] = content.pop("state_dict")
    state = content.get("model")
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise CheckpointError(
            f"{path}: expected tensors by name, alone or under 'model' or 'state_dict', got the "
            f"entries {', '.join(map(repr, list(content)[:8]))}"
        )
    consume_prefix_in_state_dict_if_present(state, "module.")
    return content


@contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yields the name to write under; the file takes the place of ``path`` once it is complete."""
    temporary = f"{path}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """``torch.save`` that leaves the whole file, or what was there before."""
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def non_finite(state: dict[str, Tensor]) -> list[str]:
    """The names of tensors that hold an infinity or NaN."""
    return [name for name, tensor in state.items() if not tensor.isfinite().all()]

"""Files of weights: read without running code from them, written whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
import secrets
import shutil
import zipfile
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


class NonFiniteCheckpointError(CheckpointError):
    """Weights with infinities or NaN, of a training that has diverged."""


# Where other libraries put the weights in a file; a moving average only if there is nothing else.
WEIGHT_KEYS = (
    "model", "state_dict", "model_state_dict", "model_state", "weights", "net",
    "model_ema", "state_dict_ema", "ema_state_dict", "ema",
)  # fmt: skip
# Beginnings of files that are not what their name says, and what to do.
MISTAKEN = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself by `git lfs pull`",
    b"<": "a page of HTML or XML, as a site sends in the place of a file: fetch it again",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x89HDF": "an HDF5 file, of Keras or TensorFlow",
}
# What makes PyTorch's names of Caffe2's, which some of these have.
RENAMER = "detectron2.checkpoint.c2_model_loading.convert_basic_c2_names"


def refuse_pickle(path: str) -> None:
    """Raises ``CheckpointError`` for the names of detectron2's and Caffe2's pickle files."""
    if path.partition("?")[0].endswith((".pkl", ".pickle", ".pyth")):
        raise CheckpointError(
            f"{path}: expected .pth, .pt or .safetensors, got a pickle file, which can run any "
            "code when it is read. If you trust it, unpickle it yourself and save its tensors: "
            "torch.save({'model': {name: torch.as_tensor(array), ...}}, 'weights.pth'), names of "
            f"Caffe2's (conv1_w, ...) renamed by {RENAMER}"
        )


def read_checkpoint(path: str) -> dict:
    """Reads a file without running any code from it, by its content, whatever it is called.

    Returns:
        What the file holds, with the weights, by name and without "module." or the "_orig_mod." of
        torch.compile, under "model".

    Raises:
        FileNotFoundError: no such file.
        UnreadableCheckpointError: it is truncated, corrupt, or of another format.
        CheckpointError: it needs arbitrary unpickling, or holds no weights.
        MemoryError: there is too little of it.
    """
    refuse_pickle(path)
    with open(path, "rb") as file:
        start = file.read(64)
    _refuse_mistaken(path, start)
    try:
        content = _load(path, start)
    except CheckpointError:
        raise
    except MemoryError as error:
        raise MemoryError(
            f"{path}: expected memory for all of its tensors, got too little"
        ) from error
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise CheckpointError(
                f"{path}: expected tensors and plain values, got {code[1]}, which only runs "
                "by unpickling, and that can run any code. If you trust the file, load it "
                "yourself with weights_only=False and save its state dict with torch.save"
            ) from None
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if "weights" in reason.lower():  # torch's advice to run what is in the file
            reason = type(error).__name__
        raise UnreadableCheckpointError(
            f"{path}: expected a checkpoint, got a file that is truncated, corrupt or of "
            f"another format ({reason}); fetch or write it again"
        ) from error
    return _with_model(path, content)


def _refuse_mistaken(path: str, start: bytes) -> None:
    if not start:
        raise UnreadableCheckpointError(
            f"{path}: expected a checkpoint, got an empty file, which is truncated, corrupt or was "
            "never written; fetch or write it again"
        )
    for beginning, what in MISTAKEN.items():
        # After the length of a header of safetensors there is a brace, not this.
        if start.lstrip().startswith(beginning):
            raise UnreadableCheckpointError(f"{path}: expected a checkpoint, got {what}")


def _load(path: str, start: bytes) -> Any:
    if start[8:9] == b"{":  # after the length of its header
        return safetensors.torch.load_file(path)
    if start.startswith(b"PK"):
        _check_archive(path)
    with open(path, "rb") as file:  # torch goes by the name of a path
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(path: str) -> None:
    """Reads the checksums that ``torch.save`` writes and ``torch.load`` ignores."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise UnreadableCheckpointError(
                f"{path}: expected a checkpoint, got a zip archive of {', '.join(names[:4])}: "
                "unpack it"
            )
        if damaged := archive.testzip():
            raise UnreadableCheckpointError(
                f"{path}: expected a checkpoint, got a file that is truncated, corrupt or of "
                f"another format (the checksum of {damaged} is wrong); fetch or write it again"
            )


def _with_model(path: str, content: Any) -> dict:
    """The content of a file with its weights, found and named plainly, under "model"."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a state dict, got a {type(content).__name__}")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
    key = next((key for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), "model")
    entries = [*content]
    state = content.pop(key, None)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(
            f"{path}: expected tensors by name, alone or under {', '.join(WEIGHT_KEYS)}, got the "
            f"entries {', '.join(map(repr, entries[:8]))}"
        )
    _refuse_without_values(path, state)
    plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    consume_prefix_in_state_dict_if_present(plain, "module.")
    if len(plain) < len(state):
        raise CheckpointError(
            f"{path}: expected every weight once, got some with and without a wrapper's prefix "
            "(_orig_mod., module.): save the state dict of one network alone"
        )
    plain.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    return {**content, "model": plain}


def _refuse_without_values(path: str, state: dict[str, Tensor]) -> None:
    """Raises on tensors that have no value for every place, such as those of the meta device."""
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
            what = "nested" if tensor.is_nested else f"{tensor.layout} on {tensor.device}"
            raise CheckpointError(
                f"{path}: expected dense tensors with their values, got {name} that is {what}: "
                "save it by .to_dense(), or with the values of the network"
            )


@contextmanager
def replacing(path: str | Path) -> Iterator[str]:
    """Yields the name to write under; the file takes the place of ``path`` once it is complete.

    Complete on the disk, that is, which network file systems and quotas may refuse at the end only.
    The name is no other writer's: of several who write the same file, the last one's stays.
    """
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """``torch.save`` that leaves the whole file, or what was there before.

    Raises:
        OSError: the disk is full, for example; which, and how much is free, is named.
    """
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        # torch hides what the file has said behind an error about positions in it.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        free = shutil.disk_usage(Path(path).parent).free / 2**30
        raise OSError(
            cause.errno,
            f"{path} could not be written: {cause.strerror} ({free:.2f} GiB are free there). What "
            "was there before still is: make room, within your quota as well",
        ) from None


def non_finite(state: dict[str, Tensor]) -> list[str]:
    """The names of tensors that hold an infinity or NaN."""
    return [name for name, tensor in state.items() if not tensor.isfinite().all()]

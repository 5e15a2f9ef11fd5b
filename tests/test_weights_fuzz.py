"""Checkpoints of strangers: read and fitted whole, or refused by name with nothing written."""

import contextlib
import gzip
import io
import json
import pickle
import tarfile
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fuzzing import READERS, attempt, cases, damaged
from hypothesis import strategies as st
from torch import nn

from dk_detectron.layers import CondConv2d, GlobalDeformKernel2d, LocalDeformKernel2d
from dk_detectron.weights import convert_file, read_checkpoint, write_checkpoint


class Tiny(nn.Module):
    """What `convert` looks for in a network, and every kind of layer that it makes from others."""

    def __init__(self, rigid: bool = False):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Module()
        self.backbone.stem.conv1 = nn.Conv2d(3, 4, 3)
        self.backbone.stem.norm = nn.BatchNorm2d(4)
        kinds = {
            "local": (LocalDeformKernel2d, {"scope_size": 4}),
            "global": (GlobalDeformKernel2d, {"scope_size": 4}),
            "experts": (CondConv2d, {"num_experts": 2}),
        }
        for name, (kind, options) in kinds.items():
            layer = nn.Conv2d(4, 4, 3, groups=4) if rigid else kind(4, 4, 3, groups=4, **options)
            setattr(self.backbone, name, layer)
        self.linear = nn.Linear(4, 2)


torch.manual_seed(0)
STATE = Tiny(rigid=True).state_dict()
OWN = Tiny().state_dict()


# ---- damaged files, and files of other kinds -----------------------------------------------------


def saved(save, content) -> bytes:
    file = io.BytesIO()
    save(content, file)
    return file.getvalue()


def legacy(content, file) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def as_archive(content: dict) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return file.getvalue()


SMALL = {"a": torch.randn(2, 3), "b.c": torch.arange(4)}
NAMED = {name: tensor.numpy() for name, tensor in SMALL.items()}
FILES = [
    saved(torch.save, {"model": SMALL, "iteration": 3}),
    saved(torch.save, SMALL),
    saved(legacy, {"model": SMALL, "iteration": 3}),
    safetensors.torch.save(SMALL),
]
OTHER_FILES = [
    saved(lambda content, file: np.savez(file, **content), NAMED),
    pickle.dumps(NAMED), pickle.dumps({"a": 1}), gzip.compress(FILES[0]), as_archive(NAMED),
    json.dumps({"a": [1]}).encode(), b"<html></html>", b"version https://git-lfs", b"", bytes(100),
    saved(torch.save, nn.Linear(2, 2)), saved(torch.save, [1, SMALL]),
    saved(torch.save, SMALL["a"]),
    (8).to_bytes(8, "little") + b'{"a": 1}', b"\x93NUMPY", b"\x89HDF\r\n\x1a\n",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of torch, about the content
@cases(READERS, 0.15, raw=st.sampled_from(FILES * 4 + OTHER_FILES).flatmap(damaged))
def test_damaged_files(raw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "source.pth")
        path.write_bytes(raw)
        found = attempt(read_checkpoint, str(path), names=str(path))
        if isinstance(found, Exception):
            return
        assert all(isinstance(name, str) for name in found["model"])
        write_checkpoint(found, path)
        again = read_checkpoint(str(path))
        assert again.keys() == found.keys() and again["model"].keys() == found["model"].keys()
        for name, tensor in found["model"].items():
            torch.testing.assert_close(again["model"][name], tensor, rtol=0, atol=0, equal_nan=True)


# ---- whole files of strange content --------------------------------------------------------------

ODD_TENSORS = {
    "transposed": lambda t: t.mT if t.dim() > 1 else t[None],
    "one less": lambda t: t[:-1] if t.dim() else t.view(1),
    "scalar": lambda t: torch.tensor(1.0),
    "empty": lambda t: torch.empty(0),
    "nan": lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t,
    "infinite": lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else t,
    "huge": lambda t: (t.double() + 1) * 1e300,
    "zero": torch.zeros_like,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "strided": lambda t: t[..., None].expand(*t.shape, 2)[..., 0],
    **{
        str(dtype): lambda t, dtype=dtype: t.to(dtype)
        for dtype in (
            torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint16, torch.int64,
            torch.bool, torch.complex64, torch.float8_e4m3fn,
        )
    },
}  # fmt: skip
WRAPPINGS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state},
    "Lightning": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
    "DDP": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "average": lambda state: {"ema": {"n_averaged": torch.tensor(3), **state}},
    "both": lambda state: {**state, **{f"module.{k}": v + 1 for k, v in state.items()}},
    "twice": lambda state: {"model": {"state_dict": state}},
    "odd": lambda state: {"model": {**state, 5: torch.ones(2)}, None: 3},
    "list": lambda state: {"model": list(state.items())},
    "nothing": lambda state: {"model": {}, "weights": state},
    "ordered": OrderedDict,
}
NAMES = [*STATE, *OWN, "features.0.0.weight", "conv_stem.weight", "stem.conv1.weight", "", "."]


@st.composite
def strange_content(draw) -> dict:
    state = dict(draw(st.sampled_from([STATE, OWN])))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(state)))
        what = draw(st.sampled_from(["tensor", "tensor", "take", "rename", "put"]))
        if what == "tensor":
            odd = ODD_TENSORS[draw(st.sampled_from(sorted(ODD_TENSORS)))]
            with contextlib.suppress(RuntimeError):  # of what is odd already
                state[name] = odd(state[name])
        elif what == "take":
            del state[name]
        elif what == "rename":
            state[draw(st.sampled_from(NAMES))] = state.pop(name)
        else:
            state[draw(st.sampled_from(NAMES) | st.text(max_size=3))] = torch.ones(3)
    wrap = draw(st.sampled_from(["plain"] * 6 + sorted(WRAPPINGS)))
    return WRAPPINGS[wrap](state)


@cases(READERS, 0.15, content=strange_content(), partial=st.booleans())
def test_strange_content(content, partial):
    torch.manual_seed(0)
    model = Tiny()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.pth"), Path(folder, "made", "target.pth")
        torch.save(content, source)
        report = attempt(convert_file, source, target, model, partial, names=str(source))
        if isinstance(report, Exception):
            assert list(Path(folder).iterdir()) == [source]
            return
        assert [path.name for path in target.parent.iterdir()] == ["target.pth"]
        written = torch.load(target, weights_only=True)["model"]
    assert not report.unexpected or partial
    expected = model.state_dict()
    accounted = {*report.matched, *report.resampled, *report.initialised}
    assert accounted == {name for name in expected if not name.endswith("num_batches_tracked")}
    assert written.keys() <= expected.keys()
    for name, tensor in written.items():
        assert tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype
        assert tensor.isfinite().all()
    model.load_state_dict(expected | written)

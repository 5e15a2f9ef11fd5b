"""The machine that runs PTX: what it must see, each in a small kernel with that fault."""

import re
import shutil

import numpy as np
import pytest
from ptx import build, machine
from ptx.memory import UNWRITTEN, WRITTEN, Fault, Memory, Shadow
from ptx.parser import Module

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")

SOURCE = build.HERE / "faults.cu"
FLOATS = 64
# Global memory of a launch: x, a gap, y; neither begins nor ends the whole.
X, Y, END = 512, 2048, 4096


@pytest.fixture(scope="module")
def kernels():
    return Module(build.compile_ptx(SOURCE).read_text())


def lines_of_fault(name: str) -> list[str]:
    """Those of a kernel that are marked."""
    lines = SOURCE.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if re.search(rf"\b{name}\(", line))
    end = lines.index("}", begin)
    return [f"faults.cu:{i + 1}" for i in range(begin, end) if lines[i].endswith("// fault")]


def launch(entry, grid=1, block=FLOATS):
    """Runs a kernel on x = 0, 1, 2...; returns x and y, of two blocks."""
    data, state = np.zeros(END, np.uint8), np.zeros(END, np.uint8)
    state[X : X + 4 * FLOATS], state[Y : Y + 8 * FLOATS] = WRITTEN, UNWRITTEN
    x = data.view(np.float32)[X // 4 : X // 4 + FLOATS]
    x[:] = np.arange(FLOATS)
    memory = Memory("global", data, state, base=1 << 40)
    memory.shadow = Shadow(END, 4)
    params = [np.uint64(memory.base + at).tobytes() for at in (X, Y)] + [np.int32(1).tobytes()]
    machine.run(entry, grid, block, 4 * FLOATS, params, memory)
    return x, data.view(np.float32)[Y // 4 : Y // 4 + 2 * FLOATS]


@pytest.mark.parametrize(
    "name, message",
    [
        ("beyond_global", r"global memory at 768: 4 bytes out of bounds \(1 threads\)"),
        ("beyond_shared", r"shared memory at 256: 4 bytes out of bounds \(1 threads\)"),
        ("before_shared", r"shared memory at -4: 4 bytes out of bounds \(1 threads\)"),
        ("misaligned", r"global memory at 516: not aligned to 16 bytes \(64 threads\)"),
        ("unwritten_global", r"global memory at 2048: read before it is written"),
        ("unwritten_shared", r"shared memory at 0: read before it is written"),
        ("race_read_after_write", "race: thread 0 touches what thread 63 has written"),
        ("race_write_after_read", "race: thread 0 touches what thread 63 has read"),
        ("race_in_warp", "race: thread 0 touches what thread 1 has written"),
        ("race_between_blocks", "race: thread 0 touches what thread 64 has written at once"),
        ("race_with_atomic", "race: thread 1 touches what thread 0 has written"),
        ("barrier_after_return", "63 threads wait for others in vain"),
        ("different_barriers", "64 threads wait for others in vain"),
        ("shuffle_after_return", "62 threads wait for others in vain"),
        ("warp_waits_in_vain", "64 threads wait for others in vain"),
        ("division_by_zero", "division by zero"),
        ("without_end", "never ends"),
    ],
)
def test_fault_is_seen_at_its_line(name, message, kernels, monkeypatch):
    monkeypatch.setattr(machine, "_MOST_STEPS", 100)
    with pytest.raises(Fault, match=message) as fault:
        launch(kernels[name], grid=2 if name == "race_between_blocks" else 1)
    lines = lines_of_fault(name)
    assert lines and all(line in str(fault.value) for line in lines)


def test_more_threads_than_the_kernel_is_made_for(kernels):
    with pytest.raises(Fault, match="64 threads per block, made for 32"):
        launch(kernels["too_many_threads"])


def test_arguments_of_another_size(kernels):
    memory = Memory("global", np.zeros(8, np.uint8), np.zeros(8, np.uint8))
    with pytest.raises(Fault, match="param_0 has 8 bytes, the launch gives 4"):
        machine.run(kernels["sound"], 1, 32, 0, [bytes(4)] * 3, memory)


def test_no_fault_where_there_is_none(kernels):
    x, y = launch(kernels["sound"])
    assert y[0] == np.arange(32, 64).sum()  # of what the other warp read
    assert y[32] == np.arange(32).sum()
    assert x[0] == FLOATS  # once a thread


@pytest.mark.parametrize(
    "old, new",
    [("add.f32", "add.rp.f32"), ("bar.sync", "bar.arrive"), ("st.shared.f32", "st.local.f32")],
)
def test_unknown_instructions_stop_the_run(old, new, kernels):
    text = build.compile_ptx(SOURCE).read_text()
    with pytest.raises(NotImplementedError, match=new):
        launch(Module(text.replace(old, new))["sound"])

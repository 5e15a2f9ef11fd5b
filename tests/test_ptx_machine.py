"""The machine that runs PTX: what it must see, each in a small kernel with that fault."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fragments import (
    check_copy,
    check_doubled,
    check_pairs,
    check_product,
    check_sum,
    check_transpose,
)
from ptx import build, machine
from ptx.counts import Cost, Counts
from ptx.memory import UNWRITTEN, WRITTEN, Fault, Memory, Shadow
from ptx.parser import Module

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")

SOURCE = build.HERE / "faults.cu"
PRODUCTS = build.HERE / "products.cu"
FLOATS = 64
# Global memory of a launch: x, a gap, y; neither begins nor ends the whole.
X, Y, END = 512, 2048, 4096


@pytest.fixture(scope="module")
def kernels():
    return Module(build.compile_ptx(SOURCE).read_text())


@pytest.fixture(scope="module")
def products():
    return Module(build.compile_ptx(PRODUCTS).read_text())


def lines_of_fault(name: str, source: Path = SOURCE) -> list[str]:
    """Those of a kernel that are marked."""
    lines = source.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if re.search(rf"\b{name}\(", line))
    end = lines.index("}", begin)
    return [f"{source.name}:{i + 1}" for i in range(begin, end) if lines[i].endswith("// fault")]


def launch(entry, grid=1, block=FLOATS, only=None):
    """Runs a kernel on x = 0, 1, 2...; returns x and y, of all blocks, but at least two."""
    data, state = np.zeros(END, np.uint8), np.zeros(END, np.uint8)
    written = FLOATS * max(2, grid)
    state[X : X + 4 * FLOATS], state[Y : Y + 4 * written] = WRITTEN, UNWRITTEN
    x = data.view(np.float32)[X // 4 : X // 4 + FLOATS]
    x[:] = np.arange(FLOATS)
    memory = Memory("global", data, state, base=1 << 40)
    memory.shadow = Shadow(END, 4)
    params = [np.uint64(memory.base + at).tobytes() for at in (X, Y)] + [np.int32(1).tobytes()]
    machine.run(entry, grid, block, 4 * FLOATS, params, memory, only=only)
    return x, data.view(np.float32)[Y // 4 : Y // 4 + written]


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


@pytest.mark.parametrize("together", [FLOATS, 2 * FLOATS])
def test_some_blocks_alone(together, kernels, monkeypatch):
    monkeypatch.setattr(machine, "_MOST_THREADS", together)
    _, y = launch(kernels["numbered"], grid=6, only=range(1, 6, 2))
    assert y.reshape(6, FLOATS).min(1).tolist() == [0, 2, 0, 4, 0, 6]
    assert y.reshape(6, FLOATS).max(1).tolist() == [0, 2, 0, 4, 0, 6]


@pytest.mark.parametrize(
    "old, new",
    [("add.f32", "add.rp.f32"), ("bar.sync", "bar.arrive"), ("st.shared.f32", "st.local.f32")],
)
def test_unknown_instructions_stop_the_run(old, new, kernels):
    text = build.compile_ptx(SOURCE).read_text()
    with pytest.raises(NotImplementedError, match=new):
        launch(Module(text.replace(old, new))["sound"])


def run_product(entry, *registers, counts=None):
    """Runs a kernel of products.cu on registers [thread, i] in blocks of a warp each, in place."""
    data = np.concatenate([array.view(np.uint32).reshape(-1) for array in registers])
    memory = Memory("global", data.view(np.uint8), np.full(data.nbytes, WRITTEN, np.uint8))
    memory.base = 1 << 40
    memory.shadow = Shadow(data.nbytes, 4)
    starts = np.cumsum([memory.base, *(array.nbytes for array in registers[:-1])])
    params = [np.uint64(start).tobytes() for start in starts]
    blocks = len(registers[0]) // 32
    machine.run(entry, blocks, 32, 32 * 16, params, memory, counts=counts)
    result = registers[-1]
    result[:] = data[-result.size :].view(result.dtype).reshape(result.shape)


def test_tensor_cores(products):
    def run(name, *registers):
        run_product(products[name], *registers)

    check_product(run, "half")
    check_product(run, "bfloat16")
    check_transpose(run)


@pytest.mark.parametrize(
    "name, place",
    [
        ("product_of_half_a_warp", "product_of"),
        ("transpose_of_half_a_warp", "transpose_of_half_a_warp"),
    ],
)
def test_tensor_cores_want_the_whole_warp(name, place, products):
    with pytest.raises(Fault, match=r"by part of a warp \(32 threads\)") as fault:
        run_product(products[name], *np.zeros((3, 64, 4), np.uint32))
    (line,) = lines_of_fault(place, PRODUCTS)
    assert line in str(fault.value)


def test_sums_of_vectors(products):
    """As one instruction."""
    (instruction,) = (i for i in products["sum"].code if i.parts[0] in ("atom", "red"))
    assert instruction.opcode == "red.global.add.v4.f32"
    check_sum(lambda name, *registers: run_product(products[name], *registers))


def test_copies(products):
    check_copy(lambda name, *registers: run_product(products[name], *registers))


def test_copies_in_part(products):
    source = np.random.default_rng(0).integers(1, 1 << 32, (32, 4)).astype(np.uint32)
    words = np.arange(32, dtype=np.uint32)[:, None] % 4
    words[words == 3] = 4
    out = np.ones_like(source)
    run_product(products["copy_in_part"], source, 4 * words, out)
    np.testing.assert_array_equal(out, np.where(np.arange(4) < words, source, 0))
    with pytest.raises(NotImplementedError, match=r"reads \[0, 3\] bytes"):
        run_product(products["copy_in_part"], source, np.where(words == 1, 3, 0 * words), out)


@pytest.mark.parametrize(
    "name, message",
    [
        ("sum_beyond", r"global memory at 1536: 16 bytes out of bounds \(1 threads\)"),
        ("sum_misaligned", r"global memory at 1028: not aligned to 16 bytes \(24 threads\)"),
        ("sum_read_at_once", "race: thread 0 touches what thread 1 has read"),
        ("copy_beyond", r"global memory at -16: 16 bytes out of bounds \(1 threads\)"),
        ("copy_beyond_shared", r"shared memory at 512: 16 bytes out of bounds \(1 threads\)"),
        ("copy_misaligned", r"global memory at 8: not aligned to 16 bytes \(32 threads\)"),
        (
            "copy_misaligned_in_shared",
            r"shared memory at 8: not aligned to 16 bytes \(16 threads\)",
        ),
        ("copy_read_too_early", "shared memory at 0: read before it is written"),
        ("copy_read_by_another", "race: thread 0 touches what thread 31 has written"),
        ("copy_awaited_too_late", "race: thread 0 touches what thread 31 has written"),
    ],
)
def test_fault_of_a_sum_or_copy_is_seen_at_its_line(name, message, products):
    with pytest.raises(Fault, match=message) as fault:
        run_product(products[name], *np.zeros((3, 32, 4), np.uint32))
    (line,) = lines_of_fault(name, PRODUCTS)
    assert line in str(fault.value)


def test_copies_must_be_there_at_the_end(products):
    with pytest.raises(Fault, match="before 32 copies are there"):
        run_product(products["copy_never_awaited"], *np.zeros((3, 32, 4), np.uint32))


def test_cost_of_copies(products):
    """As of loads and stores of 16 bytes; where nothing is read, as of stores alone."""
    registers = np.zeros((3, 32, 4), np.uint32)
    reads = np.arange(32, dtype=np.uint32)[:, None] % 4 // 3
    entry, counts = products["copy"], Counts()
    run_product(entry, registers[0], reads, registers[2], counts=counts)
    costs = {opcode: cost for (opcode, _), cost in counts.by_line(entry).items()}
    assert costs["cp.shared"] == Cost(threads=32, requests=1, pieces=4, fewest=4, merged=4)
    assert costs["cp.global"] == Cost(threads=8, requests=1, pieces=8, fewest=4, merged=8)


def permuted(pair, selector: int) -> bytes:
    """The four bytes of eight that a selector names; 8 more of a name asks for the sign alone."""
    names = [selector >> 4 * i & 15 for i in range(4)]
    chosen = [(name & 8, pair.tobytes()[name & 7]) for name in names]
    return bytes(255 * (byte >> 7) if sign else byte for sign, byte in chosen)


def test_packing_of_numbers_of_16_bits(products):
    generator = np.random.default_rng(0)
    floats = generator.standard_normal((32, 2)).astype(np.float32)
    floats[0], floats[1], floats[2] = (np.inf, -np.inf), (1e5, -1e5), (1e-6, 0)
    selector = generator.integers(0, 1 << 16, (32, 1)).astype(np.uint32)
    selector[:8, 0] = 0, 1, 16, 31, 32, 33, 63, 64
    result = np.zeros((32, 5), np.uint32)
    run_product(products["packing"], floats.view(np.uint32), selector, result)
    pairs = torch.from_numpy(floats)
    for i, half in enumerate((torch.float16, torch.bfloat16)):
        assert result[:, i].tobytes() == pairs.to(half).view(torch.int16).numpy().tobytes()
    for (_, _, *actual), pair, n in zip(result, floats, selector[:, 0].tolist(), strict=True):
        low, high = (int(bits) for bits in pair.view(np.uint32))
        wide = high << 32 | low
        expected = [wide << n % 32 >> 32, wide >> min(n, 32)]
        assert actual[0].tobytes() == permuted(pair, n)
        assert actual[1:] == [bits & 0xFFFFFFFF for bits in expected]


def words_of(pairs: torch.Tensor) -> np.ndarray:
    return pairs.view(torch.int32).numpy().view(np.uint32)


def test_products_of_pairs(products):
    """Of bfloat16: torch's, -0 too."""
    a, b = torch.randn(2, 32, 2).bfloat16()
    nan, inf = float("nan"), float("inf")
    strange = [(0, -1), (-0.0, 1), (nan, 1), (inf, 0), (inf, -1), (3e38, 3e38), (1e-30, 1e-9)]
    strange += [(1e-20, 1e-20), (1e-20, 1.5e-20), (1e-30, 1e-30)]
    a[:5], b[:5] = torch.tensor(strange).bfloat16().reshape(5, 2, 2).unbind(2)
    result = np.zeros((32, 1), np.uint32)
    run_product(products["pairs"], np.hstack([words_of(a), words_of(b)]), words_of(a), result)
    product = torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    expected = a * b
    torch.testing.assert_close(product, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert product.signbit()[numbers].equal(expected.signbit()[numbers])


@pytest.mark.parametrize(
    "name, dtype, factors, expected",
    [
        ("bfloat16", torch.bfloat16, [(129, 127), (3, 3)], [386, 382]),
        ("half", torch.float16, [(683, 683), (3, 3)], [2050, 2048]),
    ],
)
def test_sums_of_pairs(name, dtype, factors, expected, products):
    """Rounded once, also halfway between two but for what float has no room for."""
    check_pairs(lambda kernel, *registers: run_product(products[kernel], *registers), name)
    a, b = (torch.tensor([numbers] * 32, dtype=dtype) for numbers in factors)
    c = torch.tensor([(2**-14, -(2**-14))] * 32, dtype=dtype)
    if name == "bfloat16":
        c.mul_(2**-6).neg_()
    result = np.zeros((32, 1), np.uint32)
    factors = np.hstack([words_of(a), words_of(b)])
    run_product(products[f"sums_{name}"], factors, words_of(c), result)
    assert torch.from_numpy(result.view(np.int16)).view(dtype)[0].tolist() == expected


def test_doubled(products):
    check_doubled(lambda name, *registers: run_product(products[name], *registers))

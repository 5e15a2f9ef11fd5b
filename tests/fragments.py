"""What the kernels of products.cu must do with a warp's registers.

Matrices there, as the PTX ISA lays them out ("Matrix Fragments for
mma.m16n8k16 with floating point type", and movmatrix).
"""

from collections.abc import Callable

import numpy as np

WARPS = 3
_LANE = np.arange(32)[:, None]
_GROUP, _IN_GROUP = _LANE >> 2, _LANE % 4


def _a_places():
    i = np.arange(8)
    row = np.where((i < 2) | ((4 <= i) & (i < 6)), _GROUP, _GROUP + 8)
    return row, _IN_GROUP * 2 + (i & 1) + np.where(i >= 4, 8, 0)


def _b_places():
    i = np.arange(4)
    return _IN_GROUP * 2 + (i & 1) + np.where(i >= 2, 8, 0), _GROUP + 0 * i


def _d_places():
    i = np.arange(4)
    return np.where(i < 2, _GROUP, _GROUP + 8), _IN_GROUP * 2 + (i & 1)


def _rows_places():
    return _GROUP, _IN_GROUP * 2 + np.arange(2)


def _packed(bits: np.ndarray, places) -> np.ndarray:
    """Registers [thread, i], with two elements of a warp's matrix each, the first one below."""
    return _fragments(bits, places).view("<u4")


def _fragments(matrices: np.ndarray, places) -> np.ndarray:
    """[thread, i] of one matrix per warp."""
    return np.concatenate([matrix[places] for matrix in matrices])


def _halves(generator, shape, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers of 16 bits: their bits, and their values."""
    x = generator.standard_normal(shape).astype(np.float32)
    if name == "half":
        return x.astype(np.float16).view(np.uint16), x.astype(np.float16).astype(np.float64)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits, _wide(bits).astype(np.float64)


def _wide(bits: np.ndarray) -> np.ndarray:
    """Of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def check_product(run: Callable, name: str):
    """``run(kernel, a, b, d)`` runs one of products.cu on registers [thread, i], in place."""
    generator = np.random.default_rng(0)
    (a_bits, a), (b_bits, b) = (
        _halves(generator, s, name) for s in ((WARPS, 16, 16), (WARPS, 16, 8))
    )
    c = generator.standard_normal((WARPS, 16, 8)).astype(np.float32)
    d = _fragments(c, _d_places())
    run(f"product_{name}", _packed(a_bits, _a_places()), _packed(b_bits, _b_places()), d)
    np.testing.assert_allclose(d, _fragments(c + a @ b, _d_places()), rtol=1e-5, atol=1e-5)


def check_transpose(run: Callable):
    numbers = np.random.default_rng(0).permutation(1 << 16)[: WARPS * 64]
    matrices = numbers.astype(np.uint16).reshape(WARPS, 8, 8)
    columns = np.zeros((WARPS * 32, 1), np.uint32)
    rows = _packed(matrices, _rows_places())
    run("transpose", rows, rows, columns)
    np.testing.assert_array_equal(columns, _packed(matrices.transpose(0, 2, 1), _rows_places()))


def check_pairs(run: Callable, name: str):
    """Products of pairs of numbers, and a summand: within one rounding."""
    generator = np.random.default_rng(0)
    (ab_bits, ab), (c_bits, c) = (_halves(generator, (WARPS * 32, n), name) for n in (4, 2))
    out = np.zeros((WARPS * 32, 1), np.uint32)
    run(f"sums_{name}", ab_bits.view("<u4"), c_bits.view("<u4"), out)
    expected = ab[:, :2] * ab[:, 2:] + c
    bits = out.view(np.uint16)
    sums = bits.view(np.float16) if name == "half" else _wide(bits)
    rounding = 2.0**-11 if name == "half" else 2.0**-8
    np.testing.assert_allclose(sums.astype(np.float64), expected, rtol=rounding, atol=1e-5)


def check_doubled(run: Callable):
    pairs = np.random.default_rng(0).integers(0, 1 << 16, (WARPS * 32, 2)).astype(np.uint16)
    out = np.zeros((WARPS * 32, 1), np.uint32)
    run("doubled", pairs.view("<u4"), pairs.view("<u4"), out)
    which = np.arange(WARPS * 32)[:, None] % 2
    expected = np.take_along_axis(pairs, which, 1).repeat(2, 1)
    np.testing.assert_array_equal(out.view(np.uint16), expected)


def check_sum(run: Callable):
    """Of whole numbers: exact in any order."""
    generator = np.random.default_rng(0)
    vectors = generator.integers(-8, 9, (WARPS * 32, 4)).astype(np.float32)
    to = generator.integers(0, 5, (WARPS * 32, 1)).astype(np.uint32)
    sums = np.ones_like(vectors)
    expected = sums.copy()
    np.add.at(expected, to[:, 0], vectors)
    run("sum", vectors.view(np.uint32), to, sums)
    np.testing.assert_array_equal(sums, expected)


def check_copy(run: Callable):
    generator = np.random.default_rng(0)
    shape = (WARPS * 32, 4)
    source, out = generator.integers(1, 1 << 32, shape).astype(np.uint32), np.ones(shape, np.uint32)
    reads = generator.integers(0, 2, (WARPS * 32, 1)).astype(np.uint32)
    run("copy", source, reads, out)
    copied = (source * reads).reshape(WARPS, 32, 4)
    np.testing.assert_array_equal(out, copied[:, ::-1].reshape(shape))

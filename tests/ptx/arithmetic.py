"""What the instructions of PTX compute, on arrays with one element per thread.

Not the hardware's arithmetic to the last bit: fma.f32, fma.f16x2 and fma.bf16x2 are rounded twice
(to double, then to their type), and fma.f64 goes through long double. Everything else is exact or
IEEE's; so is fma.bf16x2 where it multiplies (c is -0), as products of bfloat16 are exact in double.
"""

import numpy as np

from .parser import TYPES

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    **{
        f"{name}u": lambda a, b, f=f: f(a, b) | np.isnan(a) | np.isnan(b)
        for name, f in [("eq", np.equal), ("ne", np.not_equal), ("lt", np.less),
                        ("le", np.less_equal), ("gt", np.greater), ("ge", np.greater_equal)]
    },
}  # fmt: skip


def _compare(name: str, dtype):
    if name == "ne" and dtype.kind == "f":  # ordered: false for NaN
        return lambda a, b: (a < b) | (a > b)
    return _COMPARE[name]


def _wider(dtype):
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def _fma(a, b, c):
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _shift(function):
    def shift(a, n):
        bits = 8 * a.dtype.itemsize
        if isinstance(n, np.generic) and n < bits:
            return function(a, a.dtype.type(n))
        # Too far is as far as it goes: to zero, or to the sign.
        most = np.minimum(n, bits - 1).astype(a.dtype)
        shifted = function(a, most)
        return shifted if a.dtype.kind == "i" else np.where(n < bits, shifted, a.dtype.type(0))

    return shift


def _divide(a, b, remainder: bool):
    if a.dtype.kind == "f":
        return a / b
    quotient = np.floor_divide(a, np.where(b == 0, 1, b).astype(a.dtype))
    rest = a - quotient * b
    if a.dtype.kind == "i":  # towards zero
        quotient = quotient + ((rest != 0) & ((a < 0) != (b < 0)))
        rest = a - quotient * b
    return rest if remainder else quotient


def _bit_insert(a, b, position, length):
    ones = (np.uint64(1) << np.minimum(length, 32).astype(np.uint64)) - np.uint64(1)
    mask = (ones << np.minimum(position, 32).astype(np.uint64)).astype(np.uint32)
    return (b & ~mask) | ((a << position) & mask)


def _permute(a, b, selector):
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint64(0)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)).astype(np.uint64)
        byte = both >> ((choice & np.uint64(7)) * np.uint64(8)) & np.uint64(0xFF)
        sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
        byte = np.where(choice & np.uint64(8), sign, byte)
        result = result | byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def _funnel_shift(left: bool, wrap: bool):
    def shift(lower, upper, n):
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = lower.astype(np.uint64) | upper.astype(np.uint64) << np.uint64(32)
        shifted = both << n >> np.uint64(32) if left else both >> n
        return shifted.astype(np.uint32)

    return shift


def _convert_two(target: str, rounding: set[str]):
    """cvt to f16x2 or bf16x2: the first operand goes to the upper half."""
    narrow = convert("f32", target, rounding)

    def converted(upper, lower):
        low, high = (narrow(a).view(np.uint16).astype(np.uint32) for a in (lower, upper))
        return high << np.uint32(16) | low

    return converted


def _halves(pairs, half: str):
    """The lower and the upper of two numbers in a register, in double."""
    widen = convert(half, "f32", set())
    for shift in np.uint32(0), np.uint32(16):
        bits = (pairs >> shift).astype(np.uint16)
        yield widen(bits.view(TYPES[half])).astype(np.float64)


def _rounded_to_odd(a):
    """Of double in float: towards zero, and the last bit set if that is inexact.

    So that rounding to less than that once more is as rounding once.
    """
    near = a.astype(np.float32)
    bits = near.view(np.uint32)
    beyond = (np.abs(near.astype(np.float64)) > np.abs(a)).astype(np.uint32)
    odd = (bits - beyond | np.uint32(1)).view(np.float32)
    return np.where((near == a) | np.isnan(a), near, odd)


def _fma_two(half: str):
    """Of two numbers of 16 bits in a register each."""
    join = _convert_two(half, {"rn"})

    def fma(*registers):
        factors = zip(*(_halves(pairs, half) for pairs in registers), strict=True)
        low, high = (_rounded_to_odd(a * b + c) for a, b, c in factors)
        return join(high, low)

    return fma


def convert(source: str, target: str, rounding: set[str]):
    """cvt: a function from values of `source`'s stored type to `target`'s."""

    def converted(a):
        if source == "bf16":
            a = (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if target == "bf16":
            bits = a.astype(np.float32).view(np.uint32)
            even = (bits >> np.uint32(16)) & np.uint32(1)
            rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
            return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)
        if target == "f16":
            half = a.astype(np.float16).view(np.uint16)
            return np.where(np.isnan(a), np.uint16(0x7FFF), half).view(np.float16)
        to = TYPES[target]
        if a.dtype.kind == "f" and to.kind in "iu":
            limits = np.iinfo(to)
            whole = np.trunc(np.nan_to_num(a.astype(np.float64), nan=0.0))
            return np.clip(whole, limits.min, limits.max).astype(to)
        return a.astype(to)

    from_float = source in ("f16", "bf16", "f32", "f64")
    to_float = target in ("f16", "bf16", "f32", "f64")
    wanted = set()
    if from_float and not to_float:
        wanted = {"rzi"}
        if target in ("s64", "u64"):
            raise NotImplementedError("cvt from floating point to 64 bits")
    elif to_float and rounding:
        wanted = {"rn"}
    if rounding != wanted:
        raise NotImplementedError(f"cvt with {rounding}")
    return converted


def arithmetic(opcode: str, parts: list[str], dtype):
    """What an instruction computes: function, dtypes of its sources, dtype of its result."""
    name = parts[0]
    if opcode in ("fma.rn.bf16x2", "fma.rn.f16x2"):
        return _fma_two(parts[-1].removesuffix("x2")), [dtype] * 3, dtype
    floating = dtype.kind == "f"
    word, truth = TYPES["u32"], TYPES["pred"]
    if name in ("add", "sub", "mul", "fma", "div") and floating and parts[1:-1] not in ([], ["rn"]):
        raise NotImplementedError(opcode)
    if name in ("mul", "mad") and not floating:
        sources = [dtype] * (2 if name == "mul" else 3)
        if parts[1] == "lo":
            return (np.multiply if name == "mul" else lambda a, b, c: a * b + c), sources, dtype
        wide = _wider(dtype) if dtype.itemsize < 8 else None
        if wide and parts[1] == "wide":
            sources[2:] = [wide] * (len(sources) - 2)
            return (lambda a, b, *c: sum(c, a.astype(wide) * b.astype(wide))), sources, wide
        if wide and parts[1] == "hi" and name == "mul":
            bits = wide.type(8 * dtype.itemsize)
            high = lambda a, b: ((a.astype(wide) * b.astype(wide)) >> bits).astype(dtype)  # noqa: E731
            return high, sources, dtype
    simple = {
        "add": (np.add, 2), "sub": (np.subtract, 2), "mul": (np.multiply, 2), "fma": (_fma, 3),
        "and": (np.bitwise_and, 2), "or": (np.bitwise_or, 2), "xor": (np.bitwise_xor, 2),
        "not": (np.invert, 1), "neg": (np.negative, 1), "abs": (np.abs, 1),
        "min": (np.fmin if floating else np.minimum, 2),
        "max": (np.fmax if floating else np.maximum, 2),
        "div": (lambda a, b: _divide(a, b, False), 2), "rem": (lambda a, b: _divide(a, b, True), 2),
    }  # fmt: skip
    modifiers = parts[1:-1]
    if name in simple and (floating and name != "rem" or not modifiers):
        if name in ("min", "max", "neg", "abs") and modifiers:
            raise NotImplementedError(opcode)
        function, count = simple[name]
        return function, [dtype] * count, dtype
    if name in ("shl", "shr"):
        return _shift(np.left_shift if name == "shl" else np.right_shift), [dtype, word], dtype
    if name == "bfi" and dtype.itemsize == 4:
        return _bit_insert, [dtype, dtype, word, word], dtype
    if name == "prmt" and len(parts) == 2:
        return _permute, [word, word, word], word
    if name == "shf" and dtype.itemsize == 4:
        return _funnel_shift(parts[1] == "l", parts[2] == "wrap"), [word, word, word], word
    if name == "cvt" and opcode.endswith("f16x2.f32"):
        return _convert_two(parts[-2].removesuffix("x2"), set(parts[1:-2])), [dtype, dtype], word
    if name == "selp":
        return (lambda a, b, p: np.where(p, a, b)), [dtype, dtype, truth], dtype
    if name == "setp":
        compare = _compare(parts[1], dtype)
        if len(parts) == 3:
            return compare, [dtype, dtype], truth
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[parts[2]]
        return (lambda a, b, p: combine(compare(a, b), p)), [dtype, dtype, truth], truth
    raise NotImplementedError(opcode)

"""The registers of threads that run together, and what operands mean to them."""

import re

import numpy as np

from .parser import Entry, Instruction


class Registers:
    """Each register is an array with one element per thread.

    Args:
        special: values of the read-only registers (``%tid.x``) by thread.
        symbols: addresses of what has a name.
    """

    def __init__(self, entry: Entry, n: int, special: dict[str, np.ndarray], symbols: dict):
        self.n, self.special, self.symbols = n, special, symbols
        self.arrays = {name: np.zeros(n, dtype) for name, dtype in entry.registers.items()}

    def read(self, text: str, dtype):
        """An array that stays up to date, or a scalar."""
        dtype = np.dtype(dtype)
        if text in self.special:
            return self.special[text].astype(dtype)
        if text in self.arrays:
            register = self.arrays[text]
            if register.dtype.itemsize >= dtype.itemsize and register.dtype != np.bool_:
                return register.view(dtype)[:: register.dtype.itemsize // dtype.itemsize]
            if register.dtype == dtype:
                return register
            raise NotImplementedError(f"{text} read as {dtype}")
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
            value = np.array([int(match[1] or match[2], 16)], np.uint32 if match[1] else np.uint64)
            return value.view(np.float32 if match[1] else np.float64).astype(dtype)[0]
        if text in self.symbols:
            return dtype.type(self.symbols[text])
        if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+U?", text):
            value = int(text.rstrip("U"), 0)
            if dtype == np.bool_:
                return np.bool_(value)
            bits = value & (2 ** (8 * dtype.itemsize) - 1)
            return np.array([bits], f"u{dtype.itemsize}").view(dtype)[0]
        raise NotImplementedError(f"operand {text}")

    def broadcast(self, text: str, dtype) -> np.ndarray:
        return np.broadcast_to(self.read(text, dtype), self.n)

    def writer(self, text: str, dtype):
        """A function that stores values of a type into a register, extended as needed."""
        register = self.arrays[text]
        dtype = np.dtype(dtype)
        if register.dtype.itemsize == dtype.itemsize:
            target = register.view(dtype)
        else:
            target = register.view(f"{'i' if dtype.kind == 'i' else 'u'}{register.dtype.itemsize}")
        return lambda values, mask: np.copyto(target, values, where=mask, casting="unsafe")

    def address(self, text: str):
        """A function that gives the threads' addresses."""
        base, offset = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text).groups()
        step = int(offset or 0)
        if base in self.arrays:
            register = self.arrays[base]
            register = register.view(f"i{register.dtype.itemsize}")
            return lambda: register.astype(np.int64) + step
        constant = np.full(self.n, self.symbols[base] + step, np.int64)
        return lambda: constant

    def guard(self, instruction: Instruction):
        """A function that gives the threads whose guard holds."""
        register = self.arrays[instruction.guard.lstrip("!")]
        return (lambda: ~register) if instruction.guard[0] == "!" else (lambda: register.copy())

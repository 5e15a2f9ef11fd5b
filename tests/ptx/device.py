"""Runs the PTX of what the host functions launch.

The project's own host code, compiled over tests/emulation, plans each launch: grid, block, shared
memory, arguments. The entry of the same name then runs on the tensors' memory. So the launch is the
project's to the byte, and the code is nvcc's.
"""

import ctypes
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from emulation import plugin

from .build import build_arena, compile_ptx
from .counts import Counts
from .machine import run
from .memory import NOT_OURS, UNWRITTEN, WRITTEN, Memory, Shadow
from .parser import Entry, Module

_POISON = 0xA5  # of arena.cpp
_MOST_TENSORS = 4096
_TYPES = {"f": "float", "d": "double", "N3c108BFloat16E": "bfloat16", "N3c104HalfE": "half"}


def plain_name(mangled: str) -> str:
    """``forward_kernel<float,4,3,4,1,0>`` of its mangled name.

    Two compilers do not mangle a kernel's parameters alike, but these say which kernel it is.
    """
    name, kind, values = re.match(
        r"_ZN2dk4cuda\d+(\w+_kernel)I(f|d|N3c10\d\w+?E)((?:L[ib]\d+E)*)E", mangled
    ).groups()
    arguments = [_TYPES[kind], *re.findall(r"L[ib](\d+)E", values)]
    return f"{name}<{','.join(arguments)}>"


@dataclass
class Launch:
    """One launch as the host code planned it, and what was counted while it ran."""

    name: str
    grid: int
    block: int
    shared_bytes: int
    counts: Counts


class Device:
    """Takes the launches of ``torch.ops.dk_emulated``.

    Args:
        sources: the .cu files whose entries it knows.
    """

    def __init__(self, sources: list[Path]):
        self.sources = sources
        self.arena = ctypes.CDLL(str(build_arena()))
        self.arena.arena_base.restype = ctypes.c_void_p
        self.arena.arena_used.restype = ctypes.c_size_t

    @cached_property
    def entries(self) -> dict[str, tuple[Module, str]]:
        """By plain name: the module of each entry, and its name there."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            modules = [Module(ptx.read_text()) for ptx in pool.map(compile_ptx, self.sources)]
        return {plain_name(name): (module, name) for module in modules for name in module}

    def entry(self, name: str) -> Entry:
        module, mangled = self.entries[name]
        return module[mangled]

    @contextmanager
    def taking(self, *, only=None, counting=False, races=True) -> Iterator[list[Launch]]:
        """While it lasts, launches come here, and tensors live in memory that kernels may touch.

        Args:
            only: which blocks of a Launch to run, a function that returns a range. Default: all.
            races: look for them.

        Raises:
            Fault: at the end, the first that a launch met; those after it are not run.
        """
        launches, errors = [], []

        def take(name, grid, block, shared_bytes, count, args, sizes) -> int:
            launch = Launch(plain_name(name.decode()), grid, block, shared_bytes, Counts())
            launches.append(launch)
            self.arena.arena_switch(0)
            try:
                if not errors:
                    params = [ctypes.string_at(args[i], sizes[i]) for i in range(count)]
                    self._run(launch, params, only, counting, races)
            except BaseException as error:  # must not cross C++
                errors.append(error)
            self.arena.arena_switch(1)
            return 1

        with plugin.launcher(take):
            self.arena.arena_switch(1)
            try:
                yield launches
            finally:
                self.arena.arena_switch(0)
        if errors:
            raise errors[0]

    def planned(self, *arguments) -> list[Launch]:
        """What a call of the operators launches, without running it: plugin.call's arguments."""
        with self.taking(only=lambda launch: range(0)) as launches:
            plugin.call("dk_emulated", *arguments)
        return launches

    def call(self, tensors: dict, case, **options) -> tuple[dict, list[Launch]]:
        """Output and gradients, by PTX, and the launches; fails if an argument was changed."""
        with self.taking(**options) as launches:
            own = {name: None if t is None else t.clone() for name, t in tensors.items()}
            results = plugin.call("dk_emulated", own, case)
            self.arena.arena_switch(0)
            results = {name: t.clone() for name, t in results.items()}
        for name, tensor in tensors.items():
            if tensor is not None:
                same = own[name].nan_to_num(123.0).equal(tensor.nan_to_num(123.0))
                assert same, f"{name} was overwritten"
        return results, launches

    def _run(self, launch, params, only, counting, races):
        blocks = only(launch) if only else range(launch.grid)
        if not blocks:
            return
        entry = self.entry(launch.name)
        memory = self._memory(params, complete=only is None)
        if races:
            narrow = any(i.parts[0] == "st" and i.opcode.endswith("16") for i in entry.code)
            memory.shadow = Shadow(len(memory.data), 2 if narrow else 4)
        shape = launch.grid, launch.block, launch.shared_bytes
        counts = launch.counts if counting else None
        run(entry, *shape, params, memory, counts=counts, only=blocks)

    def _memory(self, params: list[bytes], complete: bool) -> Memory:
        """The arena; only tensors that the arguments point into may be touched.

        Where only some blocks run, the others' results count as written.
        """
        begins, sizes = (ctypes.c_void_p * _MOST_TENSORS)(), (ctypes.c_size_t * _MOST_TENSORS)()
        count = self.arena.arena_tensors(begins, sizes, _MOST_TENSORS)
        base, used = self.arena.arena_base(), self.arena.arena_used()
        data = np.frombuffer((ctypes.c_uint8 * used).from_address(base), np.uint8)
        state = np.full(used, NOT_OURS, np.uint8)
        words = np.frombuffer(b"".join(p[: len(p) // 8 * 8] for p in params), np.uint64)
        for begin, size in zip(begins[:count], sizes[:count], strict=True):
            if ((words >= begin) & (words < begin + size)).any():
                own = slice(begin - base, begin - base + size)
                # Never written: eight bytes of poison. No number of a test looks like that.
                poison = np.append(data[own] == _POISON, np.ones(-size % 8, np.bool_))
                unwritten = complete & np.repeat(poison.reshape(-1, 8).all(1), 8)[:size]
                state[own] = np.where(unwritten, UNWRITTEN, WRITTEN)
        return Memory("global", data, state, base)

"""Checked memory: bounds, alignment, unwritten bytes, and races."""

from dataclasses import dataclass

import numpy as np

from .parser import TYPES

WARP = 32
NOT_OURS, UNWRITTEN, WRITTEN, COMING = 0, 1, 2, 3  # the states of a byte; COMING: copies.py


class Fault(Exception):
    """What a kernel must not do."""


@dataclass
class Threads:
    """Those that run together: whole blocks."""

    block_size: int
    number: np.ndarray  # in the grid
    block_time: np.ndarray  # barriers that its block has passed
    warp_time: np.ndarray  # barriers that its warp has passed


class Memory:
    """Bytes at `base`; `state` has what may be done with each. Multiples of eight bytes."""

    def __init__(self, name: str, data: np.ndarray, state: np.ndarray, base: int = 0):
        self.name, self.data, self.state, self.base = name, data, state, base
        self.views = {dtype: data.view(dtype) for dtype in TYPES.values() if dtype != np.bool_}
        self.shadow: Shadow | None = None

    def access(self, address, size: int, threads: Threads, active, kind: str):
        """Offsets into `data` of the active threads' accesses; kind: read, write or atomic."""
        offset = self._locate(address.astype(np.int64) - self.base, size, active)
        self.check_alignment(offset, size)
        word = min(size, 8)
        state = self.state.view(f"u{word}")
        for i in range(0, size, word):
            at = (offset + i) // word
            if kind == "write":
                state[at] = WRITTEN * (2 ** (8 * word) // 255)  # in each byte
            else:
                written = state[at] == WRITTEN * (2 ** (8 * word) // 255)
                self._check(offset, written, "read before it is written")
        if self.shadow:
            self.shadow.access(offset, size, threads, active, kind)
        return offset

    def check_alignment(self, offset, size: int):
        self._check(offset, offset % size == 0, f"not aligned to {size} bytes")

    def _locate(self, offset, size: int, active):
        inside = (offset >= 0) & (offset + size <= len(self.data))
        for i in (0, size - 1):
            inside &= self.state[np.where(inside, offset + i, 0)] != NOT_OURS
        self._check(offset, inside, f"{size} bytes out of bounds")
        return offset

    def _check(self, offset, good, what: str):
        if not good.all():
            where = int(offset[np.argmin(good)])
            raise Fault(f"{self.name} memory at {where}: {what} ({(~good).sum()} threads)")


class SharedMemory(Memory):
    """Of `blocks` blocks, one after the other; an address counts from the start of its block's."""

    def __init__(self, blocks: int, block_size: int, size: int):
        stride = (size + 127) // 128 * 128 + 128
        state = np.full((blocks, stride), NOT_OURS, np.uint8)
        state[:, :size] = UNWRITTEN
        super().__init__("shared", np.full(state.size, 0xFF, np.uint8), state.ravel())
        self.size = size
        self.begin = np.repeat(np.arange(blocks) * stride, block_size)  # of each thread's block

    def _locate(self, offset, size: int, active):
        inside = (offset >= 0) & (offset + size <= self.size)
        self._check(offset, inside, f"{size} bytes out of bounds")
        return offset + self.begin[active]


class Shadow:
    """Who touched which piece of memory last, and when: finds races by happens-before.

    Two accesses of one piece by two threads, one of them a write, are a race unless a barrier of
    their block (or, within a warp, of the warp) lies between them or both are atomic. No order of
    threads is tried; none needs to be. In the tables of readers, -1 is nobody and -2 several.
    """

    def __init__(self, size: int, piece: int):
        self.piece = piece
        count = size // piece + 1
        self.writer = np.full(count, -1, np.int32)
        self.reader, self.reader_warp, self.reader_block = np.full((3, count), -1, np.int32)
        # Barriers that (the block, the warp) had passed.
        self.write_time, self.read_time = np.zeros((2, 2, count), np.int32)
        self.atomic = np.zeros(count, np.bool_)

    def access(self, offset, size: int, threads: Threads, active, kind: str):
        pieces = max(1, size // self.piece)
        at = (offset[:, None] // self.piece + np.arange(pieces)).ravel()
        thread = np.repeat(threads.number[active], pieces)
        warp, block = thread // WARP, thread // threads.block_size
        times = (threads.block_time, threads.warp_time)
        time = np.stack([np.repeat(t[active], pieces) for t in times])

        def past(other_block, other_warp, when):
            """Whether a barrier lies between then and now."""
            passed = (when[0] != time[0]) | ((other_warp == warp) & (when[1] != time[1]))
            return (other_block == block) & passed

        writer = self.writer[at]
        good = (writer == -1) | (writer == thread) | ((kind == "atomic") & self.atomic[at])
        good |= past(writer // threads.block_size, writer // WARP, self.write_time[:, at])
        self._check(good, "written", writer, thread)
        reader, reader_block = self.reader[at], self.reader_block[at]
        read_past = past(reader_block, self.reader_warp[at], self.read_time[:, at])
        if kind == "read":
            self._add_readers(at, (thread, warp, block), read_past & (reader_block != -2))
            self.read_time[:, at] = time
            return
        self._check((reader == -1) | (reader == thread) | read_past, "read", reader, thread)
        self.writer[at] = thread
        if kind == "write":
            self._check(self.writer[at] == thread, "written at once", self.writer[at], thread)
        self.atomic[at] = kind == "atomic"
        self.write_time[:, at] = time

    def _add_readers(self, at, readers, forget):
        tables = (self.reader, self.reader_warp, self.reader_block)
        for table, new in zip(tables, readers, strict=True):
            old = table[at]
            table[at] = np.where((old == -1) | (old == new) | forget, new, -2)
        for table, new in zip(tables, readers, strict=True):  # threads of this very instruction
            table[at[(table[at] != new) & (table[at] != -2)]] = -2

    @staticmethod
    def _check(good, what: str, other, thread):
        if not good.all():
            i = int(np.argmin(good))
            others = f"thread {other[i]} has" if other[i] >= 0 else "several threads have"
            raise Fault(f"race: thread {thread[i]} touches what {others} {what}")

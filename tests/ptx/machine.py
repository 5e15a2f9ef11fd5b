"""Runs the threads of a launch: every register is an array with one element per thread.

Threads at the lowest instruction go first, all of them at once, across warps and blocks; so threads
that part at a branch meet again where their paths do. What a kernel must not do is a `Fault` that
names the source line; what the machine does not know stops it with NotImplementedError: local and
constant memory, calls, textures, named barriers, barriers and shuffles of part of a warp, and any
instruction that the kernels do not use.
"""

import numpy as np

from .counts import Counts
from .decode import MEMORY, Decoder
from .memory import WARP, WRITTEN, Fault, Memory, Shadow, SharedMemory, Threads
from .parser import Entry
from .registers import Registers

_STOPS = ("bra", "ret", "exit", "bar", "barrier", "shfl")
_MOST_STEPS = 200_000  # stretches of code between labels, branches and barriers
_MOST_THREADS = 8192  # at a time


def run(
    entry: Entry,
    grid: int,
    block: int,
    shared_bytes: int,
    params: list[bytes],
    memory: Memory,
    *,
    counts: Counts | None = None,
    only: range | None = None,
) -> None:
    """Runs a launch, or only some of its blocks, on global memory.

    Races are looked for if the memory has a shadow.
    """
    if block > entry.most_threads or block % WARP:
        raise Fault(f"{entry.name}: {block} threads per block, made for {entry.most_threads}")
    blocks = only or range(grid)
    together = max(1, _MOST_THREADS // block)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), together):
            some = blocks[first : first + together]
            _Machine(entry, some, grid, block, shared_bytes, params, memory, counts).run()


class _Machine:
    """Some blocks of a launch, from start to end."""

    def __init__(self, entry, blocks, grid, block_size, shared_bytes, params, memory, counts):
        self.entry, self.counts = entry, counts
        self.blocks, self.block_size = len(blocks), block_size
        n = self.n = len(blocks) * block_size
        thread = np.arange(block_size, dtype=np.int32)
        number = np.add.outer(np.array(blocks, np.int32) * block_size, thread).ravel()
        self.threads = Threads(block_size, number, *np.zeros((2, n), np.int32))
        parameters, symbols = _lay_out(entry, params)
        symbols[entry.shared] = 0
        shared = SharedMemory(len(blocks), block_size, shared_bytes)
        if memory.shadow:
            shared.shadow = Shadow(len(shared.data), memory.shadow.piece)
        memories = {"param": parameters, "global": memory, "shared": shared}
        self.registers = Registers(entry, n, _special(number, block_size, grid), symbols)
        self.decoder = Decoder(entry, self.registers, memories, self.threads, counts)
        self.actions = {}
        # Plain instructions run in one go up to the next stop or label.
        stops = [i for i, plain in enumerate(entry.code) if plain.parts[0] in _STOPS]
        self.starts = {0, *entry.labels.values(), *stops, *(i + 1 for i in stops)}
        self.nobody = np.zeros(n, np.bool_)
        self.exited, self.at_barrier = self.nobody.copy(), self.nobody.copy()
        self.barrier_number = np.full(n, -1)
        self.at_warp_stop: dict[int, np.ndarray] = {}
        self.groups = {0: ~self.nobody}  # threads by the instruction that they come to next

    def run(self):
        for _ in range(_MOST_STEPS):
            if not self.groups:
                break
            number = min(self.groups)
            try:
                self._advance(number, self.groups.pop(number))
            except Fault as fault:
                instruction = self.entry.code[min(self.current, len(self.entry.code) - 1)]
                raise Fault(f"{instruction.where}: {instruction} {fault}") from None
        else:
            raise Fault(f"{self.entry.code[min(self.groups)].where}: never ends")
        if not self.exited.all():
            waiting = {*self.barrier_number[self.at_barrier].tolist(), *self.at_warp_stop}
            lines = ", ".join(self.entry.code[i].where for i in sorted(waiting))
            raise Fault(f"{lines}: {(~self.exited).sum()} threads wait for others in vain")

    def _go(self, number, mask):
        if mask.any():
            self.groups[number] = self.groups.get(number, self.nobody) | mask

    def _advance(self, number, mask):
        """Up to the next label or stop, or over a stop."""
        code = self.entry.code
        where = True if mask.all() else mask
        while True:
            self.current = number
            parts = code[number].parts if number < len(code) else ["ret"]
            if self.counts:
                self.counts.warps[number] += int(mask.reshape(-1, WARP).any(1).sum())
            if parts[0] in _STOPS:
                return self._stop(number, parts, mask)
            if number not in self.actions:
                self.actions[number] = self.decoder.decode(number)
            # Accesses count threads: they want the mask itself.
            self.actions[number](mask if parts[0] in MEMORY else where)
            number += 1
            if number in self.starts:
                return self._go(number, mask)

    def _stop(self, number, parts, mask):
        if parts[0] in ("ret", "exit") and (
            number >= len(self.entry.code) or not self.entry.code[number].guard
        ):
            self.decoder.copies.check_returning(mask)
            self.exited |= mask
            return
        instruction = self.entry.code[number]
        if parts[0] == "bra":
            if instruction.guard:
                taken = mask & self.registers.guard(instruction)()
                self._go(number + 1, mask & ~taken)
                mask = taken
            self._go(self.entry.labels[instruction.operands[0]], mask)
        elif instruction.guard:
            raise NotImplementedError(str(instruction))
        elif parts[:3] == ["bar", "warp", "sync"] or parts[0] == "shfl":
            self._warp_stop(number, instruction, mask)
        elif parts == ["bar", "sync"] and instruction.operands == ("0",):
            self._block_barrier(number, mask)
        else:
            raise NotImplementedError(str(instruction))

    def _block_barrier(self, number, mask):
        self.at_barrier |= mask
        self.barrier_number[mask] = number
        numbers = self.barrier_number.reshape(self.blocks, -1)
        together = self.at_barrier.reshape(self.blocks, -1) & (numbers == numbers[:, :1])
        ready = np.repeat(together.all(1), self.block_size)
        self.at_barrier &= ~ready
        self.threads.block_time += ready
        self._go(number + 1, ready)

    def _warp_stop(self, number, instruction, mask):
        members = self.registers.broadcast(instruction.operands[-1], np.uint32)
        if (members[mask] != 0xFFFFFFFF).any():
            raise NotImplementedError(f"{instruction} of part of a warp")
        waiting = self.at_warp_stop.pop(number, self.nobody) | mask
        ready = np.repeat(waiting.reshape(-1, WARP).all(1), WARP)
        if (waiting & ~ready).any():
            self.at_warp_stop[number] = waiting & ~ready
        if instruction.parts[0] == "shfl":
            self._shuffle(instruction, ready)
        else:
            self.threads.warp_time += ready
        self._go(number + 1, ready)

    def _shuffle(self, instruction, mask):
        if instruction.opcode != "shfl.sync.bfly.b32":
            raise NotImplementedError(instruction.opcode)
        target, valid = [*instruction.operands[0].split("|"), None][:2]
        value, distance, clamp = (
            self.registers.broadcast(text, np.uint32) for text in instruction.operands[1:4]
        )
        lane = np.arange(self.n) % WARP
        segment = (clamp >> 8) & 31
        most = (lane & segment) | (clamp & 31 & ~segment)
        other = lane ^ (distance & 31)
        inside = other <= most
        source = np.arange(self.n) - lane + np.where(inside, other, lane)
        self.registers.writer(target, np.uint32)(value[source], mask)
        if valid:
            self.registers.writer(valid, np.bool_)(inside, mask)


def _special(number, block_size: int, grid: int) -> dict[str, np.ndarray]:
    special = {
        "%tid.x": number % block_size,
        "%ctaid.x": number // block_size,
        "%ntid.x": np.full_like(number, block_size),
        "%nctaid.x": np.full_like(number, grid),
        "%laneid": number % WARP,
    }
    nought = np.zeros_like(number)
    return special | {f"%{name}.{axis}": nought for name in ("tid", "ctaid") for axis in "yz"}


def _lay_out(entry: Entry, params: list[bytes]) -> tuple[Memory, dict[str, int]]:
    """The parameters as memory, and where each begins."""
    symbols, data = {}, bytearray()
    for (name, size), value in zip(entry.params, params, strict=True):
        if size != len(value):
            raise Fault(f"{entry.name}: {name} has {size} bytes, the launch gives {len(value)}")
        symbols[name] = len(data)
        data += value + bytes(-len(value) % 16)
    state = np.full(len(data), WRITTEN, np.uint8)
    return Memory("param", np.frombuffer(data, np.uint8), state), symbols

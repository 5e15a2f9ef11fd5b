"""Makes of each instruction that is neither branch nor barrier a function of the active threads."""

import re
from collections.abc import Callable

import numpy as np

from . import matrices
from .arithmetic import arithmetic, convert
from .copies import BYTES, Copies
from .counts import Counts, cost_of
from .memory import WARP, Fault, Memory, Threads
from .parser import TYPES, Entry
from .registers import Registers

MEMORY = ("ld", "st", "atom", "red", "cp")
# Of a mask of the active threads; but for accesses to memory, True stands for all of them.
Action = Callable[[np.ndarray | bool], None]
_PRODUCT = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32")
_TRANSPOSE = "movmatrix.sync.aligned.m8n8.trans.b16"


def _names(operand: str) -> list[str]:
    """Of a register, or of a vector of them in braces; numbers as they are written."""
    return re.findall(r"[%\w-]+", operand)


class Decoder:
    """Of the instructions of an entry, for threads that run together.

    Args:
        memories: param, global and shared.
    """

    def __init__(
        self,
        entry: Entry,
        registers: Registers,
        memories: dict[str, Memory],
        threads: Threads,
        counts: Counts | None,
    ):
        self.entry, self.registers, self.memories = entry, registers, memories
        self.threads, self.counts = threads, counts
        self.copies = Copies(memories["global"], memories["shared"], threads)

    def decode(self, number: int) -> Action:
        instruction = self.entry.code[number]
        parts, operands = instruction.parts, instruction.operands
        if parts[0] == "cp":
            action = self._copy(number, instruction.opcode, operands)
        elif parts[0] in MEMORY:
            action = self._memory(number, parts, operands)
        elif parts[0] == "mov" and "{" in "".join(operands):
            action = self._pack(parts, operands)
        elif parts[0] in ("mov", "cvta"):
            dtype = TYPES[parts[-1]]
            action = self._assign(operands, dtype, dtype, lambda value: value)
        elif parts[0] in ("mma", "movmatrix"):
            action = self._matrices(instruction.opcode, operands)
        elif parts[0] == "cvt" and not parts[-2].endswith("x2"):
            target, source = parts[-2:]
            function = convert(source, target, set(parts[1:-2]))
            action = self._assign(operands, TYPES[target], TYPES[source], function)
        else:
            action = self._arithmetic(instruction.opcode, parts, operands)
        if not instruction.guard:
            return action
        guard = self.registers.guard(instruction)
        return lambda mask: action(mask & guard())

    def _assign(self, operands, target, source, function) -> Action:
        value = self.registers.read(operands[1], source)
        write = self.registers.writer(operands[0], target)
        return lambda mask: write(function(value), mask)

    def _arithmetic(self, opcode, parts, operands) -> Action:
        function, sources, result = arithmetic(opcode, parts, TYPES[parts[-1]])
        if len(operands) != len(sources) + 1 or "|" in operands[0]:
            raise NotImplementedError(f"{opcode} {operands}")
        pairs = zip(operands[1:], sources, strict=True)
        values = [self.registers.read(text, dtype) for text, dtype in pairs]
        if isinstance(function, np.ufunc):
            target = self.registers.arrays[operands[0]]
            target = target if target.dtype == result else target.view(result)
            return lambda mask: function(*values, out=target, where=mask)
        write = self.registers.writer(operands[0], result)
        divides = parts[0] in ("div", "rem") and result.kind in "iu"

        def action(mask):
            if divides and (mask & (values[1] == 0)).any():
                raise Fault("division by zero")
            write(function(*values), mask)

        return action

    def _pack(self, parts, operands) -> Action:
        """mov between a register and the parts of it."""
        whole = np.dtype(f"u{TYPES[parts[-1]].itemsize}")
        unpacks = "{" in operands[0]
        pieces = _names(operands[0] if unpacks else operands[1])
        part = np.dtype(f"u{whole.itemsize // len(pieces)}")
        bits = [whole.type(8 * part.itemsize * i) for i in range(len(pieces))]
        if unpacks:
            value = self.registers.read(operands[1], whole)
            writes = [self.registers.writer(p, part) for p in pieces]

            def unpack(mask):
                for write, shift in zip(writes, bits, strict=True):
                    write((value >> shift).astype(part), mask)

            return unpack
        values = [self.registers.read(p, part) for p in pieces]
        write = self.registers.writer(operands[0], whole)

        def pack(mask):
            shifted = (v.astype(whole) << shift for v, shift in zip(values, bits, strict=True))
            write(sum(shifted), mask)

        return pack

    def _matrices(self, opcode, operands) -> Action:
        """What a warp does as one. Only whole warps may: ``.aligned`` waits for no one."""
        if match := _PRODUCT.fullmatch(opcode):
            function = lambda a, b, c: matrices.product(a, b, c, match[1])  # noqa: E731
            types = ["f4", "u4", "u4", "f4"]
        elif opcode == _TRANSPOSE:
            function, types = matrices.transpose, ["u4", "u4"]
        else:
            raise NotImplementedError(opcode)
        vectors = [
            [self.registers.broadcast(name, dtype) for name in _names(operand)]
            for operand, dtype in zip(operands[1:], types[1:], strict=True)
        ]
        writes = [self.registers.writer(name, types[0]) for name in _names(operands[0])]

        def action(mask):
            lanes = np.broadcast_to(mask, self.registers.n).reshape(-1, WARP)
            torn = lanes.any(1) & ~lanes.all(1)
            if torn.any():
                raise Fault(f"by part of a warp ({lanes[torn].sum()} threads)")
            results = function(*(np.stack(vector) for vector in vectors))
            for write, result in zip(writes, results, strict=True):
                write(result, mask)

        return action

    def _copy(self, number, opcode, operands) -> Action:
        """cp.async, of a size and perhaps of how much of that is read, and the wait for it."""
        if opcode == "cp.async.wait_all":
            return self.copies.wait
        if opcode != "cp.async.cg.shared.global" or operands[2] != str(BYTES):
            raise NotImplementedError(f"{opcode} {operands}")
        addresses = [self.registers.address(text) for text in operands[:2]]
        read_bytes = self.registers.broadcast((*operands, str(BYTES))[3], np.uint32)

        def action(mask):
            active = np.flatnonzero(mask)
            if not len(active):
                return
            target, source = (address()[active] for address in addresses)
            sizes = read_bytes[active]
            if self.counts:
                reads = mask & (read_bytes > 0)
                costs = self.counts.costs
                costs[number, "shared"] += cost_of(target, BYTES, mask, "shared")
                costs[number, "global"] += cost_of(source[sizes > 0], BYTES, reads, "global")
            self.copies.start(target, source, sizes, active)

        return action

    def _memory(self, number, parts, operands) -> Action:
        name, dtype = parts[0], TYPES[parts[-1]]
        space = next((p for p in parts if p in self.memories), "")
        vector = int(next((p[1:] for p in parts if re.fullmatch(r"v\d", p)), 1))
        atomic = name in ("atom", "red")
        known = {name, space, f"v{vector}", "add" if atomic else "nc", parts[-1]}
        if not space or set(parts) - known or atomic and (space, "add") != tuple(parts[1:3]):
            raise NotImplementedError(".".join(parts))
        size, memory = dtype.itemsize * vector, self.memories[space]
        kind = "atomic" if atomic else "read" if name == "ld" else "write"
        address = self.registers.address(operands[0 if name in ("st", "red") else 1])
        view = memory.views[dtype]
        if kind == "read":
            transfer = self._loaded(view, operands[0], dtype)
        elif kind == "write":
            transfer = self._stored(view, operands[1], dtype)
        else:
            transfer = self._added(view, operands[-1], operands[0] if name == "atom" else "", dtype)

        def action(mask):
            active = np.flatnonzero(mask)
            if not len(active):
                return
            at = address()[active]
            if self.counts and space != "param":
                self.counts.costs[number, space] += cost_of(at, size, mask, space)
            offset = memory.access(at, size, self.threads, active, kind)
            transfer(offset // dtype.itemsize, active, mask)

        return action

    def _loaded(self, view, targets: str, dtype):
        writes = [self.registers.writer(t, dtype) for t in _names(targets)]

        def transfer(index, active, mask):
            for i, write in enumerate(writes):
                loaded = np.zeros(self.registers.n, dtype)
                loaded[active] = view[index + i]
                write(loaded, mask)

        return transfer

    def _stored(self, view, values: str, dtype):
        sources = [self.registers.broadcast(name, dtype) for name in _names(values)]

        def transfer(index, active, mask):
            for i, source in enumerate(sources):
                view[index + i] = source[active]

        return transfer

    def _added(self, view, values: str, target: str, dtype):
        sources = [self.registers.broadcast(name, dtype) for name in _names(values)]
        before = self._loaded(view, target, dtype)

        def transfer(index, active, mask):
            before(index, active, mask)
            for i, source in enumerate(sources):
                np.add.at(view, index + i, source[active])

        return transfer

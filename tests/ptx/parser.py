"""Reads PTX: entries, their instructions, and the source line that each came from."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

# Types of registers and of memory; bfloat16 is kept as its bits.
TYPES = {"pred": np.bool_, "f16": "f2", "bf16": "u2", "f32": "f4", "f64": "f8"}
TYPES |= {"f16x2": "u4", "bf16x2": "u4"}
for size in (1, 2, 4, 8):
    TYPES |= {f"b{8 * size}": f"u{size}", f"u{8 * size}": f"u{size}", f"s{8 * size}": f"i{size}"}
TYPES = {name: np.dtype(dtype) for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[str, ...]
    guard: str = ""  # "", "%p1" or "!%p1"
    line: str = "?"  # file:line of the source
    caller: str = ""  # file:line that it was inlined into, if it was

    def __str__(self):
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)};"

    @property
    def where(self) -> str:
        return f"{self.line}, inlined at {self.caller}" if self.caller else self.line

    @cached_property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Entry:
    name: str
    params: list[tuple[str, int]]  # names and sizes in bytes
    shared: str = ""  # the name of the dynamic shared memory
    most_threads: int = 1024
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, np.dtype] = field(default_factory=dict)


class Module(Mapping):
    """The entries of a PTX file by mangled name, each read when it is first asked for."""

    def __init__(self, text: str):
        paths = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.MULTILINE)
        self._files = {number: Path(path) for number, path in paths}
        pattern = r"\.entry (\w+)\((.*?)\)\n((?:\.\w+ [\d, ]+\n)*)\{\n(.*?)^\}"
        found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
        self._texts = {name: rest for name, *rest in found}
        shared = re.search(r"^\.extern \.shared .*?(\w+)\[\];", text, re.MULTILINE)
        self._shared = shared[1] if shared else ""
        self._entries: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            self._entries[name] = self._parse(name, *self._texts[name])
        return self._entries[name]

    def _parse(self, name: str, params: str, limits: str, body: str) -> Entry:
        entry = Entry(name, [_parse_param(p) for p in params.split(",") if p.strip()], self._shared)
        if match := re.search(r"\.maxntid (\d+)", limits):
            entry.most_threads = int(match[1])
        place, inlined = ("?", ""), {}
        for statement in re.split(r"[;\n]", re.sub(r"//.*", "", body)):
            statement = statement.strip().lstrip("{}").strip()  # braces around inline assembly
            if match := re.match(r"\.loc\s+(\d+) (\d+)(?:.*inlined_at (\d+) (\d+))?", statement):
                place = self._place(inlined, *match.groups())
            elif match := re.match(r"\.reg \.(\w+)\s+(.+)", statement):
                entry.registers |= _parse_registers(*match.groups())
            elif match := re.match(r"(\$?\w+):$", statement):
                entry.labels[match[1]] = len(entry.code)
            elif statement and not statement.startswith(".pragma"):
                entry.code.append(_parse_instruction(statement, *place))
        return entry

    def _place(self, inlined: dict, file, row, caller, caller_row) -> tuple[str, str]:
        """The innermost line outside of libraries, and that of its caller if it was inlined.

        `inlined` has, by place of a call, where that call was itself inlined.
        """
        inlined[file, row] = (caller, caller_row) if caller else None
        chain = [(file, row)]
        while (above := inlined.get(chain[-1])) and above not in chain:
            chain.append(above)
        lines = [
            f"{self._files[file].name}:{row}"
            for file, row in chain
            if "include" not in self._files[file].parts
        ]
        return lines[0] if lines else "?", lines[1] if lines[1:] else ""


def _parse_registers(kind: str, names: str) -> dict[str, np.dtype]:
    registers = {}
    for declared in names.split(","):
        stem, count = re.match(r"\s*([%\w]+)(?:<(\d+)>)?", declared).groups()
        for name in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
            registers[name] = TYPES[kind]
    return registers


def _parse_param(text: str) -> tuple[str, int]:
    kind, name, count = re.search(r"\.(\w+) (\w+)(?:\[(\d+)\])?\s*$", text).groups()
    return name, TYPES[kind].itemsize * int(count or 1)


def _parse_instruction(text: str, line: str, caller: str) -> Instruction:
    match = re.match(r"(?:@(!?%\w+)\s+)?([\w.]+)\s*(.*)", text, re.DOTALL)
    if not match:
        raise NotImplementedError(f"PTX statement {text!r}")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[3])
    return Instruction(match[2], tuple(operands), match[1] or "", line, caller)

"""Where a small fault can be planted in a source of C++ or Python, and which."""

from __future__ import annotations

import ast
import io
import random
import re
import tokenize
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# What stands there -> what a slip makes of it. Spaces around: in formatted C++ that is an operator
# and no template's or pointer's sign.
ARITHMETIC = {" + ": " - ", " - ": " + ", " * ": " + ", " / ": " * ", " % ": " / ", " += ": " = "}
COMPARISONS = {
    **{" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == "},
    **{" is not None": " is None", " is None": " is not None"},
}
LOGIC = {
    **{
        " && ": " || ",
        " || ": " && ",
        " & ": " | ",
        " | ": " & ",
        " and ": " or ",
        " or ": " and ",
    },
    **{"if not ": "if ", "True": "False", "False": "True", "true": "false", "false": "true"},
}
NUMBERS = {"0": "1", "1": "2", "2": "1", "3": "4", "4": "3", "-1": "1"}
AXES = {"_h": "_w", "_w": "_h", ".h": ".w", ".w": ".h", "height": "width", "width": "height"}
BARRIERS = {"__syncthreads();": ";", "__syncwarp();": ";"}
WIDTHS = {"opmath_t<scalar_t>": "scalar_t", "opmath_t<T>": "T"}
RULES = {
    "arithmetic": ARITHMETIC,
    "comparison": COMPARISONS,
    "logic": LOGIC,
    "number": NUMBERS,
    "axis": AXES,
    "barrier": BARRIERS,
    "width": WIDTHS,
}
# Whole statements that are left out: an assignment, a call, an early end.
_STATEMENT = re.compile(
    r"(?<=[;{}\n ]\n) +(?!__sync)(?:[\w.\[\]]+ [-+*/]?= [^\n]*;|[\w.:<>]+\([^\n]*\);"
    r"|if \([^\n]*\) (?:return|continue);)$",
    re.MULTILINE,
)
_NO_CODE = re.compile(
    r"""//[^\n]*|/\*.*?\*/|^\#[^\n]*|"(?:\\.|[^"\\])*"|template <[^\n]*>|static_assert\([^;]*;"""
    r"""|\b(?:for \(int|operator)\b""",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Fault:
    """``before`` at ``start`` of a file becomes ``after``.

    Attributes:
        path: from the root of the project.
        line: from 1.
        text: the line as it stands.
    """

    path: str
    rule: str
    line: int
    start: int
    before: str
    after: str
    text: str

    def __str__(self):
        change = "left out" if self.rule == "statement" else f"{self.before!r} -> {self.after!r}"
        return f"{self.path}:{self.line}: {change} in: {self.text.strip()}"

    def plant(self, root: Path) -> None:
        file = root / self.path
        source = file.read_text()
        assert source.startswith(self.before, self.start)
        rest = source[self.start + len(self.before) :]
        file.write_text(source[: self.start] + self.after + rest)


def code_only(source: str, suffix: str) -> str:
    """Blanks for comments, strings and types; every character keeps its place."""
    if suffix == ".py":
        return _blank(source, _python_words(source))
    return _blank(source, (match.span() for match in _NO_CODE.finditer(source)))


def _python_words(source: str):
    """Spans of what is no code: comments, strings, annotations, and zip's ``strict=True``."""
    place = _places(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            yield place(*token.start), place(*token.end)
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            if (annotation := getattr(node, name, None)) is not None:
                yield _span(annotation, place)
        if isinstance(node, ast.keyword) and node.arg == "strict":
            yield _span(node, place)


def _python_statements(source: str):
    """Spans of assignments and calls."""
    place = _places(source)
    for node in ast.walk(ast.parse(source)):
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if call or isinstance(node, (ast.Assign, ast.AugAssign)):
            yield _span(node, place)


def _places(source: str):
    """From a line (1, ...) and a column to the place in the text."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return lambda line, column: starts[line - 1] + column


def _span(node, place) -> tuple[int, int]:
    return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)


def _blank(source: str, spans) -> str:
    code = list(source)
    for begin, end in spans:
        code[begin:end] = (c if c == "\n" else " " for c in source[begin:end])
    return "".join(code)


def faults(root: Path, path: str) -> list[Fault]:
    """All that can be planted in one file."""
    source = (root / path).read_text()
    suffix = Path(path).suffix
    code = code_only(source, suffix)
    lines = source.splitlines()

    def fault(rule, start, before, after):
        number = source.count("\n", 0, start) + 1
        return Fault(path, rule, number, start, before, after, lines[number - 1])

    found = []
    for rule, table in RULES.items():
        pattern = "|".join(_whole(before) for before in sorted(table, key=len, reverse=True))
        for match in re.finditer(pattern, code):
            found.append(fault(rule, match.start(), match[0], table[match[0]]))
    if suffix == ".py":
        for begin, end in _python_statements(source):
            found.append(fault("statement", begin, source[begin:end], "pass"))
    else:
        for match in _STATEMENT.finditer(code):
            begin = match.end() - len(match[0].lstrip())
            found.append(fault("statement", begin, source[begin : match.end()], ";"))
    return sorted(found, key=lambda fault: (fault.start, fault.rule))


def _whole(text: str) -> str:
    """A pattern that matches a text, but not as a part of a longer name or number."""
    begins, ends = text[0].isalnum(), text[-1].isalnum()
    return (r"(?<![\w.])" if begins else "") + re.escape(text) + (r"(?![\w.])" if ends else "")


def draw(candidates: list[Fault], count: int, seed: int) -> list[Fault]:
    """Each rule as often as the others, as far as it has places; within it, any place."""
    by_rule = defaultdict(list)
    random.Random(seed).shuffle(candidates := list(candidates))
    for fault in candidates:
        by_rule[fault.rule].append(fault)
    rounds = [
        queue[turn]
        for turn in range(max(map(len, by_rule.values()), default=0))
        for queue in (by_rule[rule] for rule in sorted(by_rule))
        if turn < len(queue)
    ]
    return rounds[:count]

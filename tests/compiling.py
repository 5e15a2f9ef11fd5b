"""Compiles C++ for the tests: each source once, as long as it and what it includes are the same."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = Path(torch.__file__).parent / "lib"

# No -fwrapv: an overflow is an error here. -O0: with all the checks, compiling is what takes time.
SANITIZERS = {
    None: [],
    "address": [
        *("-O0", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    ],
    "thread": ["-fsanitize=thread"],
}
_INCLUDE = re.compile(r'^\s*#\s*include\s+["<]([^">]+)[">]', re.MULTILINE)


class CompilerError(Exception):
    """What the compiler said."""


@dataclass
class Recipe:
    """A shared library to be.

    Attributes:
        includes: folders of headers of ours; those of torch follow them.
        own_flags: of a source, by its name, instead of ``flags``.
    """

    name: str
    sources: list[Path]
    includes: list[Path]
    flags: list[str]
    links: list[str] = field(default_factory=list)
    own_flags: dict[str, list[str]] = field(default_factory=dict)

    @property
    def compiler(self) -> str:
        return os.environ.get("CXX", "g++")

    def build(self, folder: Path) -> Path:
        """The library, compiled into a folder as far as anything changed since.

        Raises:
            CompilerError: a source does not compile.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # tests run in several processes
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: self._object(folder, source), self.sources))
            library = self._link(folder, objects)
            for stale in {*folder.glob("*.o"), *folder.glob("*.so")} - {*objects, library}:
                stale.unlink()
        return library

    def _link(self, folder: Path, objects: list[Path]) -> Path:
        torch_flags = [f"-L{LIBRARIES}", f"-Wl,-rpath,{LIBRARIES}", "-ltorch_cpu"]
        sanitizer = [flag for flag in self.flags if flag.startswith("-fsanitize")]
        command = [self.compiler, "-shared", *sanitizer, *objects, *self.links, *torch_flags]
        library = folder / f"{self.name}-{_key(map(str, command))}.so"
        return self._make(library, command)

    def closure(self, source: Path) -> list[Path]:
        """A source and what it includes of ours, each once."""
        found = [source]
        for path in found:
            for name in _INCLUDE.findall(path.read_text()):
                for folder in (path.parent, *self.includes):
                    header = (folder / name).resolve()
                    if header.is_file():
                        found += [header] * (header not in found)
                        break
        return found

    def _object(self, folder: Path, source: Path) -> Path:
        includes = [f"-I{path}" for path in (*self.includes, *include_paths())]
        flags = [*self.own_flags.get(source.name, self.flags), *includes]
        command = [self.compiler, *flags, "-c", str(source)]
        contents = [path.read_text() for path in self.closure(source)]
        key = _key([torch.__version__, *command, *contents])
        return self._make(folder / f"{source.stem}-{key}.o", command)

    @staticmethod
    def _make(target: Path, command: list) -> Path:
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.tmp")
            result = subprocess.run([*command, "-o", partial], capture_output=True, text=True)
            if result.returncode:
                raise CompilerError(f"{' '.join(map(str, command))} failed:\n{result.stderr}")
            sys.stderr.write(result.stderr)
            partial.rename(target)
        return target


def _key(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

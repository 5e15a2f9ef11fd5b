"""The operators for the CPU, ``dk_detectron._C``, compiled for tests: under sanitizers, with faults.

build.py           compiles csrc/*.cpp and csrc/cpu/*.cpp
checked_vectors.h  vectors are converted number by number, which UBSan then looks at
threads.cpp        torch's parallel_for, by threads that ThreadSanitizer knows
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def use(path: Path) -> None:
    """Puts a library in the place of dk_detectron._C, before anything has imported that."""
    name = "dk_detectron._C"
    assert name not in sys.modules
    spec = spec_from_file_location(name, path)
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

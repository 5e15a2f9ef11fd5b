"""The operators for the CPU, ``dk_detectron._C``, compiled for tests: under sanitizers.

build.py           compiles csrc/*.cpp and csrc/cpu/*.cpp
checked_vectors.h  vectors are converted number by number, which UBSan then looks at
threads.cpp        torch's parallel_for, by threads that ThreadSanitizer knows

With DK_TEST_EXTENSION=LIBRARY, importing this puts that library in the place of dk_detectron._C.
"""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location


def use(path: str) -> None:
    """Before anything has imported the package's own."""
    name = "dk_detectron._C"
    assert name not in sys.modules
    spec = spec_from_file_location(name, path)
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


if "DK_TEST_EXTENSION" in os.environ:
    use(os.environ["DK_TEST_EXTENSION"])

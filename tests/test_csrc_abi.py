"""The extension calls nothing of torch but its stable ABI, and so runs under another torch.

The latter installs that torch, gigabytes with what it needs, so it is on request, by its version:
DK_TEST_OTHER_TORCH=2.10.0.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dk_detectron import _C

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm, of binutils")
def test_no_symbol_outside_the_stable_abi():
    """Neither C++ of libtorch or libc10, nor anything of libtorch_python."""
    command = ["nm", "-D", "--undefined-only", "--demangle", _C.__file__]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    symbols = [line.split(maxsplit=1)[1] for line in lines]
    assert "torch_call_dispatcher" in symbols  # these are the symbols of an extension of torch
    unstable = re.compile(r"\b(at|c10|caffe2|torch)::|^_?THP")
    assert [symbol for symbol in symbols if unstable.search(symbol)] == []


PYTEST = """
import sys, pytest, torch
assert torch.__version__.split("+")[0] == sys.argv[1], torch.__version__
sys.exit(pytest.main(sys.argv[2:]))
"""


def link_for_the_cpu(library: Path) -> None:
    """What `make setup` compiled, but for the kernels of CUDA: another torch may need another."""
    (objects,) = ROOT.glob(f"build/temp.*{sys.implementation.cache_tag}/csrc")
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")]
    names = [objects / path.relative_to(ROOT / "csrc").with_suffix(".o") for path in sources]
    torch_lib = Path(torch.__file__).with_name("lib")
    command = [os.environ.get("CXX", "c++"), "-shared", *names, f"-L{torch_lib}", "-ltorch_cpu"]
    subprocess.run([*command, "-o", library], check=True)


@pytest.mark.skipif(
    "DK_TEST_OTHER_TORCH" not in os.environ, reason="takes minutes: DK_TEST_OTHER_TORCH=2.10.0"
)
def test_the_same_build_runs_under_another_torch(tmp_path):
    version = os.environ["DK_TEST_OTHER_TORCH"]
    package, other = tmp_path / "package", tmp_path / "torch"
    without_ours = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "dk_detectron", package / "dk_detectron", ignore=without_ours)
    link_for_the_cpu(package / "dk_detectron" / Path(_C.__file__).name)

    def python(*arguments, **environment):
        command = [sys.executable, *map(str, arguments)]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | environment)

    try:
        install = "uv", "pip", "install", "-q", "--no-cache", "--python", sys.executable
        python("-m", *install, "--target", other, f"torch=={version}", "torchvision")
        pytest = "-q", "-p", "no:cacheprovider", "-k", "not emulated"
        tests = "tests/test_ops.py", "tests/test_ops_integration.py"
        # PYTHONSAFEPATH: not the package of the current folder.
        paths = os.pathsep.join(map(str, (other, package)))
        python("-c", PYTEST, version, *pytest, *tests, PYTHONPATH=paths, PYTHONSAFEPATH="1")
    finally:
        shutil.rmtree(other, ignore_errors=True)  # gigabytes, which pytest would keep for a while

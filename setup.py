"""Builds the operators, ``dk_detectron._C``; all other metadata is in pyproject.toml.

The kernels for CUDA are built if a GPU is visible and a toolkit is found. The environment decides:
    FORCE_CUDA=1: build them also where no GPU is visible; stop with an error if that fails.
    FORCE_CPU=1: build without them.
    CUDA_HOME: the toolkit to use, instead of that of the nvcc on PATH.
    TORCH_CUDA_ARCH_LIST: the architectures to build for, such as "8.0 9.0+PTX". Default: those of
        the visible GPUs; where none is visible, DEFAULT_ARCHITECTURES.

The operators use torch's stable ABI (csrc/stable.h): what one torch compiled, newer ones load, and
older ones down to 2.10; with kernels for CUDA, those of the same major version of CUDA.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

DEFAULT_ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def csrc(*patterns):
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


CPU_SOURCES = csrc("*.cpp", "cpu/*.cpp")
CUDA_SOURCES = csrc("cuda/*.cpp", "cuda/*.cu")


def enabled(variable):
    return os.environ.get(variable, "0") not in ("", "0")


def import_torch():
    try:
        import torch
    except ModuleNotFoundError as error:
        raise SetupError(
            "dk_detectron is compiled with the headers of torch, and this build sees none: install "
            "torch first, then dk_detectron with `pip install --no-build-isolation`"
        ) from error
    return torch


def find_nvcc():
    """The compiler of CUDA_HOME (or CUDA_PATH), else the one on PATH, else the usual one, or None.

    Raises:
        SetupError: if CUDA_HOME or CUDA_PATH is set, but holds no compiler.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home:
        return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    nvcc = shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        raise SetupError(
            f"expected the CUDA toolkit's bin/nvcc in CUDA_HOME (or CUDA_PATH), {home} has none: "
            "correct the variable, or unset it to use the nvcc on PATH"
        )
    return nvcc


def ask(nvcc, *arguments):
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    return result.stdout + result.stderr


def toolkit_root(nvcc):
    """The folder with the toolkit's include/. It need not be near nvcc, which may be a wrapper."""
    top = re.search(r"^#\$ TOP=(.+)$", ask(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    if top and Path(top[1], "include").is_dir():
        return str(Path(top[1]).resolve())
    return str(Path(nvcc).resolve().parents[1])


def check_cuda_version(nvcc, torch):
    found = re.search(r"release (\d+)\.(\d+)", ask(nvcc, "--version"))
    if found is None:
        raise SetupError(f"{nvcc} --version names no release: point CUDA_HOME at a CUDA toolkit")
    if found[1] != torch.version.cuda.split(".")[0]:
        raise SetupError(
            f"torch {torch.__version__} needs a toolkit of CUDA {torch.version.cuda} (the same "
            f"major version), {nvcc} is of CUDA {found[1]}.{found[2]}: point CUDA_HOME at a "
            "fitting toolkit, install the torch built for this one, or build without CUDA "
            "(FORCE_CPU=1)"
        )


def choose_nvcc(torch):
    """The compiler to build the kernels for CUDA with, or None to build without them."""
    if enabled("FORCE_CUDA") and enabled("FORCE_CPU"):
        raise SetupError("expected FORCE_CUDA=1 or FORCE_CPU=1, got both: unset one of them")
    if enabled("FORCE_CPU"):
        return None
    if torch.version.hip:
        lack = f"torch {torch.__version__} is built for ROCm, for which there are no kernels"
    elif not torch.version.cuda:
        lack = f"torch {torch.__version__} is built without CUDA: install one that is built with it"
    elif not enabled("FORCE_CUDA") and not torch.cuda.is_available():
        lack = "no GPU is visible: set FORCE_CUDA=1 to build for CUDA all the same"
    elif nvcc := find_nvcc():
        check_cuda_version(nvcc, torch)
        return nvcc
    else:
        lack = "no CUDA toolkit was found: put its nvcc on PATH, or set CUDA_HOME"
    if enabled("FORCE_CUDA"):
        raise SetupError(f"FORCE_CUDA=1 asks for CUDA, but {lack}")
    print(f"Building dk_detectron for the CPU only, as {lack}")
    return None


def architecture_flags(nvcc, torch):
    """Empty where torch knows better: by TORCH_CUDA_ARCH_LIST or from the visible GPUs."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available():
        return []
    known = ask(nvcc, "--list-gpu-arch").split()
    archs = [arch for arch in DEFAULT_ARCHITECTURES if f"compute_{arch}" in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def configure(extension, debug):
    """Adds what only torch and the toolkit know: sources, flags, paths and libraries."""
    torch = import_torch()
    nvcc = choose_nvcc(torch)
    if nvcc:
        os.environ["CUDA_HOME"] = toolkit_root(nvcc)  # read when cpp_extension is imported
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # -g0: Python's own flags ask for debug information, which takes longer than the code itself.
    # -fno-math-errno, -fno-trapping-math: as torch itself; without, rounding is not vectorised.
    # No -std: torch sets the one that its headers need.
    cxx_flags = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    cxx_flags += ["-Wno-unknown-pragmas"]
    configured = (CUDAExtension if nvcc else CppExtension)(
        extension.name,
        CPU_SOURCES + (CUDA_SOURCES if nvcc else []),
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args={
            "cxx": [*cxx_flags, "-g" if debug else "-g0"],
            "nvcc": ["-O3", "-lineinfo", *(architecture_flags(nvcc, torch) if nvcc else [])],
        },
        py_limited_api=extension.py_limited_api,
    )
    # Of torch's libraries, those that have the C shim of its stable ABI.
    shims = ["torch_cpu", "torch_cuda", "cudart"]
    configured.libraries = [name for name in configured.libraries if name in shims]
    vars(extension).update(vars(configured))


class BuildOperators(build_ext):
    """Turns into torch's BuildExtension when it runs: until then, no torch is needed."""

    def run(self):
        for extension in self.extensions:
            configure(extension, self.debug)
        from torch.utils.cpp_extension import BuildExtension

        command = BuildExtension(self.distribution)
        # force: ninja decides what is out of date; it knows the headers and flags as well.
        vars(command).update(vars(self), force=True)
        command.run()


class BuildPackage(build_py):
    """Puts configs/ into the package, beside which a clone has it (dk_detectron/model_zoo.py)."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "dk_detectron", "configs")
            shutil.copytree("configs", target, dirs_exist_ok=True)


setup(
    ext_modules=[
        Extension(
            "dk_detectron._C",
            CPU_SOURCES + CUDA_SOURCES,
            depends=csrc("**/*.h", "**/*.cuh"),
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildOperators, "build_py": BuildPackage},
    # The operators are registered with torch's dispatcher: one build serves every Python from 3.10.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

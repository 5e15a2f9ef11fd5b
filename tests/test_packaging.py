"""The wheel and the source distribution, each in an environment and a folder of its own."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from test_engine import OPTIONS, datasets_root, losses  # noqa: F401

from dk_detectron.model_zoo import CONFIGS, paper_rows

ROOT = Path(__file__).parent.parent
# The kernels for CUDA are another stage's, and so is what the compiler makes of the others.
ENVIRONMENT = {**os.environ, "FORCE_CPU": "1", "FORCE_CUDA": "0", "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONPATH", None)


def run(*command, cwd: Path, **environment) -> str:
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout


def copy_sources(folder: Path) -> Path:
    """What a release is made of: no caches, nothing compiled."""
    names = "setup.py pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md CITATION.cff"
    for name in *names.split(), "CONTRIBUTING.md", "Makefile", ".clang-format":
        shutil.copy(ROOT / name, folder / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in "dk_detectron", "csrc", "configs", "tools", "docs", "tests", ".ci":
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def test_make_stays_inside_a_clone_with_a_space_in_its_path(tmp_path):
    clone, neighbour = tmp_path / "a b", tmp_path / "a" / "kept"
    (clone / "csrc").mkdir(parents=True)
    for path in ROOT / "Makefile", *ROOT.glob("requirements*"):
        shutil.copy(path, clone)
    venv.create(clone / ".venv")
    (clone / ".venv" / "bin" / "pip").touch()
    (site,) = clone.glob(".venv/lib/python*/site-packages")
    for path in neighbour, site / "tools" / "hides_ours.py":
        path.parent.mkdir()
        path.touch()
    run("make", ".venv/.detectron2", "PIP=true", "DETECTRON2=any", cwd=clone)
    assert sorted(tmp_path.iterdir()) == [neighbour.parent, clone] and neighbour.is_file()
    assert (site / "dk_detectron.pth").read_text() == f"{clone}\n"
    assert not (site / "tools").exists()


def test_the_source_distribution_has_what_make_needs(tmp_path):
    run(sys.executable, "setup.py", "-q", "egg_info", cwd=copy_sources(tmp_path))
    names = (tmp_path / "dk_detectron.egg-info" / "SOURCES.txt").read_text().splitlines()
    tests = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("tests/**/*.*")}
    assert tests | {"Makefile", ".clang-format", ".ci/run"} <= set(names)
    assert {"tests/sanitize.sh", "tests/ptx/faults.cu", "tests/data/layers_0.1.pth"} <= tests


def test_the_commands_of_the_readme_are_for_a_clone():
    readme = (ROOT / "README.md").read_text()
    commands = "".join(re.findall(r"^```bash$(.*?)^```$", readme, re.MULTILINE | re.DOTALL))
    assert "\n. .venv/bin/activate " in commands and "\ndk-" not in commands
    assert all((ROOT / tool).is_file() for tool in re.findall(r"tools/\w+\.\w+", commands))


def test_the_commands_of_the_readme_go_together():
    """Each run has a folder of its own, and results are read where an evaluation has put them."""
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python tools/train_.*", readme, re.MULTILINE)
    evaluated = {c.split("OUTPUT_DIR ")[-1].split()[0] for c in commands if "--eval-only" in c}
    trained = [re.search(r"OUTPUT_DIR (\S+)", c)[1] for c in commands if "--eval-only" not in c]
    assert len(set(trained)) == len(trained)
    (read,) = re.findall(r"(\S+)/inference/\S+\.json", readme)
    assert read in evaluated and read not in trained  # whose evaluation.json stays


def test_a_build_for_rocm_is_refused_by_that_name(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.delenv("FORCE_CPU", raising=False)
    version = SimpleNamespace(hip="7.1", cuda=None)
    choose_nvcc = runpy.run_path(str(ROOT / "setup.py"))["choose_nvcc"]
    told = r"but torch 2\.14\.1\+rocm7\.1 is built for ROCm, for which there are no kernels$"
    with pytest.raises(setuptools.errors.SetupError, match=told):
        choose_nvcc(SimpleNamespace(__version__="2.14.1+rocm7.1", version=version))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """The source distribution of the sources, and the wheel that pip builds of them."""
    sources = copy_sources(tmp_path_factory.mktemp("sources"))
    target = tmp_path_factory.mktemp("dist")
    compiler = tmp_path_factory.mktemp("compiler") / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", target, cwd=sources)
    (sdist,) = target.glob("*.tar.gz")
    # What pip does with either: the wheel comes out of the source distribution alone.
    pip = sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"
    run(*pip, sdist, "-w", target, cwd=target, CXX=str(compiler))
    (wheel,) = target.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory) -> Path:
    """The bin/ of an environment that has the wheel, and all it needs from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder that a .pth file adds has its own .pth files ignored: not the clone's.
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"
    run(*pip, "--no-deps", "--no-index", distributions["wheel"], cwd=folder)
    return folder / "bin"


def test_the_wheel_has_all_that_the_clone_has(distributions):
    names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
    configs = {f"dk_detectron/configs/{p.relative_to(CONFIGS)}" for p in CONFIGS.rglob("*.*")}
    assert {name for name in configs if "__pycache__" not in name} <= names
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "dk_detectron").rglob("*.py")}
    assert modules | {"dk_detectron/py.typed", "dk_detectron/_C.abi3.so"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"dk_detectron"}
    assert "cp310-abi3" in distributions["wheel"].name


def test_an_installed_package_trains_in_another_folder(environment, datasets_root, tmp_path):  # noqa: F811
    run(
        environment / "dk-train", "--config-file", "demo/shapes_MNV2_FPN_dk_l3.yaml", *OPTIONS,
        "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", "run",
        cwd=tmp_path, DETECTRON2_DATASETS=str(datasets_root),
    )  # fmt: skip
    assert list(losses(tmp_path / "run")) == [1]
    assert (tmp_path / "run" / "model_final.pth").is_file()


def test_the_commands_work_without_a_clone(environment, tmp_path):
    tables = run(environment / "dk-analyze-model", "--paper-tables", cwd=tmp_path)
    assert all(f"Table {number}\n" in tables for number in (1, 2, 5))
    for row in (*paper_rows(1), *paper_rows(2)):
        assert Path(row["config"]).stem in tables
    plan = run(
        environment / "dk-reproduce-tables", "--scale", "shapes", "--rows", "MNV2", "--seeds", 0,
        "--dry-run", cwd=tmp_path,
    )  # fmt: skip
    assert str(environment.parent) in plan and "dk_detectron.commands.train_net" in plan
    program = (
        "from importlib.metadata import distribution; "
        "print(sum(callable(e.load()) for e in distribution('dk_detectron').entry_points))"
    )
    commands = len(list(environment.glob("dk-*")))
    assert run(environment / "python", "-c", program, cwd=tmp_path) == f"{commands}\n"


def test_the_clone_says_how_to_use_the_installed_package(environment, tmp_path):
    """There, the clone hides it, and has no operators of its own."""
    clone = copy_sources(tmp_path)
    program = "import dk_detectron; print(dk_detectron.__file__)"
    result = subprocess.run(
        [environment / "python", "-c", program],
        cwd=clone, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode and "pip install --no-build-isolation -e ." in result.stderr
    assert f"{clone / 'dk_detectron'} is a clone without compiled operators" in result.stderr
    elsewhere = clone / "docs"
    assert str(environment.parent) in run(environment / "python", "-c", program, cwd=elsewhere)

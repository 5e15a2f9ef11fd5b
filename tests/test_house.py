"""The rooms of the package: who may import whom, and how large a file is."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dk_detectron

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "dk_detectron").rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
COMMANDS = sorted([*ROOT.glob("dk_detectron/commands/*.py"), *ROOT.glob("tools/*.py")])


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """In a process of its own, since import-linter switches off every logger that there is."""
    program = "from importlinter.cli import lint_imports; exit(lint_imports(no_cache=True))"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True
    )


def test_rooms_import_from_the_floors_below_them_alone():
    result = lint_imports(ROOT)  # the floors are in pyproject.toml
    assert result.returncode == 0, result.stdout


def copy_of_modules(folder: Path) -> Path:
    """The package, without its compiled operators."""
    package = folder / "dk_detectron"
    for path in MODULES:
        target = package / path.relative_to(ROOT / "dk_detectron")
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_text(path.read_text())
    return package


def test_an_import_from_a_higher_floor_is_found(tmp_path):
    package = copy_of_modules(tmp_path)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    with open(package / "ops" / "sampling.py", "a") as file:
        file.write("\nfrom ..engine import launch\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "dk_detectron.ops is not allowed to import dk_detectron.engine" in result.stdout


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_help_has_the_lines_of_its_docstring(path):
    """Where a backslash goes on in the next line, so does who copies the command."""
    module = ast.parse(path.read_text())
    source = module.body[0]
    assert ast.get_docstring(module, clean=False).count("\n") == source.end_lineno - source.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 350


def prose(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```|^    .*?$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_documents_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)(\S+?)\)", prose(page)):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_operators_need_torch_alone():
    """What takes long to import is not imported before it is used."""
    program = (
        "import sys, dk_detectron; dk_detectron.deform_kernel_conv2d; "
        "print([m for m in ('detectron2', 'torchvision', 'cv2', 'matplotlib', 'pycocotools', "
        "'sklearn', 'tensorboard') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_rooms_are_there_when_they_are_asked_for():
    program = (
        "import dk_detectron; print(dk_detectron.modeling.mobilenet_v2.__name__, "
        "dk_detectron.model_zoo.get_config_file('ImageNet/MNV2.yaml').endswith('MNV2.yaml'), "
        "dk_detectron.Predictor.__name__, hasattr(dk_detectron, 'cellar'))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "mobilenet_v2 True Predictor False\n", result.stderr


def test_the_environment_for_issues():
    command = [sys.executable, "-m", "dk_detectron.collect_env"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines()[-8:] if " " in line)
    assert lines["dk_detectron"].startswith(f"{dk_detectron.__version__} @")
    assert lines["operators"].endswith("_C.abi3.so")
    assert "PyTorch" in result.stdout and "detectron2" in result.stdout


@pytest.mark.parametrize("file", [None, "_C.abi3.so"], ids=["missing", "broken"])
def test_the_environment_where_the_operators_do_not_load(file, tmp_path):
    """Which is what an issue may be about; any other program ends at the import."""
    package = copy_of_modules(tmp_path)
    if file:
        (package / file).write_bytes(b"not a library")

    def run(*command: str) -> subprocess.CompletedProcess:
        arguments = [sys.executable, *command]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            arguments, capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    result = run("-m", "dk_detectron.collect_env")
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines()[-8:] if " " in line)
    assert lines["dk_detectron"].endswith(f" @{package}")
    assert lines["operators"].startswith("do not load: ") and "pip install" in lines["operators"]
    assert lines["_C"] == f"{file or 'no file'}"
    assert "PyTorch" in result.stdout and "detectron2" in result.stdout
    result = run("-c", "import dk_detectron")
    assert result.returncode == 1 and "ImportError: " in result.stderr.splitlines()[-1]


def test_the_version_is_the_same_everywhere():
    version = dk_detectron.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()

"""The tool that plants faults (make mutants): where, and what it reports of them."""

import json

import pytest
from mutation import __main__ as mutation
from mutation.sites import code_only, draw, faults

CPP = """\
// a < b
#include <x>
template <int V = 1>
void f() {
  const int n = 7 / stride_h;  // 0
  __syncthreads();
  if (n < 8 && p->width)
    run("1 + 1", n);
  sum += x;
  call(first, n,
       second);
}
"""
PYTHON = '''\
def f(x: int | None, *, clip=True):
    """Adds 1 - or 2."""
    if x is not None and not clip:
        x += 3
    for a, b in zip(x, x, strict=True):
        print(a < b,
              "0")
    return x
'''


def changes(tmp_path, name, source):
    (tmp_path / name).write_text(source)
    return [(f.line, f.before.strip(), f.after.strip()) for f in faults(tmp_path, name)]


def test_faults_of_cpp(tmp_path):
    assert sorted(changes(tmp_path, "a.cuh", CPP)) == [
        (5, "/", "*"), (5, "_h", "_w"),
        (6, "__syncthreads();", ";"),
        (7, "&&", "||"), (7, "<", "<="), (7, "width", "height"),
        (9, "+=", "="), (9, "sum += x;", ";"),
    ]  # fmt: skip


def test_faults_of_python(tmp_path):
    found = sorted(changes(tmp_path, "a.py", PYTHON))
    call = 'print(a < b,\n              "0")'
    assert found == [
        (1, "True", "False"),
        (3, "and", "or"), (3, "is not None", "is None"),
        (4, "+=", "="), (4, "3", "4"), (4, "x += 3", "pass"),
        (6, "<", "<="), (6, call, "pass"),
    ]  # fmt: skip


@pytest.mark.parametrize("source, suffix", [(CPP, ".cuh"), (PYTHON, ".py")])
def test_code_keeps_its_place(source, suffix):
    code = code_only(source, suffix)
    assert len(code) == len(source) and code.count("\n") == source.count("\n")
    assert all(c in (" ", s) for c, s in zip(code, source, strict=True))


def test_a_fault_is_planted_where_it_is_said(tmp_path):
    (tmp_path / "a.cuh").write_text(CPP)
    for fault in faults(tmp_path, "a.cuh"):
        fault.plant(tmp_path)
        changed = (tmp_path / "a.cuh").read_text()
        lines = changed.splitlines()
        assert lines[fault.line - 1] != fault.text
        assert [*lines[: fault.line - 1], *lines[fault.line :]] == [
            *CPP.splitlines()[: fault.line - 1],
            *CPP.splitlines()[fault.line :],
        ]
        (tmp_path / "a.cuh").write_text(CPP)


def test_every_rule_is_drawn_alike(tmp_path):
    (tmp_path / "a.cuh").write_text(CPP)
    candidates = faults(tmp_path, "a.cuh")
    rules = {fault.rule for fault in candidates}
    assert {fault.rule for fault in draw(candidates, len(rules), 0)} == rules
    assert draw(candidates, 9, 0)[:5] == draw(candidates, 5, 0)
    assert set(draw(candidates, 99, 0)) == set(candidates)


SOURCE = "def add(a, b):\n    return a + b * 1\n"
TEST = "import add\nassert add.add(2, 3) == 5\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one function, whose test cannot see one of three faults."""
    (tmp_path / "add.py").write_text(SOURCE)
    (tmp_path / "check.py").write_text(TEST)
    (tmp_path / "equivalent.json").write_text("[]")
    mutation.subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutation, "ROOT", tmp_path)
    monkeypatch.setattr(mutation, "FOLDER", tmp_path / "build")
    monkeypatch.setattr(mutation, "EQUIVALENT", tmp_path / "equivalent.json")
    target = mutation.Target(("add.py",), "true", (f"{mutation.sys.executable} -B check.py",))
    monkeypatch.setattr(mutation, "TARGETS", {"add": target})
    (tmp_path / "build").mkdir()
    return tmp_path


def test_what_tests_see_and_what_they_do_not(project):
    report = project / "build" / "report.jsonl"
    entries = mutation.judged("add", 9, 0, report)
    verdicts = {entry["before"].strip(): entry["verdict"] for entry in entries}
    assert set(verdicts) == {"+", "*", "1"}
    assert verdicts["+"].startswith("python -B check.py\n") and "AssertionError" in verdicts["+"]
    assert verdicts["1"] != "survived" != verdicts["*"]
    assert (project / "add.py").read_text() == (project / "build/tree/add.py").read_text() == SOURCE
    assert "the tests see 3 of 3, 100%" in mutation.summary("add", entries)

    # What is known is not judged again.
    lines = report.read_text().splitlines()
    known = [json.dumps(json.loads(line) | {"verdict": "survived"}) for line in lines]
    report.write_text("\n".join(known) + "\n")
    survivors = mutation.judged("add", 9, 0, report)
    assert "the tests see 0 of 3, 0%" in mutation.summary("add", survivors)
    known = {"path": "add.py", "before": "1", "after": "2", "text": "return a + b * 1"}
    (project / "equivalent.json").write_text(json.dumps([known | {"reason": "for this test"}]))
    said = mutation.summary("add", survivors)
    assert "3 faults, 1 of them change no result; the tests see 0 of 2" in said
    assert "equivalent: add.py:2: '1' -> '2' in: return a + b * 1\n      for this test" in said
    assert "SURVIVED: add.py:2: ' + ' -> ' - '" in said

    # It is known of one place.
    for place, found in (
        ({"above": "def add("}, True), ({"left": "b * "}, True),
        ({"above": "def sub("}, False), ({"left": "a + "}, False),
    ):  # fmt: skip
        entry = known | {"reason": "for this test", **place}
        (project / "equivalent.json").write_text(json.dumps([entry]))
        assert ("1 of them change no result" in mutation.summary("add", survivors)) == found
    (project / "equivalent.json").write_text(json.dumps([known | {"reason": "for this test"}]))

    # Nor is what is known to change no result.
    report.unlink()
    entries = mutation.judged("add", 9, 0, report)
    said = mutation.summary("add", entries)
    assert "3 faults, 1 of them change no result; the tests see 2 of 2" in said


def test_a_choice_of_files(project):
    assert mutation.paths_of("add", ["sub.py"]) == []
    assert mutation.paths_of("add", ["sub.py", "a*.py"]) == mutation.paths_of("add") == ["add.py"]
    assert mutation.judged("add", 9, 0, project / "build" / "report.jsonl", ["sub.py"]) == []


def test_no_source_is_left_out():
    """What registers the operators runs nowhere but on a GPU."""
    csrc = {path for path in (mutation.ROOT / "csrc").rglob("*.*") if path.suffix != ".cu"}
    names = {str(path.relative_to(mutation.ROOT)) for path in csrc}
    left = names - {*mutation.paths_of("cuda"), *mutation.paths_of("cpu")}
    with_faults = {path for path in left if faults(mutation.ROOT, path)}
    assert with_faults == {"csrc/cuda/register_cuda.cpp"}


def test_tests_must_pass_before(project):
    (project / "check.py").write_text("raise SystemExit('broken')")
    with pytest.raises(SystemExit, match=r"expected tests that pass [^\n]*\n[^\n]*\nbroken"):
        mutation.judged("add", 9, 0, project / "build" / "report.jsonl")

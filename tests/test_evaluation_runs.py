"""Studies of many runs: nothing is done twice, nothing that was finished is lost."""

import errno
import json
import multiprocessing
import os
import time
from dataclasses import dataclass

import pytest

from dk_detectron.evaluation import runs as runs_module
from dk_detectron.evaluation.runs import execute, group_results, read_results


@dataclass(frozen=True)
class Run:
    name: str
    rate: float
    seed: int


RUNS = [Run("a", 0.1, seed) for seed in range(4)]


def train(run: Run) -> dict:
    return {"error": run.rate + run.seed}


def expected(runs=RUNS) -> list[dict]:
    return [{**vars(run), **train(run)} for run in runs]


def test_a_study_goes_on_where_it_was_killed(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"

    def killed_in_the_third(run):
        if run.seed == 2:
            raise KeyboardInterrupt
        return train(run)

    with pytest.raises(KeyboardInterrupt):
        execute(RUNS, killed_in_the_third, path)
    assert read_results(path) == expected(RUNS[:2])
    # Killed while it wrote, too.
    with open(path, "a") as file:
        file.write('{"name": "a", "rate": 0.1, "se')
    assert read_results(path) == expected(RUNS[:2])
    done = []
    assert execute(RUNS, lambda run: done.append(run) or train(run), path) == expected()
    assert done == RUNS[2:]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected()
    assert execute(RUNS, pytest.fail, path) == expected()


def test_processes(tmp_path):
    results = execute(RUNS, train, tmp_path / "results.jsonl", workers=2)
    assert sorted(results, key=lambda r: r["seed"]) == expected()


def _fail_first(run):
    if run.seed == 0:
        raise ValueError("the first")
    time.sleep(0.1)
    return train(run)


def test_an_error_in_a_process_is_told_before_all_is_done(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="the first"):
        execute([Run("a", 0.1, seed) for seed in range(25)], _fail_first, path, workers=2)
    assert len(read_results(path)) < 15  # those at work and those handed out


def _work(path, barrier):
    barrier.wait()
    execute(RUNS, train, path)


def test_two_studies_of_the_same_file_share_its_runs(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_work, args=(path, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    # A study ends when its own runs do: one that the other had claimed may be the other's last.
    assert sorted(read_results(path), key=lambda r: r["seed"]) == expected()


def _hold(path, claimed, leave):
    with runs_module._claim(path, RUNS[1]) as mine:
        assert mine
        claimed.set()
        leave.wait()


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    claimed, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(path, claimed, leave))
    process.start()
    claimed.wait()
    assert execute(RUNS, train, path) == expected([RUNS[0], *RUNS[2:]])
    process.kill()  # its claim dies with it
    process.join()
    assert len(execute(RUNS, train, path)) == len(RUNS)


def _refuse(code):
    def lockf(*_):
        raise OSError(code, os.strerror(code))

    return lockf


@pytest.mark.parametrize("code", [errno.EACCES, errno.EAGAIN])
def test_a_claim_of_another_is_no_error(code, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module.fcntl, "lockf", _refuse(code))
    assert execute(RUNS, pytest.fail, tmp_path / "results.jsonl") == []


def test_a_file_system_without_locks_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module.fcntl, "lockf", _refuse(errno.ENOLCK))
    with pytest.raises(OSError, match="results.jsonl: expected a file system where .* No locks"):
        execute(RUNS, train, tmp_path / "results.jsonl")


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ValueError, match="JSON in line 2, got 'nonsense'"):
        read_results(path)


def test_the_bar_follows_the_costs(tmp_path, capfd):
    costs = {run: 10.0**-run.seed for run in RUNS}
    execute(RUNS, train, tmp_path / "results.jsonl", cost=costs.get)
    bar = capfd.readouterr().err
    assert "4 runs" in bar and "100% |" in bar and "left, 4 of 4 done" in bar


def test_results_in_groups():
    results = [{"a": 1, "b": 2}, {"a": 2, "b": 2}, {"a": 1, "b": 3}]
    assert group_results(results, ["a"]) == [
        ((1,), [results[0], results[2]]),
        ((2,), [results[1]]),
    ]

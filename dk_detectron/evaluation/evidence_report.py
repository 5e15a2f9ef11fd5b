"""The tables of docs/evidence.md, from nothing but results of ``evidence.train``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from statistics import fmean

from tabulate import tabulate

from ..analysis.ablation import REPLACEMENTS
from ..data.deformed import MATCHING, TASKS, VALIDATION
from .estimates import Estimate, Series, mean_and_deviation, paired_difference
from .evidence import WIDER, Run
from .evidence_plan import GATES, RIGID, experiments
from .runs import group_results

BASELINES = RIGID, WIDER


class Results:
    """Finished runs, by setting: a run but for its seed."""

    def __init__(self, results: Iterable[dict]):
        keys = [key for key in asdict(Run("", RIGID)) if key != "seed"]
        self._groups = dict(group_results(list(results), keys))
        self._keys = keys

    def of(self, run: Run) -> list[dict]:
        """The results of a setting, of any seed."""
        return self._groups.get(tuple(asdict(run)[key] for key in self._keys), [])

    def errors(self, run: Run, test: str = MATCHING) -> Series:
        return {r["seed"]: r["errors"][test] for r in self.of(run) if test in r["errors"]}

    def difference(self, run: Run, base: Run, test: str = MATCHING) -> Estimate | None:
        """Of errors, of the seeds that both have; None of a setting from itself."""
        if run == base:
            return None
        return paired_difference(self.errors(run, test), self.errors(base, test))


def _table(rows: list[list], header: list[str]) -> str:
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def _told(found: Estimate | None) -> str:
    return "–" if found is None else str(found)


def _by_kind(data: str) -> dict[str, Run]:
    return {run.kind: run for run in experiments()[data]}


def search_table(results: Results) -> str:
    """Validation errors of the search, a column for each data set."""
    rows: dict[tuple, list[str]] = {}
    for run in experiments()["search"]:
        cell = mean_and_deviation(results.errors(run, VALIDATION))
        rows.setdefault((run.kind, f"{run.rate:g}", f"{run.factor:g}"), []).append(cell)
    return _table(
        [[*key, *cells] for key, cells in rows.items()], ["kind", "rate", "factor", *TASKS]
    )


def main_table(results: Results, data: str) -> str:
    """Costs and errors of each kind, and the paired differences from the controls."""
    runs, rows = _by_kind(data), []
    controls = [kind for kind in (*BASELINES, GATES) if kind in runs]
    for kind, run in runs.items():
        found = results.of(run)
        costs = ["–"] * 2
        if found:
            costs = [f"{found[0]['parameters']:,}", f"{found[0]['multiply_adds'] / 1e6:.2f}"]
        row = [kind, *costs, str(len(found)), mean_and_deviation(results.errors(run))]
        rows.append([*row, *(_told(results.difference(run, runs[base])) for base in controls)])
    header = ["depthwise 3×3", "parameters", "multiply-adds (M)", "seeds", "error %"]
    return _table(rows, header + [f"less that of {base}" for base in controls])


def _tests(results: Results, data: str) -> list[str]:
    """Names of the tests that there are results of."""
    found = [r for run in _by_kind(data).values() for r in results.of(run)]
    return list(found[0]["errors"]) if found else []


def tests_table(results: Results, data: str) -> str:
    """Errors of each kind in every test, and what is significantly different from a baseline.

    A ▾ is an interval of the paired difference from rigid that is below zero, a ▴ one above; a
    second one is that from the wider one.
    """
    runs, tests = _by_kind(data), _tests(results, data)
    rows = []
    for kind, run in runs.items():
        cells = []
        for test in tests:
            marks = "".join(_mark(results.difference(run, runs[b], test)) for b in BASELINES)
            cells.append(f"{mean_and_deviation(results.errors(run, test))} {marks}".strip())
        rows.append([kind, *cells])
    return _table(rows, ["error % in the test", *tests])


def _mark(found: Estimate | None) -> str:
    if found is None or found.low is None or found.high is None:
        return ""
    return "▾" if found.high < 0 else "▴" if found.low > 0 else "·"


def offsets_table(results: Results, data: str) -> str:
    """How far taps move, and what it costs to replace the offsets, in points of the error."""
    rows = []
    for kind, run in _by_kind(data).items():
        found = [r for r in results.of(run) if r["replaced"]]
        if not found:
            continue
        own = {r["seed"]: r["replaced"]["own"] for r in found}
        row = [kind, *_taps(found), mean_and_deviation(own)]
        for name in REPLACEMENTS:
            other = {r["seed"]: r["replaced"][name] for r in found}
            row.append(_told(paired_difference(other, own)))
        rows.append(row)
    header = ["kind", "moved (cells)", "clipped coordinates %", "dead coordinates %"]
    return _table(rows, [*header, "error %", *(f"more with {name}" for name in REPLACEMENTS)])


def _taps(found: list[dict]) -> list[str]:
    """Means over layers and seeds; of the move also the least and the largest of the layers."""
    layers = [layer for result in found for layer in result["taps"].values()]
    if not layers:
        return ["–"] * 3
    names = found[0]["taps"]
    moved = [fmean(r["taps"][name]["moved"] for r in found) for name in names]
    clipped, dead = (100 * fmean(layer[key] for layer in layers) for key in ("clipped", "dead"))
    spread = f"{fmean(moved):.2f} ({min(moved):.2f} to {max(moved):.2f})"
    return [spread, f"{clipped:.1f}", f"{dead:.1f}"]


# What an experiment that changes one thing varies, and how its value is told.
CHANGED: dict[str, Callable[[Run], str]] = {
    "rate": lambda run: f"{run.rate:g} ({run.kind}, {run.data})",
    "scope": lambda run: f"{run.scope}×{run.scope}",
    "layers": lambda run: run.layers,
    "factor": lambda run: f"{run.factor:g}",
}


def changes_table(results: Results) -> str:
    """Of the experiments that change one thing: errors, and differences from what is settled."""
    rows = []
    for name, tell in CHANGED.items():
        for run in experiments()[name]:
            runs = _by_kind(run.data)
            bases = [runs[kind] for kind in (run.kind, *BASELINES)]
            differences = [_told(results.difference(run, base)) for base in bases]
            ours = results.errors(run)
            rows.append([name, tell(run), str(len(ours)), mean_and_deviation(ours), *differences])
    header = ["changed", "to", "seeds", "error %", "less the settled one"]
    return _table(rows, header + [f"less that of {base}" for base in BASELINES])


def pairs_table(results: Results, experiment: str, changed: str) -> str:
    """Errors, and differences from the rigid networks with the same ``changed`` of the run."""
    rows, runs = [], experiments()[experiment]
    for run in runs:
        value = getattr(run, changed)
        twins = {other.kind: other for other in runs if getattr(other, changed) == value}
        found, ours = results.of(run), results.errors(run)
        parameters = f"{found[0]['parameters']:,}" if found else "–"
        loss = mean_and_deviation({r["seed"]: 100 * r["loss"] for r in found})
        cells = [str(len(ours)), parameters, loss, mean_and_deviation(ours)]
        cells += [_told(results.difference(run, twins[base])) for base in BASELINES]
        rows.append([str(value), run.kind, *cells])
    header = [changed, "kind", "seeds", "parameters", "100 × training loss", "error %"]
    return _table(rows, header + [f"less that of {base}" for base in BASELINES])


def render(results: Results) -> str:
    """All tables, in Markdown."""
    parts = {"Search, on validation pictures": search_table(results)}
    for data in TASKS:
        parts |= {
            f"{data}: matching": main_table(results, data),
            f"{data}: every test": tests_table(results, data),
            f"{data}: offsets": offsets_table(results, data),
        }
    parts |= {
        "One thing at a time: local DK on digits, unless it says otherwise": changes_table(results),
        "Length of the schedule, digits": pairs_table(results, "schedule", "steps"),
        "Twice the width, digits": pairs_table(results, "width", "width"),
    }
    return "\n".join(f"## {title}\n\n{table}\n" for title, table in parts.items())

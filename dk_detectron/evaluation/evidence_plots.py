"""The plots of docs/evidence.md, and all of it in a folder."""

from __future__ import annotations

from pathlib import Path

from ..data.deformed import MATCHING, TASKS
from ..weights import write_text
from .estimates import estimate
from .evidence import WIDER, Run
from .evidence_plan import DCN, LOCAL, RIGID, experiments
from .evidence_report import CHANGED, Results, render

COLOURS = {RIGID: "0.45", WIDER: "0.1", LOCAL: "tab:blue", DCN: "tab:orange"}


def _figure(columns: int, width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=80)
    plt.close(figure)


def _legend(figure, axes) -> None:
    """The legend of some axes, above all of the figure."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)


def _plot_kinds(axes, results: Results, runs: list[Run], test: str) -> None:
    """A row for each kind: the seeds, and their mean with its interval."""
    for row, run in enumerate(runs):
        values = list(results.errors(run, test).values())
        if not values:
            continue
        found, colour = estimate(values), COLOURS.get(run.kind, "tab:green")
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.3, ms=4, mec="none")
        axes.errorbar(found.mean, row, xerr=found.arms, fmt="D", color=colour, ms=5, capsize=3)
    axes.set_yticks(range(len(runs)), [run.kind for run in runs])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def plot_kinds(results: Results, path: Path) -> None:
    """Errors in the matching test, by kind."""
    figure, (panels,) = _figure(len(TASKS), 9, 3.2)
    for axes, data in zip(panels, TASKS, strict=True):
        runs = experiments()[data]
        _plot_kinds(axes, results, runs, MATCHING)
        axes.set(title=data, xlabel="test error % (mean, 95 % interval, seeds)")
        if axes is not panels[0]:
            axes.set_yticklabels([])
    _save(figure, path)


def plot_tests(results: Results, path: Path) -> None:
    """Paired differences from the wider rigid network, in every test."""
    figure, (panels,) = _figure(len(TASKS), 9, 3.4)
    for axes, data in zip(panels, TASKS, strict=True):
        runs = {run.kind: run for run in experiments()[data]}
        base = runs.pop(WIDER)
        tests = next((list(r["errors"]) for r in results.of(base)), [])
        kinds = [kind for kind in (RIGID, LOCAL, DCN, "DCN + local DK") if kind in runs]
        for place, kind in enumerate(kinds):
            for row, test in enumerate(tests):
                found = results.difference(runs[kind], base, test)
                if found is not None:
                    axes.errorbar(
                        found.mean, row + 0.18 * (place - 1.5), xerr=found.arms, fmt="o", ms=4,
                        color=COLOURS.get(kind, "tab:green"), capsize=2,
                        label=kind if row == 0 else None,
                    )  # fmt: skip
        axes.axvline(0, color="0.1", lw=1)
        axes.set_yticks(range(len(tests)), tests)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set(title=data, xlabel=f"error % less that of {WIDER}")
    _legend(figure, panels[0])
    _save(figure, path)


def plot_changes(results: Results, path: Path) -> None:
    """What changes one thing of local DK, on the digits; and the length of the schedule."""
    shown = {name: tell for name, tell in CHANGED.items() if name != "rate"}
    figure, (panels,) = _figure(len(shown) + 1, 11, 3)
    for axes, (name, tell) in zip(panels, shown.items(), strict=False):
        runs = experiments()[name]
        for place, run in enumerate(runs):
            if values := list(results.errors(run).values()):
                found = estimate(values)
                axes.errorbar(
                    place, found.mean, yerr=found.arms, fmt="D", color=COLOURS[LOCAL], capsize=3
                )
        axes.set_xticks(range(len(runs)), [tell(run) for run in runs])
        axes.set(title=name)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("test error %, local DK, digits")
    _plot_schedule(panels[-1], results)
    _legend(figure, panels[-1])
    _save(figure, path)


def _plot_schedule(axes, results: Results) -> None:
    runs = experiments()["schedule"]
    for place, kind in enumerate(dict.fromkeys(run.kind for run in runs)):
        for run in (run for run in runs if run.kind == kind):
            if values := list(results.errors(run).values()):
                found, first = estimate(values), run.steps == runs[0].steps
                axes.errorbar(
                    run.steps * 1.06 ** (place - 1), found.mean, yerr=found.arms, fmt="D",
                    color=COLOURS[kind], capsize=3, ms=4, label=kind if first else None,
                )  # fmt: skip
    steps = sorted({run.steps for run in runs})
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.set(title="steps")
    axes.grid(axis="y", alpha=0.3)


def write_report(results: list[dict], folder: Path) -> str:
    """Writes ``tables.md``, the same as is returned, and ``kinds``, ``tests``, ``changes.png``."""
    found = Results(results)
    markdown = render(found)
    write_text(folder / "tables.md", markdown)
    plot_kinds(found, folder / "kinds.png")
    plot_tests(found, folder / "tests.png")
    plot_changes(found, folder / "changes.png")
    return markdown

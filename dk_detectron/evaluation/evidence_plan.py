"""What is trained for docs/evidence.md: experiments, each a list of runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..data.deformed import TASKS
from .evidence import CHANNELS, KINDS, STEPS, WIDER, Run

SEARCH_SEEDS, SEEDS = (100,), (0, 1, 2, 3, 4)
SEARCH_STEPS = 200
RIGID, LOCAL, GATES, DCN = "rigid", "local DK", "channel gates", "DCN"

# One for all kinds, the best in the search on average of data sets and kinds.
RATE, FACTOR = 0.15, 0.03


def settled(data: str, kind: str, **changes) -> Run:
    """A run with the settings that the search chose, but for ``changes``."""
    return replace(Run(data, kind, rate=RATE, factor=FACTOR), **changes)


def _search() -> list[Run]:
    """Rates of the networks without and with deformable kernels, and generators' factors."""
    chosen = [(k, rate, 0.1) for k in (RIGID, WIDER, LOCAL) for rate in (0.05, 0.15, 0.45)]
    chosen += [(k, 0.15, factor) for k in (LOCAL, GATES, DCN) for factor in (0.03, 0.1, 0.3)]
    return [
        Run(data, kind, rate=rate, factor=factor, steps=SEARCH_STEPS, search=True)
        for data in TASKS
        for kind, rate, factor in dict.fromkeys(chosen)
    ]


def _one_at_a_time() -> dict[str, list[Run]]:
    """One thing after another is changed: for local DK, on the digits, unless it says otherwise."""
    digits = "digits"
    return {
        "rate": [settled(data, RIGID, rate=rate) for data in TASKS for rate in (RATE, 0.45)],
        "scope": [settled(digits, LOCAL, scope=scope) for scope in (3, 4, 5, 9)],
        "layers": [
            settled(digits, LOCAL, layers=layers) for layers in ("all", "first two", "last two")
        ],
        "factor": [settled(digits, LOCAL, factor=factor) for factor in (0.01, 0.03, 0.1, 0.3)],
        "schedule": [
            settled(digits, kind, steps=steps)
            for steps in (STEPS // 4, STEPS, 4 * STEPS)
            for kind in (RIGID, WIDER, LOCAL)
        ],
        "width": [
            settled(digits, kind, width=width)
            for width in (CHANNELS, 2 * CHANNELS)
            for kind in (RIGID, WIDER, LOCAL)
        ],
    }


def experiments() -> dict[str, list[Run]]:
    """The runs of each experiment, of seed 0; an experiment may share runs with another."""
    return {
        "search": _search(),
        **{data: [settled(data, kind) for kind in KINDS] for data in TASKS},
        **_one_at_a_time(),
    }


def plan(names: Iterable[str] = (), seeds: Iterable[int] = ()) -> list[Run]:
    """The runs of some experiments, each once, all of a seed after another.

    Args:
        names: of experiments; by default all.
        seeds: by default SEARCH_SEEDS for the search and SEEDS for the rest.

    Raises:
        ValueError: there is no such experiment.
    """
    known = experiments()
    if unknown := set(names) - known.keys():
        raise ValueError(
            f"experiments: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}"
        )
    runs: dict[Run, None] = {}
    for name in names or known:
        usual = SEARCH_SEEDS if name == "search" else SEEDS
        for run in known[name]:
            runs |= dict.fromkeys(replace(run, seed=seed) for seed in seeds or usual)
    return sorted(runs, key=lambda run: (not run.search, run.seed, [*TASKS].index(run.data)))

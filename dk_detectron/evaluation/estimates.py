"""Figures over seeds: their mean and spread, and paired differences with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95
Series = dict[int, float]  # a figure by seed


class Estimate(NamedTuple):
    """A mean, and its confidence interval by Student's t; without one of a single value."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"

    @property
    def arms(self) -> list[list[float]]:
        """Lengths of an error bar's arms, as matplotlib takes them."""
        if self.low is None or self.high is None:
            return [[0.0], [0.0]]
        return [[self.mean - self.low], [self.high - self.mean]]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values, and where it lies with CONFIDENCE."""
    from scipy.stats import ttest_1samp

    if len(values) < 2:
        return Estimate(fmean(values), None, None, len(values))
    if len(set(values)) == 1:
        return Estimate(values[0], values[0], values[0], len(values))
    interval = ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return Estimate(fmean(values), float(interval.low), float(interval.high), len(values))


def paired_difference(ours: Series, theirs: Series) -> Estimate | None:
    """The mean of ours less theirs over the seeds that both have; None if there are none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def mean_and_deviation(series: Series) -> str:
    values = list(series.values())
    if not values:
        return "–"
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")

"""The charts of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data.chart_text import chart_text
from .errors import KINDS
from .scores import Scores

WIDTH = 5.4  # inches: two beside each other on a desk
SMOOTHING = 0.05  # of a curve: the share of all steps that an average reaches back
COLOURS = [c for name in ("tab10", "tab20b") for c in colormaps[name](range(colormaps[name].N))]
LOSS, AP = "total_loss", "/AP"
Metrics = Mapping[str, Sequence[dict]]  # by run, what metrics.json has


def _chart(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _run(name: str) -> str:
    return chart_text(name, longest=72)  # a line below the chart


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the chart, which grows for it: names of runs are long, and may be many."""
    handles, labels = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.16 * len(labels))
    figure.legend(handles, labels, loc="outside lower left", fontsize=8, frameon=False)


def _colour(number: int):
    return COLOURS[number % len(COLOURS)]


def smoothed(values: Sequence[float]) -> np.ndarray:
    """An exponential moving average, of as many values as there are at the beginning."""
    keep = 1 - 1 / max(1.0, SMOOTHING * len(values))
    total, weight, averages = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return np.array(averages)


def points(metrics: Sequence[dict], key: str) -> list[tuple[int, float]]:
    """The steps where something was measured, and what.

    A run that resumes from a checkpoint does again what an interruption has lost: the last counts.
    """
    found: list[tuple[int, float]] = []
    for line in metrics:
        if line.get(key) is not None:
            while found and found[-1][0] >= line["iteration"]:
                found.pop()
            found.append((line["iteration"], line[key]))
    return found


def draw_losses(runs: Metrics) -> Figure | None:
    """The loss over the steps, as it is and smoothed; None if there is none."""
    figure, axes = _chart(3.2, "Loss, and its moving average")
    for number, (name, metrics) in enumerate(runs.items()):
        if measured := points(metrics, LOSS):
            steps, losses = np.array(measured).T
            axes.plot(steps, losses, ".-", color=_colour(number), alpha=0.25, lw=0.8, ms=2)
            axes.plot(steps, smoothed(losses), color=_colour(number), label=_run(name))
    if not axes.lines:
        return None
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def draw_ap_curves(runs: Metrics) -> Figure | None:
    """Average precisions over the steps; None if none was measured.

    That of the moving average of the weights is dashed.
    """
    figure, axes = _chart(3.2, "Average precision (dashed: of the weights' moving average)")
    for number, (name, metrics) in enumerate(runs.items()):
        names = dict.fromkeys(key for m in metrics for key in m if key.endswith(AP))
        keys = [key for key in names if points(metrics, key)]  # not what is null throughout
        for key in keys:
            what = key.removesuffix(AP)
            several = f"{name}: {what}" if len(keys) > 1 else name
            style = "--" if what.endswith("_ema") else "-"
            axes.plot(
                *np.array(points(metrics, key)).T, style, marker="o", ms=4, color=_colour(number),
                label=_run(several),
            )  # fmt: skip
    if not axes.lines:
        return None
    axes.set_xlabel("step")
    axes.set_ylabel("AP, %")
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def _grouped_bars(
    figure: Figure, axes: Axes, labels: Sequence[str], runs: Mapping[str, Sequence[float]]
) -> None:
    """A row for each label, in it a bar for each run."""
    thickness = 0.8 / len(runs)
    for number, (name, values) in enumerate(runs.items()):
        places = np.arange(len(labels)) + (number - (len(runs) - 1) / 2) * thickness
        bars = axes.barh(
            places, np.nan_to_num(values), thickness, color=_colour(number), label=_run(name)
        )
        texts = ["–" if np.isnan(value) else f"{value:.1f}" for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=7)
    axes.set_yticks(range(len(labels)), [chart_text(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    if len(runs) > 1:
        _legend(figure, axes)


def _height(rows: int, runs: int) -> float:
    return 1 + rows * (0.1 + 0.16 * runs)


def draw_class_ap(classes: Sequence[str], runs: Mapping[str, Sequence[float]]) -> Figure:
    """Average precisions in percent, a row for each class."""
    figure, axes = _chart(_height(len(classes), len(runs)), "AP by class, %")
    _grouped_bars(figure, axes, classes, runs)
    axes.set_xlim(left=0)
    return figure


def draw_errors(runs: Mapping[str, Mapping[str, float]]) -> Figure:
    """By how many points AP50 would rise without the errors of one kind."""
    figure, axes = _chart(_height(len(KINDS), len(runs)), "AP50 that is lost to errors, points")
    points_lost = {name: [100 * gains[kind] for kind in KINDS] for name, gains in runs.items()}
    _grouped_bars(figure, axes, KINDS, points_lost)
    axes.set_xlim(left=0)
    return figure


def draw_precision_recall(runs: Mapping[str, Scores]) -> Figure:
    """Precision at each recall, the mean over the classes, at two thresholds."""
    figure, axes = _chart(3.6, "Precision and recall, mean over the classes")
    for number, (name, scores) in enumerate(runs.items()):
        for threshold, style in (0.5, "-"), (0.75, "--"):
            axes.plot(
                scores.recalls, scores.precision(threshold=threshold), style,
                color=_colour(number), label=_run(f"{name}, IoU {threshold}"),
            )  # fmt: skip
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    _legend(figure, axes)
    return figure


def draw_confusion(name: str, classes: Sequence[str], matrix: np.ndarray) -> Figure:
    """Shares of each row; of the last, of all false detections."""
    size = min(2.2 + 0.34 * len(matrix), 14)
    figure = Figure((size, size), layout="constrained")
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    labels = [chart_text(text) for text in classes]
    axes.set_xticks(range(len(matrix)), [*labels, "missed"], rotation=90)
    axes.set_yticks(range(len(matrix)), [*labels, "nothing"])
    axes.set(xlabel="found as", ylabel="is")
    axes.set_title(chart_text(name), fontsize=10)
    if len(matrix) <= 32:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            axes.text(
                column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7,
                color="white" if share[row, column] > 0.5 else "black",
            )  # fmt: skip
    return figure

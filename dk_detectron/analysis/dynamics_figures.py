"""Figure 3: what a layer did at objects, by t-SNE, coloured by class and by scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..data.chart_text import chart_text
from .dynamics import DECILES, Agreement, Dynamics

CLASSES, SCALES = colormaps["tab10"], colormaps["viridis"]
MARKERS = "os^Dv"  # beyond ten classes, colours come again with other markers


@dataclass(frozen=True)
class Panel:
    """A row of the figure.

    Attributes:
        title: network, layer and kind.
        places: [M, 2], of t-SNE.
        by_class, by_scale: how often neighbours agree.
    """

    title: str
    dynamics: Dynamics
    places: np.ndarray
    by_class: Agreement
    by_scale: Agreement


def _text(label: str, found: Agreement) -> str:
    return (
        f"{label}: {found.share:.0%} of neighbours agree\n"
        f"(by chance {found.chance:.1%} ± {found.deviation:.1%})"
    )


def draw_dynamics(panels: Sequence[Panel]) -> Figure:
    """A row for each network: its objects' offsets, by class on the left, by scale on the right."""
    figure = Figure(figsize=(9.2, 4 * len(panels)), dpi=110, layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (left, right), panel in zip(grid, panels, strict=True):
        size = min(25.0, max(3.0, 6000 / len(panel.places)))
        for i, name in enumerate(sorted(set(panel.dynamics.classes))):
            those = panel.places[panel.dynamics.classes == name]
            marker = MARKERS[i // CLASSES.N % len(MARKERS)]
            left.scatter(
                *those.T, s=size, color=CLASSES(i % CLASSES.N), marker=marker,
                label=chart_text(name),
            )  # fmt: skip
        left.legend(
            fontsize=7, frameon=False, loc="center right", bbox_to_anchor=(0, 0.5), markerscale=1.5
        )
        left.set_title(_text("class", panel.by_class), fontsize=8)
        left.set_ylabel(panel.title, fontsize=8, fontweight="bold", labelpad=75, parse_math=False)
        scale = right.scatter(
            *panel.places.T, s=size, c=panel.dynamics.deciles, cmap=SCALES.resampled(DECILES),
            vmin=-0.5, vmax=DECILES - 0.5,
        )  # fmt: skip
        right.set_title(_text("scale", panel.by_scale), fontsize=8)
        bar = figure.colorbar(scale, ax=right, ticks=(0, DECILES - 1))
        bar.ax.set_yticklabels(["smallest tenth", "largest tenth"], fontsize=7)
        for axes in left, right:
            axes.set(xticks=[], yticks=[])
    return figure

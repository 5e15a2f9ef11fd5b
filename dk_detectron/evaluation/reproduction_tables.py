"""The paper's Tables 3 and 4 out of finished runs, beside its numbers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from statistics import fmean, stdev

from tabulate import tabulate

from ..weights import replacing, write_text
from .estimates import Estimate, Series, paired_difference
from .reproduction import METRICS, RESULT_FILE, TABLES, family, select_rows


def _read_results(output: Path, name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(output.glob(f"{name}/*/{RESULT_FILE}"))]


def _series(results: list[dict], key: str) -> Series:
    """A figure by seed, of the results that have it: those of earlier versions have fewer."""
    return {result["seed"]: result[key] for result in results if result.get(key) is not None}


def _mean(series: Series) -> float | None:
    return fmean(series.values()) if series else None


def collect(rows: dict[str, dict[str, str]], output: Path) -> list[dict]:
    """A line per row: our mean and standard deviation over the finished runs, and the paper's.

    ``difference`` is ours less the paper's; ``gain`` is over the rigid network of the same family,
    in the mean over the seeds that both have, from ``gain_low`` to ``gain_high`` with 95 %
    confidence. What does not exist is None.
    """
    rigid = select_rows(TABLES, ["MNV2", "R_50_DW"])
    lines = []
    for name, row in rows.items():
        results, base = _read_results(output, name), _read_results(output, family(name))
        line: dict = {"row": name, "table": int(row["table"]), "runs": len(results)}
        for metric, column in {**METRICS, "field_correlation": None}.items():
            ours, theirs = _series(results, metric), _series(base, metric)
            gain = paired_difference(ours, theirs) if name != family(name) else None
            line[metric] = _mean(ours)
            line[f"{metric}_std"] = stdev(ours.values()) if len(ours) > 1 else None
            line[f"{metric}_gain"] = gain and gain.mean
            line[f"{metric}_gain_low"] = gain and gain.low
            line[f"{metric}_gain_high"] = gain and gain.high
            if column:
                paper = float(row[column])
                line[f"{metric}_paper"] = paper
                line[f"{metric}_difference"] = line[metric] - paper if ours else None
                line[f"{metric}_gain_paper"] = paper - float(rigid[family(name)][column])
        for key in "parameters", "train_seconds", "inference_seconds":
            line[key] = _mean(_series(results, key))
        lines.append(line)
    return lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _gain(line: dict, metric: str) -> str:
    if line[f"{metric}_gain"] is None:
        return "–"
    low, high = line[f"{metric}_gain_low"], line[f"{metric}_gain_high"]
    return str(Estimate(line[f"{metric}_gain"], low, high, line["runs"]))


def _metric_cells(line: dict, metric: str, scale: str) -> dict[str, str]:
    """The cells of a metric, by their heading."""
    spread = line[f"{metric}_std"]
    cells = {metric: _number(line[metric], ".1f") + ("" if spread is None else f" ± {spread:.1f}")}
    paper, difference, gain = (f"{metric}_{name}" for name in ("paper", "difference", "gain_paper"))
    if scale != "coco":
        cells["over rigid"] = _gain(line, metric)
        return cells | ({"paper's": _number(line[gain], "+.1f")} if gain in line else {})
    if paper not in line:
        return cells
    return cells | {"paper": f"{line[paper]:.1f}", "difference": _number(line[difference], "+.1f")}


def _render_line(line: dict, scale: str) -> list[tuple[str, str]]:
    """The headings and cells of a row."""
    cells = [("row", line["row"]), ("runs", str(line["runs"]))]
    for metric in METRICS:
        cells += _metric_cells(line, metric, scale).items()
    millions = None if line["parameters"] is None else line["parameters"] / 1e6
    cells.append(("#P (M)", _number(millions, ".1f")))
    cells.append(("train (s/iter)", _number(line["train_seconds"], ".3f")))
    return [*cells, ("inference (s/image)", _number(line["inference_seconds"], ".3f"))]


def render(lines: list[dict], scale: str) -> str:
    """Markdown: COCO beside the paper's numbers, the rest beside its gains over the rigid one.

    Gains are means of the paired differences of seeds, with their intervals of 95 % confidence.
    """
    parts = []
    for table in TABLES:
        rendered = [_render_line(x, scale) for x in lines if x["table"] == table]
        if rendered:
            headings = [heading for heading, _ in rendered[0]]
            cells = [[cell for _, cell in row] for row in rendered]
            text = tabulate(cells, headings, tablefmt="github", disable_numparse=True)
            parts.append(f"Table {table}\n\n{text}\n")
    if scale == "shapes":
        parts.append(f"Receptive fields\n\n{_render_fields(lines)}\n")
    return "\n".join(parts)


def _render_fields(lines: list[dict]) -> str:
    """Whether fields follow the objects' sizes: 100 times the rank correlation."""
    rows = [
        [
            line["row"],
            str(line["runs"]),
            *_metric_cells(line, "field_correlation", "shapes").values(),
        ]
        for line in lines
    ]
    headings = ["row", "runs", "100 x rank correlation", "over rigid"]
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)


def write_tables(rows: dict[str, dict[str, str]], output: Path, scale: str) -> str:
    """Writes ``tables.md`` and ``tables.csv`` of what is finished; returns the Markdown."""
    lines = collect(rows, output)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(output / "tables.csv", text.getvalue())
    markdown = render(lines, scale)
    write_text(output / "tables.md", markdown)
    return markdown


def plot_gains(rows: dict[str, dict[str, str]], output: Path) -> None:
    """``gains.png``: AP of every run, and the gains over the rigid network with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 9, 0.8 + 0.4 * len(rows)
    figure, (runs, gains) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for place, name in enumerate(rows):
        ours, theirs = (_series(_read_results(output, row), "AP") for row in (name, family(name)))
        runs.plot(list(ours.values()), [place] * len(ours), "o", color="tab:blue", alpha=0.4)
        if ours:
            runs.plot(fmean(ours.values()), place, "D", color="tab:blue")
        if name != family(name) and (gain := paired_difference(ours, theirs)):
            gains.errorbar(gain.mean, place, xerr=gain.arms, fmt="D", color="tab:blue", capsize=3)
    runs.set_yticks(range(len(rows)), list(rows))
    runs.invert_yaxis()
    runs.set_xlabel("AP of each seed, and their mean")
    gains.set_xlabel("AP over rigid, mean of pairs, 95 % interval")
    gains.axvline(0, color="0.5", lw=1)
    for axes in runs, gains:
        axes.grid(axis="x", alpha=0.3)
    with replacing(output / "gains.png") as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    plt.close(figure)

"""What was found in data sets as a page that stands alone: no script, no request to anywhere."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from matplotlib.figure import Figure

from .chart_text import chart_text
from .checking import Report, duplicates
from .faults import overhang
from .html import jpeg, render, svg

MOST_CLASSES = 60  # in a chart
MOST_BOXES = 6  # of each strange kind
MOST_PAIRS = 12  # of duplicates
SIDE = 220  # pixels of a drawing
COLOUR = "#3572b0"
GREEN = (60, 200, 60)

STYLE = """
figure { width: %(side)dpx; }
.problem { border-left: 4px solid #c33; padding-left: .6rem; }
.repair { border-left: 4px solid #c90; padding-left: .6rem; }
.note { border-left: 4px solid #888; padding-left: .6rem; }
"""
TEMPLATE = """{% for text in across %}<p class="note">{{ text }}</p>{% endfor %}
{% for set in sets %}
<h1>{{ set.report.name }}</h1>
<p>{{ "{:,}".format(set.report.images) }} images, {{ "{:,}".format(set.report.annotations) }}
annotations, {{ set.report.categories }} categories: {{ "incomplete" if set.report.problems
else "complete" }}</p>
{% for problem, cure in set.report.problems %}
<p class="problem">{{ problem }}<br><b>do:</b> {{ cure }}</p>{% endfor %}
{% for text in set.report.repairs %}<p class="repair">repaired: {{ text }}</p>{% endfor %}
{% for text in set.report.notes %}<p class="note">{{ text }}</p>{% endfor %}
{% if set.charts %}<h2>Boxes by class and by size</h2>
<div class="row">{% for chart in set.charts %}{{ chart }}{% endfor %}</div>{% endif %}
{% for title, drawings in set.strange if drawings %}<h2>{{ title }}</h2>
<div class="row">{% for image, caption in drawings %}
<figure><img alt="" src="{{ image }}">
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}</div>{% endfor %}
{% if set.pairs %}<h2>Images of the same content</h2>
<ul>{% for one, other in set.pairs %}<li>{{ one }} = {{ other }}</li>{% endfor %}</ul>{% endif %}
{% endfor %}
"""

# Titles, and by what the strangest come first.
STRANGE: list[tuple[str, Callable[[dict, tuple[int, int]], float]]] = [
    ("Smallest boxes", lambda a, _: -math.sqrt(a["bbox"][2] * a["bbox"][3])),
    ("Longest boxes for their width", lambda a, _: max(a["bbox"][2:]) / min(a["bbox"][2:])),
    ("Boxes that cover most of their image",
     lambda a, size: a["bbox"][2] * a["bbox"][3] / (size[0] * size[1])),
    ("Boxes that stick out of their image", lambda a, size: overhang(a["bbox"], size)),
]  # fmt: skip


def write_page(reports: Sequence[Report], across: Sequence[str], path: str | Path) -> None:
    """Writes the page.

    Args:
        across: what concerns several data sets.
    """
    text = render(
        TEMPLATE,
        "Data sets",
        STYLE % {"side": SIDE},
        sets=[_describe(report) for report in reports],
        across=across,
    )
    Path(path).write_text(text, encoding="utf-8")


def _describe(report: Report) -> dict[str, Any]:
    described: dict[str, Any] = {"report": report, "charts": [], "strange": [], "pairs": []}
    described["pairs"] = duplicates(report.contents)[:MOST_PAIRS]
    found = report.survey
    if not found or not found.has_annotations or found.faults:
        return described
    content = json.loads(Path(found.path).read_bytes())
    images = {image["id"]: image for image in content["images"]}
    objects = [annotation for annotation in content["annotations"] if not annotation["iscrowd"]]
    if objects:
        described["charts"] = [
            svg(_class_chart(found.classes, found.boxes)),
            svg(_size_chart(objects)),
        ]
        names = {category["id"]: category["name"] for category in content["categories"]}
        described["strange"] = [
            (title, _draw_strangest(report, objects, images, names, strangeness))
            for title, strangeness in STRANGE
        ]
    return described


def _class_chart(classes: list[str], boxes: list[list[int]]) -> Figure:
    order = np.argsort([-sum(counts) for counts in boxes], kind="stable")[:MOST_CLASSES]
    figure = Figure((6, 1 + 0.22 * len(order)))
    axes = figure.subplots()
    left = np.zeros(len(order))
    for size, shade in zip(range(3), ("#9ecae1", "#4292c6", "#08519c"), strict=True):
        counts = np.array([boxes[i][size] for i in order])
        label = ("small", "medium", "large")[size]
        axes.barh(range(len(order)), counts, left=left, color=shade, label=label)
        left += counts
    axes.set_yticks(range(len(order)), [chart_text(classes[i]) for i in order])
    axes.invert_yaxis()
    axes.set_xlabel("boxes")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _size_chart(objects: list[dict]) -> Figure:
    sides = np.sqrt([max(a["bbox"][2] * a["bbox"][3], 1e-6) for a in objects])
    figure = Figure((6, 3.5))
    axes = figure.subplots()
    low, high = max(sides.min() * 0.9, 0.1), max(sides.max() * 1.1, 1)
    axes.hist(sides.clip(low), bins=np.geomspace(low, high, 40).tolist(), color=COLOUR)
    axes.set_xscale("log")
    for side in (32, 96):  # COCO's bounds of small and of large
        axes.axvline(side, color="#888", linestyle="--", linewidth=1)
    axes.set_xlabel("root of the box's area, pixels (dashed: 32 and 96)")
    axes.set_ylabel("boxes")
    return figure


def _draw_strangest(
    report: Report,
    objects: list[dict],
    images: dict[int, dict],
    names: dict[int, str],
    strangeness: Callable[[dict, tuple[int, int]], float],
) -> list[tuple[str, str]]:
    """Pictures, and what is on them."""

    def key(annotation: dict) -> float:
        image = images[annotation["image_id"]]
        return strangeness(annotation, (image["width"], image["height"]))

    root = MetadataCatalog.get(report.name).image_root
    strangest = sorted(objects, key=key, reverse=True)[:MOST_BOXES]
    if strangeness is STRANGE[-1][1]:
        strangest = [annotation for annotation in strangest if key(annotation) > 0]
    drawings = []
    for annotation in strangest:
        image = images[annotation["image_id"]]
        try:
            pixels = read_image(os.path.join(root, image["file_name"]), "BGR")
        except Exception:  # of Pillow; the report has it among the problems
            continue
        caption = (
            f"{image['file_name']}: id {annotation['id']}, {names[annotation['category_id']]}, "
            f"{[round(value, 1) for value in annotation['bbox']]}"
        )
        drawings.append((_drawn(pixels, annotation["bbox"]), caption))
    return drawings


def _drawn(pixels: np.ndarray, box: list[float]) -> str:
    """The box on the part of the picture around it, three times as long as it and 64 at least."""
    x, y, width, height = box
    half = max(width, height, 64 / 3) * 1.5
    centre = x + width / 2, y + height / 2
    x0, y0 = (max(0, int(c - half)) for c in centre)
    part = np.ascontiguousarray(pixels[y0 : int(centre[1] + half), x0 : int(centre[0] + half)])
    if not part.size:
        part, x0, y0 = pixels.copy(), 0, 0
    scale = SIDE / max(part.shape[:2])
    part = cv2.resize(part, None, fx=scale, fy=scale)
    left, top = int(scale * (x - x0)), int(scale * (y - y0))
    right, bottom = int(scale * (x + width - x0)), int(scale * (y + height - y0))
    cv2.rectangle(part, (left, top), (right, bottom), GREEN, 2)
    return jpeg(part)

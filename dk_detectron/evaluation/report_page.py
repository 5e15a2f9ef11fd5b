"""A report as a page that stands alone, on a phone as well as on a desk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from ..data.html import render, svg

STYLE = """
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } nav a { margin-right: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
.wide { overflow-x: auto; overflow-wrap: normal; margin: 1rem 0; }
pre { font-size: .8rem; overflow-x: auto; }
figure.picture { width: 34rem; }
.note { border-left: 4px solid #888; padding-left: .6rem; }
"""
TEMPLATE = """
<h1>{{ title }}</h1>
<nav>{% for s in sections %}<a href="#s{{ loop.index }}">{{ s.title }}</a> {% endfor %}</nav>
{% for s in sections %}
<section id="s{{ loop.index }}"><h2>{{ s.title }}</h2>
{% for note in s.notes %}<p class="note">{{ note }}</p>{% endfor %}
{% if s.text %}<p>{{ s.text }}</p>{% endif %}
{% for t in s.tables %}<div class="wide"><table>
{% if t.caption %}<caption>{{ t.caption }}</caption>{% endif %}
<thead><tr>{% for cell in t.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in t.rows %}
<tr>{% for cell in row %}<td>{{ cell | number }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>{% endfor %}
{% if s.charts %}<div class="row">
{% for chart in s.charts %}<figure>{{ chart }}</figure>{% endfor %}</div>{% endif %}
{% for title, pictures in s.pictures %}<h3>{{ title }}</h3><div class="row">
{% for p in pictures %}<figure class="picture"><img alt="{{ p.caption }}" src="{{ p.address }}">
<figcaption>{{ p.caption }}</figcaption></figure>{% endfor %}</div>{% endfor %}
{% for summary, text in s.details %}<details><summary>{{ summary }}</summary>
<pre>{{ text }}</pre></details>{% endfor %}
</section>
{% endfor %}
"""


@dataclass(frozen=True)
class Table:
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Picture:
    """
    Attributes:
        address: as of :func:`dk_detectron.data.html.jpeg`.
    """

    caption: str
    address: str


@dataclass
class Section:
    """A part of the page, in the order of its attributes."""

    title: str
    text: str = ""
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Markup] = field(default_factory=list)
    pictures: list[tuple[str, list[Picture]]] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)

    def add_chart(self, figure: Figure | None) -> None:
        if figure is not None:
            self.charts.append(svg(figure))


def _number(cell: Any) -> str:
    """As a table shows it."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, float):
        return f"{cell:.1f}" if abs(cell) >= 10 or cell == 0 else f"{cell:.2f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def render_report(title: str, sections: Sequence[Section]) -> str:
    return render(TEMPLATE, title, STYLE, sections=sections, filters={"number": _number})

"""What pages that stand alone are made of: no script, no request to anywhere."""

from __future__ import annotations

import base64
import io

import cv2
import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

# Figures are drawn dark on light: in the dark they keep their own ground.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title><style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; max-width: 100%; font-size: .85rem; }
img { max-width: 100%; }
{{ style }}</style></head><body>
"""


def render(template: str, title: str, style: str, *, filters: dict | None = None, **values) -> str:
    """A page: jinja2's template of its body, with its values escaped unless they are ``Markup``."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(filters or {})
    text = HEAD + template + "</body></html>\n"
    return environment.from_string(text).render(title=title, style=Markup(style), **values)


def svg(figure: Figure) -> Markup:
    """A figure to stand in a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight")
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])  # without the prologue, which belongs to a file


def jpeg(pixels: np.ndarray) -> str:
    """The address of a picture, uint8 [H, W, 3], BGR, that holds the picture itself."""
    content = cv2.imencode(".jpg", pixels)[1].tobytes()
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()

"""What the networks of a report look at: fields side by side, and their offsets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from detectron2.config import CfgNode
from torch import nn

from ..analysis.field_figures import draw_fields, view_field
from ..analysis.forward import deepest_feature
from ..analysis.kernel_figures import draw_histograms
from ..analysis.kernels import add_statistics, no_statistics
from ..analysis.objects import CocoPictures
from ..analysis.offsets import adaptive_layers, observe
from ..analysis.receptive_field import ReceptiveFields
from .report_page import Section

Networks = Mapping[str, tuple[CfgNode, nn.Module]]
Progress = Callable[[Iterable, str], Iterable]
LeftOut = Callable[[str], Collection[int]]


def _things(
    section: Section, networks: Networks, count: int, left_out: LeftOut
) -> tuple[CocoPictures, list[tuple[int, int]]] | None:
    """The first network's data set, and objects in it to look at."""
    names = next(iter(networks.values()))[0].DATASETS.TEST
    if not names:
        section.notes.append("DATASETS.TEST is empty: nothing to look at")
        return None
    try:
        pictures = CocoPictures(names[0])
        return pictures, pictures.spread(count, left_out(names[0]))
    except (FileNotFoundError, ValueError) as error:
        section.notes.append(str(error))
        return None


def look(
    section: Section, networks: Networks, count: int, progress: Progress, left_out: LeftOut
) -> None:
    """Adds effective fields at ``count`` objects, and the offsets on their pictures.

    What is in the way becomes a note.

    Args:
        left_out: the images of a data set that cannot be read.
    """
    if found := _things(section, networks, count, left_out):
        _look_at_fields(section, networks, *found, progress)
        _look_at_offsets(section, networks, *found, progress)


def _look_at_fields(
    section: Section,
    networks: Networks,
    pictures: CocoPictures,
    things: list[tuple[int, int]],
    progress: Progress,
) -> None:
    rows = []
    try:
        for image_id, thing in progress(things, "Receptive fields"):
            panels = []
            for cfg, model in networks.values():
                picture = pictures.read(image_id, cfg, only=[thing])
                fields = ReceptiveFields(model, picture.image, deepest_feature(model))
                panels.append(view_field(fields, picture))
            rows.append((f"{picture.name}\n{picture.objects[0].category}", panels))
    except (NotImplementedError, ValueError) as error:
        section.notes.append(f"receptive fields: {error}")
        return
    columns = zip(*(panels for _, panels in rows), strict=True)
    for name, column in zip(networks, columns, strict=True):
        if dead := sum(not panel.field.any() for panel in column):
            section.notes.append(
                f"{name}: at {dead} of {len(rows)} objects the field is zero everywhere: nothing "
                "in the picture moves the last stage there. Its units are dead, or its offsets "
                "lead out of the feature map"
            )
    section.add_chart(draw_fields([*networks], rows, "derivatives through the offsets"))


def _look_at_offsets(
    section: Section,
    networks: Networks,
    pictures: CocoPictures,
    things: list[tuple[int, int]],
    progress: Progress,
) -> None:
    """Adds histograms for each network that has any."""
    chosen = list(dict.fromkeys(image_id for image_id, _ in things))
    for name, (cfg, model) in networks.items():
        if not adaptive_layers(model):
            continue
        layers = no_statistics()
        try:
            for image_id in progress(chosen, f"Offsets of {name}"):
                add_statistics(layers, observe(model, pictures.read(image_id, cfg).image))
        except (NotImplementedError, ValueError) as error:
            section.notes.append(f"{name}, offsets: {error}")
            continue
        for kind, found in layers.items():
            if found:
                title = f"{name}: {kind.replace('_', ' ')}s"
                section.add_chart(draw_histograms(title, kind, found))

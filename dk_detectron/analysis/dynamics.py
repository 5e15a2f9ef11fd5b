"""What a layer's offsets or gates follow: what an object is, or how large it is (section 4.3).

The paper finds *"kernel sampling offsets that strongly correlate to scales rather than semantics"*,
and the reverse of conditional convolution (Figure 3, by t-SNE). As numbers: how often the nearest
neighbours of an object's offsets are those of an object of its class, or of its scale, beside how
often that happens by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from ..layers import AdaptiveConv2d
from .kernels import kernel_size, offset_at
from .objects import CocoPictures, Picture
from .offsets import adaptive_layers, observe
from .receptive_field import ReceptiveFields
from .records import Records

NEIGHBOURS = 5
SHUFFLES = 20
DECILES = 10
# Fewer have no neighbours to speak of.
FEWEST = NEIGHBOURS + 2


def choose_classes(pictures: CocoPictures, count: int, seed: int = 0) -> list[str]:
    """So many classes that have objects, at random, as in Figure 3; all if there are no more."""
    found = {pictures.category(a) for i in pictures.images for a in pictures.annotations(i)}
    classes = [name for name in pictures.categories if name in found]
    chosen = np.random.default_rng(seed).permutation(len(classes))[:count]
    return [classes[i] for i in sorted(chosen)]


class Dynamics(NamedTuple):
    """What a layer did at objects.

    Attributes:
        values: [M, D], offsets or gates.
        classes: [M], names.
        deciles: [M], 0 to 9, of the rank of the objects' areas.
        images: [M], identifiers of the pictures.
    """

    values: np.ndarray
    classes: np.ndarray
    deciles: np.ndarray
    images: np.ndarray


class Agreement(NamedTuple):
    """The share of neighbours of the same label, and by chance: mean and standard deviation."""

    share: float
    chance: float
    deviation: float


def choose_kind(model: nn.Module, layer: str | None, kind: str | None) -> tuple[str, str]:
    """The layer to look at, by default the last that adapts, and which of what adapts it.

    Raises:
        ValueError: there is no such layer or kind.
    """
    layers = adaptive_layers(model)
    if not layers:
        raise ValueError("model: expected layers that adapt, got none")
    layer = layer or list(layers)[-1]
    if layer not in layers:
        raise ValueError(f"--layer: expected one of {', '.join(layers)}, got {layer!r}")
    module = layers[layer]
    kinds = ["data_offset"]
    if isinstance(module, AdaptiveConv2d):
        order = "kernel_offset", "gate", "data_offset"
        kinds = [k for k in order if hasattr(module, f"{k}_generator")]
    if kind is not None and kind not in kinds:
        raise ValueError(f"--kind: expected one of {', '.join(kinds)} of {layer}, got {kind!r}")
    return layer, kind or kinds[0]


def collect(
    model: nn.Module,
    cfg: CfgNode,
    pictures: CocoPictures,
    path: Path,
    layer: str,
    kind: str,
    classes: Sequence[str],
    *,
    settings: dict | None = None,
    limit: int | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> Dynamics:
    """What adapts a layer at all objects of some classes; what is in the file is not repeated.

    Of what is predicted for every place it is the one at the centre of the object's box; of what is
    predicted for every image, that of the box cut out of the picture, at its size there.

    Args:
        cfg: of the network's input.
        path: a CSV file, which grows picture by picture.
        layer, kind: of :func:`choose_kind`.
        settings: what tells this network from others.
        limit: take so many pictures, evenly spread, instead of all.

    Raises:
        FileExistsError: the file is of another network or other settings.
        ValueError: there are too few objects, or all have the same offsets.
    """
    names = {
        image_id: [a["id"] for a in found]
        for image_id in pictures.images
        if (found := [a for a in pictures.annotations(image_id) if pictures.category(a) in classes])
    }
    chosen = list(names)
    if limit is not None and limit < len(chosen):
        chosen = [chosen[int(i * len(chosen) / limit)] for i in range(limit)]
    module: Any = model.get_submodule(layer)
    size = 2 * int(np.prod(kernel_size(module)))
    if kind == "gate":
        size = module.num_experts
    values = [f"v{i}" for i in range(size)]
    settings = {
        **(settings or {}), "dataset": pictures.name, "layer": layer, "kind": kind,
        "classes": sorted(classes), "pictures": len(chosen),
    }  # fmt: skip
    columns = ["image_id", "annotation_id", "category", "area", *values]
    records = Records(path, columns, settings)
    for image_id in progress([i for i in chosen if i not in records.done]):
        picture = pictures.read(image_id, cfg, only=names[image_id])
        matrix = at_objects(model, picture, layer, kind)
        records.add(
            [
                {
                    "image_id": image_id, "annotation_id": thing.identifier,
                    "category": thing.category, "area": float(thing.area),
                    **dict(zip(values, row, strict=True)),
                }
                for thing, row in zip(picture.objects, matrix.tolist(), strict=True)
            ]
        )  # fmt: skip
    return _dynamics(records.rows(), values, layer)


def _dynamics(rows: list[dict[str, Any]], values: list[str], layer: str) -> Dynamics:
    if len(rows) < FEWEST:
        raise ValueError(f"expected at least {FEWEST} objects to compare, got {len(rows)}")
    if len({row["image_id"] for row in rows}) < 2:
        raise ValueError("expected objects on several pictures, got one picture's")
    matrix = np.array([[row[value] for value in values] for row in rows], dtype=float)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{layer}: expected finite offsets, got others; the network has diverged")
    if not np.ptp(matrix, axis=0).any():
        raise ValueError(
            f"{layer}: expected offsets that differ between objects, got the same at all "
            f"{len(rows)}: its generator has not been trained"
        )
    areas = np.array([row["area"] for row in rows])
    return Dynamics(
        matrix,
        np.array([str(row["category"]) for row in rows]),
        deciles(areas),
        np.array([row["image_id"] for row in rows]),
    )


def deciles(areas: np.ndarray) -> np.ndarray:
    """Areas [M] -> by which tenth of all, 0 to 9; equal areas by the middle of their ranks."""
    ordered = np.sort(areas)
    ranks = (np.searchsorted(ordered, areas) + np.searchsorted(ordered, areas, "right") - 1) / 2
    return (DECILES * ranks / len(areas)).astype(int)


def at_objects(model: nn.Module, picture: Picture, layer: str, kind: str) -> np.ndarray:
    """Offsets or gates at the objects of a picture, [M, D]."""
    if not _for_every_image(model.get_submodule(layer), kind):
        (seen,) = (s for n, s in observe(model, picture.image, layer).items() if n == layer)
        fields = ReceptiveFields(model, picture.image, layer)
        found = [offset_at(seen, kind, fields.cell(thing.centre)) for thing in picture.objects]
    else:
        found = [
            _of_image(model, crop(picture.image, thing.box), layer, kind)
            for thing in picture.objects
        ]
    return torch.stack(found).float().cpu().numpy()


def _for_every_image(module: Any, kind: str) -> bool:
    return isinstance(getattr(module, f"{kind}_generator", None), nn.Linear)


def crop(image: Tensor, box: Sequence[float]) -> Tensor:
    """The part of a picture [C, H, W] in a box, whole pixels, at least one."""
    x0, y0, x1, y1 = box
    left, top = (min(int(low), n - 1) for low, n in ((x0, image.shape[2]), (y0, image.shape[1])))
    right, bottom = max(int(np.ceil(x1)), left + 1), max(int(np.ceil(y1)), top + 1)
    return image[:, top:bottom, left:right]


def _of_image(model: Any, image: Tensor, layer: str, kind: str) -> Tensor:
    """Of a whole picture. A detector's backbone gets it without the detector's padding, of which a
    global pool would see more the smaller the picture is."""
    for prefix in "backbone.bottom_up.", "backbone.":
        if hasattr(model, "preprocess_image") and layer.startswith(prefix):
            mean, std = model.pixel_mean.cpu(), model.pixel_std.cpu()
            body, image = model.get_submodule(prefix.rstrip(".")), (image - mean) / std
            model, layer = body, layer.removeprefix(prefix)
            break
    return observe(model, image, layer)[layer].values[kind]


def neighbours(dynamics: Dynamics, count: int = NEIGHBOURS) -> np.ndarray:
    """The nearest objects of other pictures, [M, count]; -1 where there are too few.

    Those of the same picture are alike for other reasons than class or size.
    """
    _, own = np.unique(dynamics.images, return_inverse=True)
    # Beyond those of its own picture, none of which may be nearer.
    wanted = min(count + int(np.bincount(own).max()), len(own) - 1)
    near = NearestNeighbors(n_neighbors=wanted).fit(dynamics.values).kneighbors()[1]
    found = np.full((len(own), count), -1)
    for i, others in enumerate(near):
        others = others[own[others] != own[i]][:count]
        found[i, : len(others)] = others
    return found


def agreement(near: np.ndarray, labels: np.ndarray, seed: int = 0) -> Agreement:
    """How often neighbours have the same label, and how often they have if labels are shuffled.

    Args:
        near: of :func:`neighbours`.
        labels: [M].
    """
    there = near >= 0

    def share(labels: np.ndarray) -> float:
        return float((labels[near] == labels[:, None])[there].mean()) if there.any() else np.nan

    rng = np.random.default_rng(seed)
    chance = [share(rng.permutation(labels)) for _ in range(SHUFFLES)]
    return Agreement(share(labels), float(np.mean(chance)), float(np.std(chance)))


def embed(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE: [M, D] -> [M, 2]."""
    perplexity = min(30.0, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)

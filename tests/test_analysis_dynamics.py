"""What offsets and gates follow: values at objects, and neighbours against chance."""

import json
import math

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

from dk_detectron.analysis.dynamics import (
    Agreement,
    Dynamics,
    agreement,
    choose_classes,
    choose_kind,
    collect,
    crop,
    deciles,
    embed,
    neighbours,
)
from dk_detectron.analysis.dynamics_figures import Panel, draw_dynamics
from dk_detectron.analysis.objects import CocoPictures
from dk_detectron.model_zoo import load_config

LAYER = "backbone.bottom_up.res3.0.conv2"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Ten pictures of 64x96 with an object each, but the first, which has two."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, 11):
        cv2.imwrite(str(root / f"{i}.png"), rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 96})
        for j in range(2 if i == 1 else 1):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": 1 + i % 3, "iscrowd": 0,
                 "bbox": [5 * i, 2 * i, 10 + i, 20], "area": 20 * (10 + i) - j}
            )  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate("abcd", start=1)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (root / "annotations.json").write_text(json.dumps(content))
    return CocoPictures(f"coco:{root / 'annotations.json'}:{root}")


def network(kind):
    cfg = load_config(
        "demo/shapes_MNV2_FPN_dk_l3.yaml",
        ["MODEL.DEFORM_KERNEL.CONV_3X3", kind, "INPUT.MIN_SIZE_TEST", 32],
    )
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if "generator.weight" in name and "proposal" not in name:
            nn.init.normal_(parameter, std=0.05)
    return model, cfg


def gather(model, cfg, dataset, path, kind="kernel_offset", **options):
    return collect(model, cfg, dataset, path, LAYER, kind, ["a", "b", "c"], **options)


def normalised(model, image):
    return ((image - model.pixel_mean) / model.pixel_std)[None]


def generator_input(model, layer, x):
    """What a layer of the backbone gets, of a batch that is already normalised."""
    found = []
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model.eval().backbone.bottom_up(x)
    handle.remove()
    return found[0]


@torch.no_grad()
def test_local_offsets_are_those_at_the_centres(dataset, tmp_path):
    model, cfg = network("local")
    found = gather(model, cfg, dataset, tmp_path / "x.csv")
    assert found.values.shape == (11, 18) and found.images.tolist() == [1, *range(1, 11)]
    assert found.classes.tolist() == [*"bb", *"cabcabcab"]
    picture = dataset.read(3, cfg)  # 32x48, which the detector pads to 32x64
    layer = model.get_submodule(LAYER)
    padded = torch.nn.functional.pad(normalised(model, picture.image), (0, 16))
    offsets = layer.kernel_offset_generator(generator_input(model, layer, padded))
    assert offsets.shape[2:] == (4, 8)  # a stride of 8
    x, y = picture.objects[0].centre
    expected = offsets[0, :, round((y - 0.5) / 8), round((x - 0.5) / 8)]
    np.testing.assert_allclose(found.values[3], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "convolution, kind, size", [("global", "kernel_offset", 18), ("conditional", "gate", 8)]
)
def test_of_whole_images_it_is_the_objects_crop_without_padding(
    dataset, tmp_path, convolution, kind, size
):
    model, cfg = network(convolution)
    found = gather(model, cfg, dataset, tmp_path / "x.csv", kind)
    assert found.values.shape == (11, size)
    picture = dataset.read(3, cfg)
    (thing,) = picture.objects
    assert thing.box == (7.5, 3, 14, 13)
    cut = normalised(model, picture.image)[:, :, 3:13, 7:14]
    layer = model.get_submodule(LAYER)
    expected = getattr(layer, f"{kind}_generator")(generator_input(model, layer, cut).mean((2, 3)))[
        0
    ]
    expected = expected.sigmoid() if kind == "gate" else expected
    np.testing.assert_allclose(found.values[3], expected, rtol=1e-4, atol=1e-5)


def test_crops_have_at_least_a_pixel():
    image = torch.arange(12).view(1, 3, 4)
    assert crop(image, (1, 1, 3, 2)).tolist() == [[[5, 6]]]
    assert crop(image, (0.2, 0.9, 1.1, 1.1)).shape == (1, 2, 2)
    for box in (2, 2, 2, 2), (4, 3, 4, 3), (0, 0, 0, 0):
        assert crop(image, box).shape == (1, 1, 1)


def test_collecting_goes_on_and_is_of_one_network(dataset, tmp_path):
    model, cfg = network("local")
    path = tmp_path / "x.csv"
    whole = gather(model, cfg, dataset, tmp_path / "whole.csv")

    def stopping(images):
        yield from images[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather(model, cfg, dataset, path, progress=stopping)
    seen = []
    again = gather(model, cfg, dataset, path, progress=lambda images: seen.extend(images) or images)
    assert seen == [7, 8, 9, 10]
    assert path.read_text() == (tmp_path / "whole.csv").read_text()
    np.testing.assert_array_equal(again.values, whole.values)
    with pytest.raises(FileExistsError, match="expected rows of the same network"):
        gather(model, cfg, dataset, path, settings={"weights": "others"})
    few = gather(model, cfg, dataset, tmp_path / "few.csv", limit=8)
    assert len(set(few.images)) == 8


def test_what_cannot_be_compared(dataset, tmp_path):
    model, cfg = network("local")
    with pytest.raises(ValueError, match="expected at least 7 objects to compare, got 2"):
        gather(model, cfg, dataset, tmp_path / "one.csv", limit=1)
    layer = model.get_submodule(LAYER)
    nn.init.zeros_(layer.kernel_offset_generator.weight)
    with pytest.raises(ValueError, match="the same at all 11: its generator has not been trained"):
        gather(model, cfg, dataset, tmp_path / "zero.csv")
    nn.init.constant_(layer.kernel_offset_generator.bias, math.nan)
    with pytest.raises(ValueError, match="expected finite offsets"):
        gather(model, cfg, dataset, tmp_path / "nan.csv")
    for layer, kind, message in [
        ("res9", None, "--layer: expected one of .*res3.0.conv2.*, got 'res9'"),
        (LAYER, "gate", "--kind: expected one of kernel_offset of .*res3.0.conv2, got 'gate'"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose_kind(model, layer, kind)
    with pytest.raises(ValueError, match="expected layers that adapt, got none"):
        choose_kind(nn.Conv2d(1, 1, 1), None, None)


def test_the_last_layer_and_its_first_kind_are_the_default():
    model, _ = network("local")
    assert choose_kind(model, None, None) == ("backbone.bottom_up.res5.3.conv2", "kernel_offset")
    scc, _ = network("conditional")
    assert choose_kind(scc, LAYER, None) == (LAYER, "gate")


def test_classes_are_drawn_among_those_with_objects(dataset):
    assert choose_classes(dataset, 10) == ["a", "b", "c"]  # nothing is a d
    drawn = {tuple(choose_classes(dataset, 2, seed)) for seed in range(20)}
    assert drawn == {("a", "b"), ("a", "c"), ("b", "c")}
    assert choose_classes(dataset, 2, 5) == choose_classes(dataset, 2, 5)


def test_deciles_are_of_ranks():
    areas = np.random.default_rng(0).permutation(100) ** 3.0
    assert np.bincount(deciles(areas)).tolist() == [10] * 10
    assert (deciles(areas)[np.argsort(areas)] == np.repeat(range(10), 10)).all()
    assert deciles(np.full(7, 5.0)).tolist() == [4] * 7  # the middle, all of them
    assert deciles(np.array([1.0, 1.0, 9.0, 9.0])).tolist() == [1, 1, 6, 6]


def made(values, images=None):
    count = len(values)
    images = np.arange(count) if images is None else images
    return Dynamics(np.asarray(values, float), np.array(["a"] * count), np.zeros(count), images)


def test_neighbours_are_the_nearest_of_other_pictures():
    rng = np.random.default_rng(0)
    values, images = rng.normal(size=(60, 3)), rng.integers(0, 12, 60)
    found = neighbours(made(values, images), 4)
    for i in range(60):
        distance = np.linalg.norm(values - values[i], axis=1)
        distance[images == images[i]] = np.inf
        assert found[i].tolist() == np.argsort(distance)[:4].tolist()
    few = neighbours(made(values[:5], np.array([0, 0, 0, 0, 1])), 4)
    assert few.tolist() == [[4, -1, -1, -1]] * 4 + [[*few[4]]]
    assert sorted(few[4]) == [0, 1, 2, 3]


def test_agreement_tells_what_values_follow_from_what_they_do_not():
    rng = np.random.default_rng(0)
    followed, other = rng.integers(0, 4, 400), rng.integers(0, 10, 400)
    near = neighbours(made(followed[:, None] * 10 + rng.normal(size=(400, 2))))
    share, chance, deviation = agreement(near, followed)
    assert share == 1 and chance == pytest.approx(0.25, abs=0.02) and 0 < deviation < 0.03
    share, chance, deviation = agreement(near, other)
    assert abs(share - chance) < 4 * deviation and chance == pytest.approx(0.1, abs=0.02)
    # By hand: of 0's neighbours one agrees, of 1's the only one does not.
    few = agreement(np.array([[1, 2], [2, -1], [0, 1]]), np.array(["a", "b", "a"]))
    assert few.share == pytest.approx(2 / 5)
    assert math.isnan(agreement(np.full((3, 2), -1), np.arange(3)).share)


def test_the_embedding_keeps_what_is_near_together():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 15)
    values = 20 * np.eye(3)[labels] + rng.normal(size=(45, 3))
    places = embed(values)
    assert places.shape == (45, 2) and np.isfinite(places).all()
    near = neighbours(made(places))
    assert agreement(near, labels).share > 0.95
    np.testing.assert_array_equal(places, embed(values))
    assert embed(rng.normal(size=(7, 18))).shape == (7, 2)


def test_the_figure_has_a_colour_for_every_class_and_decile():
    rng = np.random.default_rng(0)
    classes = np.array([f"_class {i % 12} $^$" for i in range(120)])
    dynamics = Dynamics(rng.normal(size=(120, 2)), classes, np.arange(120) // 12, np.arange(120))
    found = Agreement(0.5, 0.125, 0.01)
    panel = Panel("$^$net: gates (2)", dynamics, dynamics.values, found, found)
    figure = draw_dynamics([panel, panel])
    left, right = figure.axes[:2]
    assert len(left.collections) == 12
    drawn = np.concatenate([c.get_offsets() for c in left.collections])
    assert set(map(tuple, drawn)) == set(map(tuple, dynamics.values))
    kinds = {(tuple(c.get_facecolor()[0]), len(c.get_paths()[0])) for c in left.collections}
    assert len(kinds) == 12
    np.testing.assert_array_equal(right.collections[0].get_array(), dynamics.deciles)
    assert left.get_title() == "class: 50% of neighbours agree\n(by chance 12.5% ± 1.0%)"
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert len(left.get_legend().get_texts()) == 12
    assert np.ptp(np.asarray(canvas.buffer_rgba())) == 255


def test_rows_are_of_their_classes_and_a_limit_spreads_evenly(dataset, tmp_path):
    model, cfg = network("local")
    few = gather(model, cfg, dataset, tmp_path / "few.csv", limit=8)
    assert sorted(set(few.images)) == [1, 2, 3, 4, 6, 7, 8, 9]
    path = tmp_path / "x.csv"
    collect(model, cfg, dataset, path, LAYER, "kernel_offset", ["a", "b"])
    with pytest.raises(FileExistsError, match=r"got others \(classes\)"):  # of seven pictures, too
        collect(model, cfg, dataset, path, LAYER, "kernel_offset", ["b", "c"])

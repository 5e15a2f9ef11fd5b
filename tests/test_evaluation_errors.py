"""Kinds of errors against cases by hand, and average precisions against COCO's own."""

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dk_detectron.evaluation.errors import KINDS, confusion, find_errors, scenes, score_pictures
from dk_detectron.evaluation.scores import AREAS, Scores

CAT, DOG = 3, 7


def make_truth(*objects, images=(1, 2)) -> COCO:
    """Of objects (image, class, box) or (image, class, box, iscrowd)."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "width": 100, "height": 100} for i in images],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {
                "id": number, "image_id": image, "category_id": category, "bbox": list(box),
                "area": box[2] * box[3], "iscrowd": int(crowd == [True]),
            }
            for number, (image, category, box, *crowd) in enumerate(objects, start=1)
        ],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def found(*detections) -> list[dict]:
    """Of (image, class, box, score)."""
    return [
        {"image_id": i, "category_id": c, "bbox": list(box), "score": score}
        for i, c, box, score in detections
    ]


BOX, NEAR, FAR = (10, 10, 40, 40), (10, 30, 40, 40), (60, 60, 30, 30)
OBJECT = (1, CAT, BOX)


@pytest.mark.parametrize(
    "detection, kind",
    [
        ((1, DOG, BOX, 0.9), "class"),
        ((1, CAT, NEAR, 0.9), "localization"),  # 800 of 2400: one third
        ((1, DOG, NEAR, 0.9), "both"),
        ((1, CAT, FAR, 0.9), "background"),
        ((2, CAT, BOX, 0.9), "background"),  # another picture
    ],
)
def test_kinds(detection, kind):
    errors = find_errors(scenes(make_truth(OBJECT), found(detection)))
    missed = kind not in ("class", "localization")
    assert errors.counts() == {name: int(name == kind) for name in KINDS} | {"missed": int(missed)}
    assert errors.ap50() == 0
    # Where the error is mended, the object is found; of a missed one, no object is left.
    mended = kind in ("class", "localization")
    gains = errors.gains()
    assert [gains[name] for name in KINDS[:-1]] == [
        float(mended and name == kind) for name in KINDS[:-1]
    ]
    assert math.isnan(gains["missed"]) if missed else gains["missed"] == 0


def test_a_duplicate_costs_what_follows_it():
    truth = make_truth(OBJECT, (2, CAT, BOX))
    results = found((1, CAT, BOX, 0.9), (1, CAT, BOX, 0.8), (2, CAT, BOX, 0.7))
    errors = find_errors(scenes(truth, results))
    assert errors.counts()["duplicate"] == 1 and not errors.missed
    # Precision 1 up to a recall of 1/2 (51 of 101 places), then 2/3.
    assert errors.ap50() == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert errors.gains()["duplicate"] == pytest.approx(1 - errors.ap50())


def test_an_error_of_an_object_that_is_found_is_removed_when_mended():
    results = found((1, CAT, BOX, 0.5), (1, CAT, NEAR, 0.9))
    errors = find_errors(scenes(make_truth(OBJECT), results))
    assert errors.counts()["localization"] == 1 and errors.ap50() == pytest.approx(0.5)
    assert errors.gains()["localization"] == pytest.approx(0.5)


def test_two_errors_mend_an_object_once():
    results = found((1, DOG, BOX, 0.5), (1, DOG, BOX, 0.9))
    errors = find_errors(scenes(make_truth(OBJECT), results))
    assert errors.counts()["class"] == 2 and errors.gains()["class"] == 1


def test_crowds_do_not_count():
    truth = make_truth(OBJECT, (1, CAT, (50, 50, 50, 50), True))
    inside = found((1, CAT, FAR, 0.9), (1, CAT, BOX, 0.8))
    errors = find_errors(scenes(truth, inside))
    assert errors.ap50() == 1 and sum(errors.counts().values()) == 0
    other_class = found((1, DOG, FAR, 0.9))
    assert find_errors(scenes(truth, other_class)).counts()["background"] == 1


def test_nothing_at_all():
    errors = find_errors(scenes(make_truth(), []))
    assert math.isnan(errors.ap50()) and sum(errors.counts().values()) == 0
    assert score_pictures(scenes(make_truth(), [])) == []
    errors = find_errors(scenes(make_truth(OBJECT), []))
    assert errors.ap50() == 0 and errors.missed == [0]
    assert not confusion(scenes(make_truth(), []), [CAT, DOG]).any()


def test_confusion():
    truth = make_truth(OBJECT, (1, DOG, FAR), (2, DOG, BOX))
    results = found((1, DOG, BOX, 0.9), (1, DOG, FAR, 0.9), (2, CAT, FAR, 0.9), (2, DOG, BOX, 0.1))
    matrix = confusion(scenes(truth, results, threshold=0.5), [CAT, DOG])
    assert matrix.tolist() == [[0, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_pictures_from_the_best_to_the_worst():
    truth = make_truth(
        OBJECT, (2, CAT, BOX), (2, DOG, FAR), (3, CAT, BOX), (4, CAT, BOX), (4, DOG, FAR),
        images=range(1, 7),
    )  # fmt: skip
    results = found((1, CAT, BOX, 0.9), (2, CAT, BOX, 0.9), (2, DOG, FAR, 0.9), (5, CAT, FAR, 0.9))
    scores = score_pictures(scenes(truth, results))
    assert [s.image_id for s in scores] == [2, 1, 3, 5, 4]  # nothing is on the sixth
    assert [s.f1 for s in scores] == [1, 1, 0, 0, 0]
    assert (scores[-1].found, scores[-1].missed, scores[-1].false) == (0, 2, 0)


def random_scene(seed: int):
    """Objects, some of them crowds, and detections around them; scores with ties."""
    rng = np.random.default_rng(seed)
    objects, results = [], []
    for image in range(1, 9):
        for _ in range(rng.integers(0, 6)):
            box = (*rng.integers(0, 60, 2).tolist(), *rng.integers(5, 60, 2).tolist())
            category = int(rng.choice([CAT, DOG]))
            objects.append((image, category, box, bool(rng.random() < 0.15)))
            for _ in range(rng.integers(0, 4)):
                moved = [
                    max(1, side + int(step))
                    for side, step in zip(box, rng.integers(-9, 9, 4), strict=True)
                ]
                kind = category if rng.random() < 0.8 else CAT + DOG - category
                results.append((image, kind, moved, float(rng.integers(1, 20)) / 20))
    return make_truth(*objects, images=range(1, 9)), found(*results)


@pytest.mark.parametrize("seed", range(20))
def test_ap50_is_coco_s(seed):
    truth, results = random_scene(seed)
    errors, scores = find_errors(scenes(truth, results)), Scores(truth, results)
    assert errors.ap50() == pytest.approx(scores.ap(threshold=0.5), abs=1e-12)
    gains = errors.gains()
    assert all(gain >= -1e-12 for gain in gains.values())
    counts = errors.counts()
    assert all(gains[kind] == 0 for kind in KINDS[:-1] if not counts[kind])


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_coco_s(seed):
    truth, results = random_scene(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores = Scores(truth, results)
    assert scores.categories == [CAT, DOG]
    actual = [
        scores.ap(), scores.ap(threshold=0.5), scores.ap(threshold=0.75),
        *(scores.ap(area=area) for area in AREAS[1:]),
    ]  # fmt: skip
    np.testing.assert_allclose(np.nan_to_num(actual, nan=-1), evaluation.stats[:6], atol=1e-12)
    by_class = [scores.ap(category=category) for category in (CAT, DOG)]
    assert np.nanmean(by_class) == pytest.approx(scores.ap())
    assert scores.precision(threshold=0.5).mean() == pytest.approx(scores.ap(threshold=0.5))


def test_scores_of_no_objects_and_of_no_detections():
    assert math.isnan(Scores(make_truth(), []).ap())
    assert not Scores(make_truth(), []).precision(threshold=0.5).any()
    assert Scores(make_truth(OBJECT), []).ap() == 0
    assert math.isnan(Scores(make_truth(OBJECT), []).ap(category=DOG))


def test_of_equal_overlaps_the_last_object_is_taken_as_by_coco():
    truth = make_truth((1, CAT, (0, 0, 40, 40)), (1, CAT, (20, 0, 40, 40)))
    results = found((1, CAT, (10, 0, 40, 40), 0.9), (1, CAT, (0, 0, 40, 40), 0.8))
    errors = find_errors(scenes(truth, results))
    assert errors.ap50() == Scores(truth, results).ap(threshold=0.5) == 1


@pytest.mark.parametrize(("before", "ap"), [(99, 0.01), (100, 0)])
def test_the_hundred_highest_scores_of_a_class_count(before, ap):
    wrong = [(1, CAT, FAR, 0.9 - i / 1000) for i in range(before)]
    results = found(*wrong, (1, CAT, BOX, 0.5))
    errors = find_errors(scenes(make_truth(OBJECT), results))
    assert errors.ap50() == pytest.approx(ap)
    assert errors.ap50() == pytest.approx(Scores(make_truth(OBJECT), results).ap(threshold=0.5))


@pytest.mark.parametrize(("category", "kind"), [(CAT, "localization"), (DOG, "background")])
def test_an_overlap_of_a_tenth_is_of_the_right_class_alone_an_error_of_place(category, kind):
    truth, results = make_truth((1, CAT, (0, 0, 10, 10))), found((1, category, (0, 0, 10, 1), 0.9))
    assert find_errors(scenes(truth, results)).counts()[kind] == 1

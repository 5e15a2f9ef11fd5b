"""Everything about a run, or several beside each other, on one page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from ..analysis import count_multiply_adds, count_parameters
from ..analysis.objects import CocoPictures
from ..data.html import jpeg
from ..engine import EVALUATION_FILE, Predictor
from ..engine.checks import flat
from ..engine.detection import inference_folder
from ..engine.drawing import draw_pair, give_colours, to_instances
from ..engine.evaluator import LEFT_OUT_FILE
from ..engine.outputs import RESULTS_FILE
from ..engine.prediction import check_detects
from ..engine.record import CONFIG_FILE, TRAINING_FILE, last_checkpoint, read_metrics, run_config
from ..engine.trainer import by_task
from ..weights import write_text
from . import report_figures as figures
from .errors import KINDS, PictureScore, by_image, confusion, find_errors, scenes, score_pictures
from .report_looks import look
from .report_page import Picture, Section, Table, render_report
from .results import read_results
from .scores import AREAS, Scores, without_images

METRICS = "AP", "AP50", "AP75", "APs", "APm", "APl"
MOST_CONFUSED = 40  # more classes than these are no chart, but the most frequent confusions
MOST_CLASSES = 100  # of a chart
Progress = Callable[[Iterable, str], Iterable]


@dataclass(frozen=True)
class Run:
    """What a training has left.

    Attributes:
        metrics: the lines of metrics.json.
        evaluation: by task, or by data set and task; empty if there is none.
    """

    name: str
    folder: Path
    cfg: CfgNode
    metrics: list[dict]
    evaluation: dict[str, Any]

    def results(self, dataset: str) -> list[dict] | None:
        """The detections of the last evaluation on a data set, if there was one."""
        path = inference_folder(str(self.folder), dataset) / RESULTS_FILE
        return list(read_results(path)) if path.is_file() else None

    def left_out(self, dataset: str) -> set[int]:
        """The images that this evaluation could not read."""
        path = inference_folder(str(self.folder), dataset) / LEFT_OUT_FILE
        return set(json.loads(path.read_text())) if path.is_file() else set()

    def settings(self) -> str:
        """The YAML file that it was trained with."""
        path = self.folder / TRAINING_FILE
        return (path if path.is_file() else self.folder / CONFIG_FILE).read_text()


def read_run(folder: str | Path, name: str) -> Run:
    """
    Raises:
        FileNotFoundError: the folder is no run's.
        ValueError: it is a classifier's.
    """
    folder = Path(folder)
    cfg = run_config(folder)
    check_detects(cfg, folder)
    evaluation = folder / EVALUATION_FILE
    return Run(
        name,
        folder,
        cfg,
        read_metrics(folder),
        json.loads(evaluation.read_text()) if evaluation.is_file() else {},
    )


def write_report(
    runs: Sequence[Run],
    path: Path,
    *,
    versions: str,
    threshold: float = 0.5,
    count: int = 4,
    progress: Progress = lambda items, _: items,
) -> None:
    """Writes the page, whole or not at all, and makes its folder.

    Args:
        versions: what the page says of them.
        threshold: the least score of a detection in confusion matrices and on pictures.
        count: of the best and of the worst pictures, and of the objects whose fields are drawn.

    Raises:
        ValueError, OSError: a file of a run cannot be read, its weights are of no use, or the page
            cannot be where it shall.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(
            f"--output: expected a file in a folder that can be written, got {path}: give another"
        )
    sections = [_overview(runs), _training(runs)]
    for dataset in dict.fromkeys(name for run in runs for name in run.cfg.DATASETS.TEST):
        sections.append(_results(runs, dataset, threshold, count, progress))
    sections += _networks(runs, count, progress)
    sections += [_configuration(runs), Section("Versions", details=[("All versions", versions)])]
    title = ", ".join(run.name for run in runs)
    write_text(path, render_report(title, sections))


def _overview(runs: Sequence[Run]) -> Section:
    section = Section("Runs")
    rows: list[list[Any]] = []
    for run in runs:
        tables = by_task(run.evaluation)
        rows += [[run.name, task, *map(metrics.get, METRICS)] for task, metrics in tables.items()]
        if not tables:
            section.notes.append(
                f"{run.name}: no evaluation yet; train_net.py --eval-only with "
                f"--config-file {run.folder / CONFIG_FILE} makes one"
            )
    if rows:
        section.tables.append(Table("Average precision, %", ["run", "task", *METRICS], rows))
    facts = []
    for run in runs:
        steps = max((step + 1 for step, _ in figures.points(run.metrics, figures.LOSS)), default=0)
        last = last_checkpoint(run.folder)
        backbone = f"{run.cfg.MODEL.META_ARCHITECTURE}, {run.cfg.MODEL.BACKBONE.NAME}"
        seconds = [m["time"] for m in run.metrics if "time" in m]
        facts.append(
            [run.name, backbone, steps, run.cfg.SOLVER.MAX_ITER, run.cfg.SOLVER.IMS_PER_BATCH,
             sorted(seconds)[len(seconds) // 2] if seconds else None, last.name if last else None]
        )  # fmt: skip
    header = ["run", "network", "steps", "of", "images a step", "s a step", "last checkpoint"]
    section.tables.append(Table("Training", header, facts))
    return section


def _training(runs: Sequence[Run]) -> Section:
    section = Section("Training")
    metrics = {run.name: run.metrics for run in runs}
    section.add_chart(figures.draw_losses(metrics))
    section.add_chart(figures.draw_ap_curves(metrics))
    if not section.charts:
        section.notes.append("no metrics.json with steps: nothing has been trained here")
    return section


def _results(
    runs: Sequence[Run], dataset: str, threshold: float, count: int, progress: Progress
) -> Section:
    """What was found on a data set, by class, size and kind of error."""
    section = Section(f"Results on {dataset}")
    found = {run.name: run.results(dataset) for run in runs}
    section.notes += [f"{name}: not evaluated on it" for name, r in found.items() if r is None]
    results = {name: r for name, r in found.items() if r is not None}
    if not results:
        return section
    try:
        pictures = CocoPictures(dataset)
    except FileNotFoundError as error:
        section.notes.append(str(error))
        return section
    section.text = (
        "Errors as of TIDE (Bolya et al., 2020), at an IoU of 0.5: what AP50 would gain if those "
        "of one kind were mended. Confusions, and pictures (objects on the left, detections on the "
        f"right) are of scores of {threshold:g} and more."
    )
    left_out = {run.name: run.left_out(dataset) for run in runs if run.name in results}
    section.notes += [
        f"{name}: pictures that could not be read, and are left out: {len(missing)}"
        for name, missing in left_out.items() if missing
    ]  # fmt: skip
    truth = {name: without_images(pictures.truth, missing) for name, missing in left_out.items()}
    scores = {n: Scores(truth[n], r) for n, r in progress([*results.items()], "Scores")}
    section.tables.append(_by_size(scores))
    _add_classes(section, scores, pictures)
    section.add_chart(figures.draw_precision_recall(scores))
    gains, counts = {}, []
    for name, r in results.items():
        seen = scenes(truth[name], r, progress=lambda items: progress(items, "Errors"))
        errors = find_errors(seen)
        gains[name] = errors.gains()
        counts.append([name, *errors.counts().values()])
    section.add_chart(figures.draw_errors(gains))
    section.tables.append(Table("Number of errors, at all scores", ["run", *KINDS], counts))
    for name, r in results.items():
        seen = list(scenes(truth[name], r, threshold=threshold))
        categories = sorted(pictures.truth.cats)
        _add_confusion(section, name, pictures, confusion(seen, categories))
        _add_pictures(section, name, dataset, score_pictures(seen), r, threshold, count)
    return section


def _by_size(scores: Mapping[str, Scores]) -> Table:
    rows = [[name, *(100 * s.ap(area=area) for area in AREAS)] for name, s in scores.items()]
    return Table("AP by size, %", ["run", *AREAS], rows)


def _add_classes(section: Section, scores: Mapping[str, Scores], pictures: CocoPictures) -> None:
    values = {
        name: [100 * s.ap(category=category) for category in s.categories]
        for name, s in scores.items()
    }
    if len(pictures.categories) <= MOST_CLASSES:
        section.add_chart(figures.draw_class_ap(pictures.categories, values))
    else:
        rows = [list(row) for row in zip(pictures.categories, *values.values(), strict=True)]
        section.tables.append(Table("AP by class, %", ["class", *values], rows))


def _add_confusion(section: Section, name: str, pictures: CocoPictures, matrix) -> None:
    classes = pictures.categories
    if len(classes) <= MOST_CONFUSED:
        section.add_chart(figures.draw_confusion(name, classes, matrix))
        return
    pairs = [
        (int(matrix[i, j]), classes[i], classes[j])
        for i in range(len(classes)) for j in range(len(classes)) if i != j and matrix[i, j]
    ]  # fmt: skip
    rows = [[is_, as_, number] for number, is_, as_ in sorted(pairs, reverse=True)[:MOST_CONFUSED]]
    caption = f"{name}: most frequent confusions"
    section.tables.append(Table(caption, ["is", "found as", "times"], rows))


def _add_pictures(
    section: Section,
    name: str,
    dataset: str,
    ranked: Sequence[PictureScore],
    results: Sequence[dict],
    threshold: float,
    count: int,
) -> None:
    count = min(count, len(ranked) // 2)
    records = {record["image_id"]: record for record in DatasetCatalog.get(dataset)}
    metadata = give_colours(MetadataCatalog.get(dataset))  # after the records, which fill it
    found = by_image(r for r in results if r["score"] >= threshold)
    for title, chosen in ("best", ranked[:count]), ("worst", ranked[::-1][:count]):
        drawn = []
        for score in chosen:
            record = records.get(score.image_id)
            if record is None:
                continue
            size = record["height"], record["width"]
            instances = to_instances(found[score.image_id], size, metadata)
            caption = (
                f"{Path(record['file_name']).name}: {score.found} found, {score.missed} missed, "
                f"{score.false} false"
            )
            drawn.append(Picture(caption, jpeg(draw_pair(record, instances, metadata))))
        if drawn:
            section.pictures.append((f"{name}: {title} pictures", drawn))


def _networks(runs: Sequence[Run], count: int, progress: Progress) -> list[Section]:
    """What the networks cost, and what their kernels do, of all that have weights."""
    costs = Section("Cost", text="Multiply-adds are those of one picture, as the paper counts.")
    looks = Section(
        "What the kernels do",
        text="Effective receptive fields of the backbone's last stage, at objects from large to "
        "small; offsets of the same pictures. docs/seeing.md explains both.",
    )
    models: dict[str, tuple[CfgNode, nn.Module]] = {}
    for run in progress(runs, "Networks"):
        if not last_checkpoint(run.folder):
            costs.notes.append(f"{run.name}: no checkpoint yet")
            continue
        predictor = Predictor(run.folder)
        models[run.name] = predictor.cfg, predictor.model
    size = [_size(cfg) for cfg, _ in models.values()][:1]
    rows = []
    for name, (_, model) in models.items():
        image = torch.zeros(3, *size[0], device=next(model.parameters()).device)
        adds = count_multiply_adds(model, [{"image": image}])
        kinds = ", ".join(f"{kind} {n / 1e9:.1f}" for kind, n in adds.most_common())
        rows.append([name, count_parameters(model) / 1e6, sum(adds.values()) / 1e9, kinds])
    if rows:
        header = ["run", "million parameters", "G multiply-adds", "by layer, G"]
        costs.tables.append(Table(f"One image of {size[0][0]} x {size[0][1]}", header, rows))
        look(
            looks, models, count, progress,
            lambda dataset: {i for run in runs for i in run.left_out(dataset)},
        )  # fmt: skip
    return [looks, costs] if looks.charts or looks.notes else [costs]


def _size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width of an image of 3 : 2 at the configuration's test size.

    800, detectron2's own, is the shorter side where pictures keep their sizes: MIN_SIZE_TEST 0.
    """
    height = min(cfg.INPUT.MIN_SIZE_TEST or 800, int(cfg.INPUT.MAX_SIZE_TEST / 1.5))
    return height, int(1.5 * height)


def _configuration(runs: Sequence[Run]) -> Section:
    section = Section("Configuration")
    found = {run.name: flat(yaml.safe_load(run.settings())) for run in runs}
    keys = dict.fromkeys(key for settings in found.values() for key in settings)
    rows = []
    for key in keys:
        values = [settings.get(key) for settings in found.values()]
        if key != "OUTPUT_DIR" and any(value != values[0] for value in values):
            rows.append([key, *map(str, values)])
    if rows:
        section.tables.append(Table("Where they differ", ["key", *found], rows))
    section.details += [(f"{run.name}: all keys", run.settings()) for run in runs]
    return section

"""Training the detectors of the paper's Tables 3 and 4, and what came out beside its numbers."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from ..analysis import count_parameters
from ..analysis.field_survey import correlations
from ..data.stream import seeded
from ..engine import EVALUATION_FILE, Trainer, check_weights
from ..engine.record import read_metrics
from ..model_zoo import CONFIGS, load_config, paper_rows
from ..weights import write_checkpoint, write_text
from .submission import file_name

COMMANDS = "dk_detectron.commands"
TABLES = 3, 4
# COCO as in the paper; the small detectors of configs/demo, from scratch and from ImageNet weights.
SCALES = "coco", "shapes", "pretrained"
TEST_DEV = "coco_2017_test-dev"
# Metrics of COCO, and the paper's columns.
METRICS = {"AP": "map", "AP50": None, "APs": "map_s", "APm": "map_m", "APl": "map_l"}
RESULT_FILE, SETTINGS_FILE, LOG_FILE = "result.json", "settings.json", "reproduce.log"
STARTS = "starts"  # the folder of initial weights
# On shapes: the fields of this feature map, whose rank correlation with the objects is a metric.
FEATURE, FIELD = "backbone.bottom_up.res4", "object_size ~ field_size"


def row_name(row: dict[str, str]) -> str:
    """The name of a row of `paper_rows`: that of its classifier in configs/ImageNet."""
    stem = Path(row["config"]).stem
    return stem.removeprefix("faster_rcnn_").removesuffix("_1x").replace("_FPN", "")


def family(name: str) -> str:
    """The name of the rigid network of a row."""
    return "MNV2" if name.startswith("MNV2") else "R_50_DW"


def select_rows(tables: Iterable[int], names: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """The paper's rows by name, in its order; without names, all of the tables.

    Raises:
        ValueError: a name that is not in the tables.
    """
    rows = {row_name(row): row for row in paper_rows(*tables)}
    if unknown := set(names) - rows.keys():
        raise ValueError(f"--rows: expected some of {', '.join(rows)}, got {', '.join(unknown)}")
    return {name: row for name, row in rows.items() if not names or name in names}


@dataclass(frozen=True)
class Settings:
    """What all runs of a folder have in common, so that their results compare."""

    scale: str
    num_gpus: int = 1
    weights: str = ""
    opts: list[str] = field(default_factory=list)

    def save(self, output: Path) -> None:
        """Records the settings of a folder.

        Raises:
            FileExistsError: it has runs with other settings.
        """
        path = output / SETTINGS_FILE
        settings = vars(self)
        if path.exists():
            found = json.loads(path.read_text())
            if found != settings:
                raise FileExistsError(
                    f"{output}: expected runs with {settings}, found some with {found}: "
                    "give another --output"
                )
        else:
            write_text(path, json.dumps(settings, indent=2))


def check_scale(output: Path, scale: str) -> None:
    """Raises ``ValueError`` if a folder has runs of another scale, which has other tables.

    A folder of nothing but results does not tell its own.
    """
    path = output / SETTINGS_FILE
    found = json.loads(path.read_text())["scale"] if path.exists() else scale
    if found != scale:
        raise ValueError(f"--scale: expected {found}, as of the runs in {output}, got {scale}")


@dataclass(frozen=True)
class Run:
    """One training of one row.

    Attributes:
        config: what `train` trains.
        train: the commands that train and evaluate, or go on where they were stopped; on shapes,
            also the one that measures receptive fields.
        test_dev: the commands from the trained model to `archive`, the file for COCO's server.
        start: the rigid network whose random weights, in MODEL.WEIGHTS, all runs of the seed start
            from; None with weights that are given.
    """

    row: str
    seed: int
    folder: Path
    config: CfgNode
    train: list[list[str]]
    test_dev: list[list[str]]
    archive: Path
    start: CfgNode | None

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def commands(self) -> list[list[str]]:
        """Those that are still to run."""
        train = [] if (self.folder / RESULT_FILE).exists() else self.train
        return train + ([] if self.archive.exists() else self.test_dev)


def plan(
    rows: dict[str, dict[str, str]],
    settings: Settings,
    output: Path,
    seeds: Iterable[int],
    *,
    test_dev: bool = False,
) -> list[Run]:
    """The runs, all rows of a seed after another; nothing is written."""
    return [
        _plan_run(name, row, settings, output / name / f"seed_{seed}", seed, test_dev)
        for seed in seeds
        for name, row in rows.items()
    ]


def _plan_run(
    name: str, row: dict[str, str], settings: Settings, folder: Path, seed: int, test_dev: bool
) -> Run:
    config_file, opts, start = CONFIGS / row["config"], [], None
    if settings.scale != "coco":
        opts = _kernels_of(row)
        config_file = CONFIGS / "demo" / f"{settings.scale}_{family(name)}_FPN_dk_l3.yaml"
        if not config_file.exists():
            raise ValueError(
                f"--rows: expected rows of MobileNet-V2 for --scale {settings.scale}, got {name}"
            )
    if settings.weights:
        opts += ["MODEL.WEIGHTS", settings.weights.replace("{row}", name)]
    elif settings.scale == "shapes" and "MODEL.WEIGHTS" not in settings.opts[::2]:
        (rigid,) = select_rows(TABLES, [family(name)]).values()
        start = load_config(config_file, [*_kernels_of(rigid), *settings.opts])
        opts += ["MODEL.WEIGHTS", str(folder.parents[1] / STARTS / f"{family(name)}_{seed}.pth")]
    opts += [*settings.opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    train_net = [*_command("train_net"), "--config-file", str(config_file)]
    train_net += ["--num-gpus", str(settings.num_gpus)]
    algorithm, evaluation = f"{name}_seed{seed}", folder / "test-dev"
    config = load_config(config_file, opts)
    # Without a checkpoint, --resume starts from the beginning.
    train = [[*train_net, "--resume", *opts]]
    if settings.scale == "shapes":
        measure = [*_command("visualize_erf"), str(folder), "--table", "--feature", FEATURE]
        train += [[*measure, "--dataset", config.DATASETS.TEST[0], "--output-dir", str(folder)]]
    return Run(
        row=name,
        seed=seed,
        folder=folder,
        config=config,
        train=train,
        test_dev=_test_dev(train_net, opts, folder, evaluation, algorithm) if test_dev else [],
        archive=(evaluation / file_name(algorithm)).with_suffix(".zip"),
        start=start,
    )


def _kernels_of(row: dict[str, str]) -> list[str]:
    """The options that give a small detector the kernels of a row."""
    kernels = load_config(CONFIGS / row["config"]).MODEL.DEFORM_KERNEL.items()
    return [text for key, value in kernels for text in (f"MODEL.DEFORM_KERNEL.{key}", str(value))]


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", f"{COMMANDS}.{name}"]


def _test_dev(
    train_net: list[str], opts: list[str], folder: Path, evaluation: Path, algorithm: str
) -> list[list[str]]:
    later = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    later += ["DATASETS.TEST", f"('{TEST_DEV}',)", "OUTPUT_DIR", str(evaluation)]
    results = evaluation / "inference" / TEST_DEV / "coco_instances_results.json"
    submit = [*_command("make_testdev_submission"), str(results)]
    submit += [MetadataCatalog.get(TEST_DEV).json_file, str(evaluation), "--name", algorithm]
    return [[*train_net, "--eval-only", *opts, *later], submit]


def check(runs: Iterable[Run]) -> None:
    """Raises ``ValueError`` or ``FileNotFoundError`` if a run cannot work: before the first one."""
    for run in runs:
        cfg = run.config
        if len(cfg.DATASETS.TEST) != 1:
            raise ValueError(f"DATASETS.TEST: expected one data set, got {cfg.DATASETS.TEST}")
        extra = (TEST_DEV,) if run.test_dev else ()
        Trainer.check_datasets(cfg, cfg.DATASETS.TRAIN + cfg.DATASETS.TEST + extra)
        if run.start is None:
            check_weights(cfg, needed=False, resume=True)


def execute(run: Run) -> None:
    """Runs what is still to run, and records the results.

    Raises:
        RuntimeError: a command failed.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    write_start(run)
    log = run.folder / LOG_FILE
    for command in run.commands:
        with open(log, "a") as file:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if status:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
            raise RuntimeError(f"{run}: exit status {status}; the end of {log}:\n{tail}")
        if run.train and command is run.train[-1]:
            write_text(run.folder / RESULT_FILE, json.dumps(read_result(run), indent=2))


def write_start(run: Run) -> None:
    """Writes the initial weights of a run's seed, if it has such and no other run has been first.

    A deformable network takes them over exactly, as it does any rigid network's, so that all
    networks of a seed are one function before the first step.
    """
    path = Path(run.config.MODEL.WEIGHTS)
    if run.start is not None and not path.exists():
        path.parent.mkdir(exist_ok=True)
        with seeded(run.seed):
            write_checkpoint({"model": build_model(run.start).state_dict()}, path)


def read_result(run: Run) -> dict:
    """What a finished training left behind: metrics in percent, seconds, parameters."""
    metrics = json.loads((run.folder / EVALUATION_FILE).read_text())["bbox"]
    return {
        "row": run.row,
        "seed": run.seed,
        "dataset": run.config.DATASETS.TEST[0],
        **{metric: metrics[metric] for metric in METRICS},
        "field_correlation": _field_correlation(run),
        "parameters": count_parameters(build_model(run.config)),
        "train_seconds": _train_seconds(run.folder),
        "inference_seconds": _inference_seconds(run.folder / "log.txt"),
    }


def _field_correlation(run: Run) -> float | None:
    """Spearman's of objects' and fields' sizes, in percent; None if it was not measured.

    NaN, where all fields are dead, is None as well.
    """
    path = run.folder / f"fields_{run.folder.name}.csv"
    if not path.exists():
        return None
    with open(path, newline="") as file:
        found = correlations([*csv.DictReader(file)])[FIELD]
    return None if math.isnan(found) else 100 * found


def _train_seconds(folder: Path) -> float | None:
    """The median time of an iteration; None of a run of three, which detectron2 does not time."""
    times = [line["time"] for line in read_metrics(folder) if "time" in line]
    return median(times) if times else None


def _inference_seconds(path: Path) -> float | None:
    """The time of an image in the network, in the last evaluation."""
    pattern = r"Total inference pure compute time: .*\(([\d.]+) s / iter"
    found = re.findall(pattern, path.read_text(errors="replace"))
    return float(found[-1]) if found else None

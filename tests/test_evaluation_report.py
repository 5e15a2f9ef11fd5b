"""The report on runs: what is on the page, what is missing, and how a browser shows it."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_engine import CONFIG, OPTIONS, run_tool
from test_engine_prediction import datasets_root  # noqa: F401  (a fixture)

from dk_detectron.analysis.objects import CocoPictures
from dk_detectron.commands import report
from dk_detectron.data.html import jpeg
from dk_detectron.engine.detection import inference_folder
from dk_detectron.evaluation.report import _size, read_run, write_report
from dk_detectron.evaluation.report_figures import draw_ap_curves, draw_losses, points, smoothed
from dk_detectron.model_zoo import load_config

BROWSER = next(filter(shutil.which, ["chromium", "chromium-browser", "google-chrome"]), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-quic",
    "--disable-dev-shm-usage", "--enable-logging=stderr", "--dump-dom",
]  # fmt: skip
SECTIONS = [
    "Runs", "Training", "Results on DATA", "What the kernels do", "Cost", "Configuration",
    "Versions",
]  # fmt: skip


class Page(HTMLParser):
    """What a test asks of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.links, self.ids, self.addresses, self.titles = "", [], set(), [], []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self._open.append(tag)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        self.addresses += [found[key] for key in ("src", "xlink:href") if key in found]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        self.text += data
        if self._open and self._open[-1] == "h2":
            self.titles.append(re.sub("coco:.*", "DATA", data))
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1].append(data)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass


@pytest.fixture(scope="module")
def run(datasets_root, tmp_path_factory) -> Path:  # noqa: F811
    """Two steps, an average of weights, and an evaluation that finds something anywhere."""
    output = tmp_path_factory.mktemp("runs") / "run"
    data = datasets_root / "shapes"
    names = [
        f"('coco:{data}/annotations/instances_{s}.json:{data}/{s}',)" for s in ("train", "val")
    ]
    result = run_tool(
        "train_net.py", datasets_root, "--config-file", CONFIG, *OPTIONS, "OUTPUT_DIR", output,
        "DATASETS.TRAIN", names[0], "DATASETS.TEST", names[1], "SOLVER.EMA_DECAY", 0.5,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.MAX_ITER", 2,
            "MODEL.ROI_HEADS.NUM_CLASSES", 2, "TEST.DETECTIONS_PER_IMAGE", 5,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return output


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Runs the command and reads the page."""

    def make(*arguments) -> Page:
        output = tmp_path / "report.html"
        monkeypatch.setattr("sys.argv", ["report", *map(str, arguments), "--output", str(output)])
        report.main()
        return Page(output)

    return make


@pytest.fixture
def other(run, tmp_path) -> Path:
    """The run's copy, which can be changed."""
    return Path(shutil.copytree(run, tmp_path / "other <run> $1$"))


def test_all_is_on_the_page(run, make, capsys):
    page = make(run)
    assert page.titles == SECTIONS
    assert re.fullmatch(r"Report: .*/report.html\n", capsys.readouterr().out)
    assert page.links == [f"#s{i + 1}" for i in range(len(SECTIONS))]
    assert {link[1:] for link in page.links} <= page.ids
    measured = json.loads((run / "evaluation.json").read_text())
    for task in "bbox", "bbox_ema":
        (row,) = [row for row in page.rows if row[:2] == ["run", task]]
        ap = measured[task]["AP"]
        assert float(row[2]) == pytest.approx(ap, abs=0.05)
    assert ["run", "GeneralizedRCNN, build_mobilenetv2_fpn_backbone", "2", "2", "2"] in [
        row[:5] for row in page.rows
    ]
    assert "SOLVER:" in page.text and "detectron2" in page.text


def test_several_runs_stand_beside_each_other(run, other, make):
    text = (other / "training.yaml").read_text()
    (other / "training.yaml").write_text(text.replace("EMA_DECAY: 0.5", "EMA_DECAY: 0.25"))
    page = make(run, other)
    assert [row for row in page.rows if row[0] == "SOLVER.EMA_DECAY"] == [
        ["SOLVER.EMA_DECAY", "0.5", "0.25"]
    ]
    first, second = [row for row in page.rows if row[0].endswith("/run") or "$1$" in row[0]][-2:]
    assert first[0].endswith("/run") and second[0].endswith("/other <run> $1$")
    assert first[1:] == second[1:]


def test_what_a_run_has_not_is_said(run, other, make):
    for name in "evaluation.json", "last_checkpoint":
        (other / name).unlink()
    shutil.rmtree(other / "inference")
    with open(other / "metrics.json", "a") as file:
        file.write('{"iteration": 9, "total_lo')  # torn
    page = make(other)
    for text in "no evaluation yet", "not evaluated on it", "no checkpoint yet":
        assert f"{other.name}: {text}" in page.text
    assert page.titles == [title for title in SECTIONS if title != "What the kernels do"]


def test_without_metrics_and_without_data(run, other, make, monkeypatch, tmp_path):
    (other / "metrics.json").unlink()
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub("coco:.*", "coco:no.json:no", text))
    (folder,) = (other / "inference").iterdir()
    folder.rename(inference_folder(other, "coco:no.json:no"))
    page = make(other)
    assert "nothing has been trained here" in page.text
    assert page.text.count("expects its json_file at no.json") >= 2


@pytest.mark.parametrize("kept", [["annotations"], []], ids=["no-objects", "test-set"])
def test_a_data_set_without_objects(kept, other, make, tmp_path):
    (folder,) = (other / "inference").iterdir()
    config = (other / "config.yaml").read_text()
    json_file, images = re.search(r"coco:(.*val\.json):(\S*/val)\b", config).groups()
    content = json.loads(Path(json_file).read_text())
    content = {key: content[key] for key in ("images", "categories")} | {key: [] for key in kept}
    (tmp_path / "bare.json").write_text(json.dumps(content))
    name = f"coco:{tmp_path / 'bare.json'}:{images}"
    (other / "config.yaml").write_text(re.sub(r"coco:\S*val\.json:\S*/val\b", name, config))
    folder.rename(inference_folder(other, name))
    page = make(other)
    assert "expected objects, got none that is not a crowd" in page.text
    assert [row[1:] for row in page.rows if len(row) == 5 and row[0] == other.name] == [["–"] * 4]


def test_pictures_that_could_not_be_read_are_no_part_of_it(other, make, monkeypatch):
    (folder,) = (other / "inference").iterdir()
    results = json.loads((folder / "coco_instances_results.json").read_text())
    missing = results[0]["image_id"]
    kept = [r for r in results if r["image_id"] != missing]
    (folder / "coco_instances_results.json").write_text(json.dumps(kept))
    note = f"{other.name}: pictures that could not be read, and are left out: 1"
    whole = make(other, "--count", 99)
    read, unreadable = CocoPictures.read, "expected a picture, got what cannot be read"

    def read_others(self, image_id, *args, **options):
        if image_id == missing:
            raise ValueError(unreadable)
        return read(self, image_id, *args, **options)

    monkeypatch.setattr(CocoPictures, "read", read_others)
    (folder / "left_out.json").write_text(json.dumps([missing]))
    without = make(other, "--count", 99)
    assert unreadable not in without.text
    assert note in without.text and note not in whole.text
    shown = [page.text.count(".png: ") for page in (whole, without)]
    assert shown[0] > shown[1] > 0


def test_dead_fields_are_said(other, make):
    path = other / "model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    (last,) = [k for k in checkpoint["model"] if k.endswith("res5.3.conv3.norm.weight")]
    checkpoint["model"][last].zero_()
    torch.save(checkpoint, path)
    page = make(other)
    assert f"{other.name}: at 4 of 4 objects the field is zero everywhere" in page.text


def test_what_is_no_run(run, other, make, tmp_path):
    with pytest.raises(SystemExit, match="RUN_DIR: expected the OUTPUT_DIR of a training, got .*"):
        make(tmp_path)
    text = (other / "config.yaml").read_text()
    classifier = text.replace(
        "META_ARCHITECTURE: GeneralizedRCNN", "META_ARCHITECTURE: ImageClassifier"
    )
    (other / "config.yaml").write_text(classifier)
    with pytest.raises(ValueError, match="expected the run of a detector"):
        read_run(other, "other")
    for wrong in ["--count", "0"], ["--threshold", "2"]:
        with pytest.raises(SystemExit):
            make(run, *wrong)


def test_the_folder_of_the_page_is_made_before_all_work(tmp_path):
    write_report([], tmp_path / "new" / "report.html", versions="")
    assert (tmp_path / "new" / "report.html").is_file()
    with pytest.raises(OSError):  # not an error of the runs, which are none
        write_report([None], tmp_path / "new" / "report.html" / "report.html", versions="")
    with pytest.raises(OSError, match="^--output: expected a file in a folder .*new: give another"):
        write_report([None], tmp_path / "new", versions="")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_to_is_said_before_all_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="^--output: expected a file in a folder that can be writt"):
        write_report([None], tmp_path / "report.html", versions="")


def test_pictures_that_keep_their_sizes_have_a_cost():
    assert _size(load_config(CONFIG, ["INPUT.MIN_SIZE_TEST", 600])) == (600, 900)
    assert _size(load_config(CONFIG, ["INPUT.MIN_SIZE_TEST", 0, "INPUT.MAX_SIZE_TEST", 1333])) == (
        800, 1200,
    )  # fmt: skip


def test_damaged_weights_are_said_and_no_page_is_left(other, make, tmp_path):
    (other / "model_final.pth").write_bytes(b"<html>")
    with pytest.raises(SystemExit, match="model_final.pth"):
        make(other)
    assert not (tmp_path / "report.html").exists()


def test_it_stands_alone(run, make, tmp_path):
    page = make(run)
    assert page.addresses and all(a.startswith(("data:", "#")) for a in page.addresses)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "default-src 'none'" in text
    assert not re.search(r"url\((?!#|\"data:|data:)", text)


def test_smoothing():
    assert smoothed([3.0]) == pytest.approx([3])
    np.testing.assert_allclose(smoothed([2.0] * 100), 2)
    steps = smoothed([0.0] * 50 + [1.0] * 50)
    assert steps[49] == 0 and 0.19 < steps[50] < 0.22 and steps[-1] > 0.999


def test_what_a_resumed_run_has_done_again_is_drawn_once():
    steps = [*range(19, 200, 20), *range(119, 160, 20)]  # resumed from a checkpoint of step 100
    lines = [{"iteration": step, "total_loss": place} for place, step in enumerate(steps)]
    lines.insert(-1, {"iteration": 129, "bbox/AP": 7.0})  # within a write, in any order
    expected = [(19, 0), (39, 1), (59, 2), (79, 3), (99, 4), (119, 10), (139, 11), (159, 12)]
    assert points(lines, "total_loss") == expected
    losses, average = draw_losses({"run": lines}).axes[0].lines
    assert losses.get_xydata().tolist() == [[*point] for point in expected]
    assert len(average.get_xdata()) == len(expected)
    assert points(lines, "bbox/AP") == [(129, 7.0)]


def test_what_could_not_be_measured_is_no_curve():
    """AP is null where there is no object: the other curves are drawn all the same."""
    lines = [{"iteration": 9, "bbox/AP": 5.0, "keypoints/AP": None}]
    (curve,) = draw_ap_curves({"run": lines}).axes[0].lines
    assert curve.get_xydata().tolist() == [[9, 5]] and curve.get_label() == "run"
    assert draw_ap_curves({"run": [{"iteration": 9, "bbox/AP": None}]}) is None


def test_any_names_of_many_runs_are_told_apart():
    start, rest = "faster_rcnn_R_50_DW_FPN_dk_global_", "_with_a_learning_rate_of_its_own"
    names = ["_first", "$\\frac$", *(f"{start}{i}{rest}" for i in range(10))]
    names += [f"{start}with{rest}_and_{i}" for i in range(10)]
    figure = draw_losses({name: [{"iteration": 9, "total_loss": 1.0}] for name in names})
    FigureCanvasAgg(figure).draw()  # which is when a formula is read
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:2] == [" _first", r"\$\frac\$"]
    assert len({*texts}) == len(names) and max(map(len, texts)) <= 72
    assert len({tuple(line.get_color()) for line in figure.axes[0].lines}) == len(names)


def test_a_picture_is_in_its_address():
    assert jpeg(np.zeros((4, 4, 3), np.uint8)).startswith("data:image/jpeg;base64,/9j/")


MEASURE = """<script>
const sizes = {};
window.onerror = message => { sizes.error = message; };
window.onload = () => {
  sizes.overflow = document.documentElement.scrollWidth - window.innerWidth;
  sizes.images = [...document.images].filter(i => i.complete && i.naturalWidth > 0).length;
  sizes.charts = [...document.querySelectorAll("svg")].filter(s => s.clientHeight > 20).length;
  sizes.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.title = "measured " + JSON.stringify(sizes);
};</script></body>"""


def browse(page: Path, width: int, dark: bool, profile: Path) -> tuple[str, str]:
    """The document as the browser has it in the end, and what it writes to its log."""
    flags = [
        f"--window-size={width},900", f"--user-data-dir={profile}",
        f"--blink-settings=preferredColorScheme={int(not dark)}",
    ]  # fmt: skip
    command = [BROWSER, *FLAGS, *flags, page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> None:
    """One that starts here: a container may lack what it needs."""
    if BROWSER is None:
        pytest.skip("needs Chromium")
    profile = f"--user-data-dir={tmp_path_factory.mktemp('browser')}"
    command = [BROWSER, *FLAGS, profile, "data:text/html,<p>it starts</p>"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "it starts" not in result.stdout:
        pytest.skip(f"{BROWSER} does not start: {result.stderr[-300:]}")


@pytest.mark.usefixtures("browser")
@pytest.mark.parametrize("width", [500, 1280], ids=["phone", "desk"])  # Chromium's least: 500
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(width, dark, run, make, tmp_path):
    page = make(run)
    path = tmp_path / "report.html"
    document, log = browse(path, width, dark, tmp_path / "profile")
    assert "CONSOLE" not in log  # an error, or a request that the page forbids itself
    assert "What the kernels do" in document
    # The page lets no script run: a copy without that rule is measured.
    text = re.sub(r"<meta http-equiv.*?>", "", path.read_text(), flags=re.DOTALL)
    path.write_text(text.replace("</body>", MEASURE))
    document, log = browse(path, width, dark, tmp_path / "profile")
    found = re.search(r"<title>measured (.*?)</title>", document)
    assert found, log[-3000:]
    measured = json.loads(found[1])
    assert measured["overflow"] <= 0
    assert measured["images"] == sum(a.startswith("data:image/jpeg") for a in page.addresses) > 0
    assert measured["charts"] >= 6
    assert measured["dark"] == dark and "error" not in measured

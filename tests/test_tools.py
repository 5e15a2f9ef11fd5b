"""The benchmark tools on tiny sizes: what they report, not how fast anything is."""

import gc
import importlib.util
import json
import math
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from dk_detectron.data import datasets
from dk_detectron.data.shapes import write_split
from dk_detectron.layers import DeformKernelConv2d, LocalDeformKernel2d

F32 = torch.float32
TOOLS = Path(__file__).resolve().parents[1] / "tools"


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark_ops():
    tool = load_tool("benchmark_ops")
    tool.OTHER_BYTES = 2**10  # nobody looks at the times
    return tool


@pytest.mark.parametrize(
    "change",
    [
        {}, {"stride": 2}, {"data_offset": True}, {"channels_last": False}, {"offsets": "one cell"},
        {"groups": 1, "out": 6}, {"groups": 2, "data_offset": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_contender_is_measured(benchmark_ops, dtype, change):
    workload = benchmark_ops.Workload("tiny", 1, 8, 6, 7, **change)
    contenders = ["rigid", "ours", "composed", "torchvision DCN"]
    rows = benchmark_ops.measure(workload, contenders, "cpu", dtype, rounds=2)
    names = contenders if dtype == torch.float32 else contenders[:3]
    assert [(r["contender"], r["pass"]) for r in rows] == [
        (name, direction) for name in names for direction in ("forward", "backward")
    ]
    for row in rows:
        assert row["accurate"], row
        for state in "cold", "warm":
            times = row[state]
            least, most = times["range"]
            assert 0 < least <= times["milliseconds"] <= most
            assert times["over_rigid"] > 0 and times["over_copy"] > 0
            assert times["over_rigid"] == 1 or row["contender"] != "rigid"
    assert all(r["repeatable"] for r in rows if r["contender"] == "ours")
    if "groups" in change:  # so few columns that both hold all of them
        return
    composed, ours = (
        next(r["extra_bytes"] for r in rows if r["contender"] == name)
        for name in ("composed", "ours")
    )
    assert composed > ours


@pytest.mark.parametrize("direction, gradients", [("forward", 0), ("backward", 1)])
def test_time_over_the_bytes_at_the_speed_of_a_copy(benchmark_ops, direction, gradients):
    workload = benchmark_ops.Workload("tiny", 1, 8, 6, 7)
    rows = benchmark_ops.measure(workload, ["rigid", "ours"], "cpu", F32, rounds=1)
    image, offset = 8 * 6 * 7, 18 * 6 * 7
    for contender, inputs in ("rigid", image + 8 * 9), ("ours", image + 8 * 16 + offset):
        (row,) = (r for r in rows if (r["contender"], r["pass"]) == (contender, direction))
        assert row["least_bytes"] == 4 * ((1 + gradients) * inputs + image)
        for times in row["cold"], row["warm"]:
            expected = times["over_copy"] * 4 * 2 * image / row["least_bytes"]
            assert times["over_floor"] == pytest.approx(expected)


@pytest.mark.parametrize("data_offset", [False, True], ids=["DK", "DCN + DK"])
def test_memory_of_dense_convolutions_does_not_grow_with_the_image(benchmark_ops, data_offset):
    """Beyond the results: one tile's columns and gradients, and a few weights."""
    extra = []
    for size in 64, 128:
        options = {"groups": 1, "data_offset": data_offset}
        w = benchmark_ops.Workload("image", 1, 64, size, size, **options)
        calls = benchmark_ops.Calls(benchmark_ops.ours, w, benchmark_ops.draw_inputs(w, "cpu", F32))
        extra.append(
            [benchmark_ops.traced(call, "cpu")[1] for call in (calls.forward, calls.backward)]
        )
    # 512 pixels of 16 * 64 columns, their outputs twice, gradient, and what their taps read.
    tile, weight = 4 * 512 * 64, 4 * 16 * 64**2
    for forward, backward in extra:
        assert forward < 1.05 * (tile * (16 + 2) + weight)
        assert backward < 1.05 * (tile * (2 * 16 + 9 + 1) + 4 * weight)
    assert 4 * 128 * 128 * 64 * 16 > 10 * extra[1][0]  # all columns at once


def test_cold_calls_follow_other_memory_and_warm_ones_their_own(benchmark_ops, monkeypatch):
    order = []

    def contender(name):
        def call(w, t):
            order.append(name)
            return benchmark_ops.rigid(w, t)

        return call

    for name in "rigid", "ours":
        monkeypatch.setitem(benchmark_ops.CONTENDERS, name, contender(name))
    time_once = benchmark_ops.time_once
    monkeypatch.setattr(
        benchmark_ops, "time_once", lambda *a: order.append("time") or time_once(*a)
    )
    monkeypatch.setattr(benchmark_ops, "fill_cache", lambda: order.append("fill"))
    monkeypatch.setattr(benchmark_ops, "accurate", lambda *_: True)
    workload = benchmark_ops.Workload("tiny", 1, 8, 6, 7)
    benchmark_ops.measure(workload, ["rigid", "ours"], "cpu", torch.float32, rounds=2)
    a_round = ["fill", "time", "time"]  # the copy
    for name in "rigid", "ours":
        a_round += ["fill", "time", name, "time"] + [name] * benchmark_ops.WARM_CALLS
        a_round += ["fill", "time", "time"]  # backward
    assert order[-2 * len(a_round) :] == a_round * 2


def test_nothing_else_is_collected_while_time_runs(benchmark_ops):
    collecting = []
    benchmark_ops.time_once([lambda: collecting.append(gc.isenabled())] * 2, "cpu")
    assert collecting == [False, False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        benchmark_ops.time_once([lambda: 1 / 0], "cpu")
    assert gc.isenabled()


@pytest.mark.parametrize("data_offset", [False, True], ids=["DK", "DCN + DK"])
def test_the_layer_is_the_one_of_the_workload(benchmark_ops, monkeypatch, data_offset):
    used = []
    for name in "LocalDeformKernel2d", "DeformKernelConv2d":
        layer = getattr(benchmark_ops, name)
        monkeypatch.setattr(
            benchmark_ops, name, lambda *a, layer=layer, **k: used.append(layer) or layer(*a, **k)
        )
    workload = benchmark_ops.Workload("tiny", 1, 8, 6, 7, data_offset=data_offset)
    measured = benchmark_ops.measure_layer(workload, "cpu", F32, rounds=1)
    assert used == [DeformKernelConv2d if data_offset else LocalDeformKernel2d]
    assert measured["over_rigid"] > 0


def test_what_is_called_compiled_is_compiled(monkeypatch):
    """In each of many workloads; where one alone has too many shapes, an error."""
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    tool = load_tool("benchmark_ops")
    for width in range(5, 10):
        workload = tool.Workload("tiny", 1, 2, 6, width, data_offset=width > 7)
        tool.measure(workload, ["rigid", "compiled"], "cpu", F32, rounds=1)
    assert len(graphs) == 5 * 2  # with gradients and without

    sets = [tool.draw_inputs(replace(workload, h=h), "cpu", F32) for h in range(2, 11)]
    with pytest.raises(Exception, match="fullgraph"):
        for tensors in sets:
            tool.compiled(workload, tensors)


def test_a_wrong_contender_does_not_rank(benchmark_ops, monkeypatch, capsys, tmp_path):
    def wrong(w, t):
        output, by = benchmark_ops.ours(w, t)
        return output * 1.01, by

    monkeypatch.setitem(benchmark_ops.CONTENDERS, "wrong", wrong)
    workload = benchmark_ops.Workload("tiny", 1, 8, 6, 7)
    rows = benchmark_ops.measure(workload, ["rigid", "ours", "wrong"], "cpu", torch.float32, 1)
    assert [r["accurate"] for r in rows] == [True, True, True, True, False, False]
    benchmark_ops.print_tables(rows, [])
    printed = capsys.readouterr().out
    assert "wrong (inaccurate: not ranked)" in printed
    ranking = printed.split("times faster than")[1].split("\n\n")[1]
    header, _, line = ([x.strip() for x in line.split("|")] for line in ranking.splitlines())
    ranks = dict(zip(header, line, strict=True))
    assert ranks["wrong"] == "–" and float(ranks["rigid"]) > 0

    heights = []
    monkeypatch.setattr("matplotlib.axes.Axes.bar", lambda self, x, h, *a, **k: heights.append(h))
    benchmark_ops.plot(rows, tmp_path / "plot.png")
    assert [math.isnan(height) for (height,) in heights] == [False, False, True] * 2
    benchmark_ops.check_ours(rows, F32)


def test_if_ours_is_wrong_nothing_passes(benchmark_ops, monkeypatch, capsys, tmp_path):
    """All is written first."""
    monkeypatch.setattr(benchmark_ops, "GATE", {F32: 0.0})
    tiny = [benchmark_ops.Workload("tiny", 1, 8, 6, 7)]
    monkeypatch.setattr(benchmark_ops, "workloads", lambda quick, dense, device: tiny)
    report = tmp_path / "report.json"
    arguments = ["--quick", "--rounds", "1", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", ["benchmark_ops.py", *arguments])
    with pytest.raises(SystemExit, match="ours: expected results within 0 .* got others on tiny"):
        benchmark_ops.main()
    assert report.exists()
    assert "| tiny | – | – |" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("what", ["output", "kernel_offset", "scope"])
def test_what_is_timed_is_what_is_compared(benchmark_ops, monkeypatch, what):
    """Of a call that goes wrong for the last image alone, and only if that is large."""

    def wrong(w, t):
        output, by = benchmark_ops.ours(w, t)
        if w.n * w.w < 100:
            return output, by
        if what == "output":
            return output + torch.eye(w.w)[-1] * (torch.arange(w.n) == 1).view(-1, 1, 1, 1), by
        # The value stays.
        some = t[what][-1, -1, 0, 0]
        return output + some - some.detach(), by

    monkeypatch.setitem(benchmark_ops.CONTENDERS, "wrong", wrong)
    for w, right in (30, True), (50, False):
        workload = benchmark_ops.Workload("large", 2, 8, 3, w, offsets="normal 0.3")
        names = ["rigid", "ours", "wrong"]
        rows = benchmark_ops.measure(workload, names, "cpu", torch.float32, 1)
        assert [r["accurate"] for r in rows] == [True] * 4 + [right] * 2


@pytest.mark.parametrize("name", ["rigid", "composed", "torchvision DCN"])
def test_image_by_image_is_all_at_once(benchmark_ops, name):
    contender = benchmark_ops.CONTENDERS[name]
    workload = benchmark_ops.Workload("batch", 3, 4, 6, 7, groups=2, data_offset=True)
    tensors = benchmark_ops.draw_inputs(workload, "cpu", torch.float64)
    tensors = {
        name: t.detach().double().requires_grad_(name != "grad") for name, t in tensors.items()
    }
    calls = benchmark_ops.Calls(contender, workload, tensors)
    results = [calls.forward(), *calls.backward()]
    exact = benchmark_ops.exact_results(contender, workload, tensors)
    assert [x.shape for x in exact] == [x.shape for x in results]
    for a, b in zip(results, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_workloads_of_dense_convolutions(benchmark_ops):
    quick, all_of_them = (benchmark_ops.workloads(quick, True, "cpu") for quick in (True, False))
    assert [(w.c, w.groups, w.scope) for w in quick] == [(64 * 2**i, 1, 4) for i in range(4)]
    assert all_of_them[:4] == quick
    assert {(w.kernel, w.scope) for w in all_of_them} >= {(1, 2), (3, 4)}
    assert len({w.name for w in all_of_them}) == len(all_of_them)


def test_tables_json_and_plot(benchmark_ops, monkeypatch, capsys, tmp_path):
    tiny = [benchmark_ops.Workload("tiny", 1, 8, 6, 7)]
    monkeypatch.setattr(benchmark_ops, "workloads", lambda quick, dense, device: tiny)
    report, picture = tmp_path / "new" / "report.json", tmp_path / "other" / "plot.png"
    arguments = ["--quick", "--rounds", "1", "--json", report, "--plot", picture]
    monkeypatch.setattr(sys, "argv", ["benchmark_ops.py", *map(str, arguments)])
    benchmark_ops.main()
    printed = capsys.readouterr().out
    assert "times faster than" in printed and printed.count("cold, ms") == 2
    rows = json.loads(report.read_text())["rows"]
    assert {r["contender"] for r in rows} == {"rigid", "ours", "composed"}
    assert all(r[state]["milliseconds"] > 0 for r in rows for state in ("cold", "warm"))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--json", "."], "--json: expected a file, got the folder '.'"),
        (["--plot", "/dev/null/plot.png"], "--plot: expected a file in a folder"),
    ],
    ids=str,
)
def test_files_that_cannot_be_are_refused_before_measuring(
    benchmark_ops, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(benchmark_ops, "measure", lambda *_: pytest.fail("has begun"))
    monkeypatch.setattr(sys, "argv", ["benchmark_ops.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark_ops.main()
    assert message in capsys.readouterr().err


def test_a_study_has_a_row_for_each_number_of_steps_and_its_seeds_in_order():
    tool = load_tool("study_start")
    results = [
        {**asdict(tool.FineTuningRun("", "", "ours", 0.1, 0.1, 0.005, seed, steps)), **found}
        for seed, steps, found in (
            (1, 200, {"diverged": None, "loss": 2.0}),
            (0, 400, {"diverged": None, "loss": 1.0}),
            (0, 200, {"diverged": 17, "loss": None}),
        )
    ]
    tool.kernels = lambda *_: "3x3 local"
    rows = tool.tabulate_first_steps(results).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[-2:] for row in cells] == [["200", "† 17, 2.00"], ["400", "1.00"]]


def test_a_study_leaves_no_folder_behind(monkeypatch):
    tool = load_tool("study_start")
    folders = []

    class Trainer:
        def __init__(self, cfg):
            folders.append(Path(cfg.OUTPUT_DIR))
            assert folders[0].is_dir()

        def resume_or_load(self, resume):
            assert not resume

    monkeypatch.setattr(tool, "Trainer", Trainer)
    monkeypatch.setattr(tool, "load_config", lambda *_: SimpleNamespace(SEED=0))
    assert isinstance(tool.build_trainer("config", []), Trainer)
    assert not folders[0].exists()


def test_models_are_measured_against_the_rigid_one(monkeypatch, capsys, tmp_path):
    tool = load_tool("benchmark_model")
    report = tmp_path / "models.json"
    arguments = "--family MNV2 --only dk_l3 dcn --size 64 96 --rounds 1 --json".split()
    monkeypatch.setattr(sys, "argv", ["benchmark_model.py", *arguments, str(report)])
    tool.main()
    rows = {(r["network"], r["pass"]): r for r in json.loads(report.read_text())["rows"]}
    networks = "rigid", "dcn", "dcn, torchvision", "dk_l3"
    assert {name for name, _ in rows} == set(networks)
    assert all(row["milliseconds"] > 0 for row in rows.values())
    table = capsys.readouterr().out
    assert all(f"| MNV2 | {name} " in " ".join(table.split()) for name in networks)
    assert rows["rigid", "inference"]["over_rigid"] == 1


def test_every_row_of_the_tables_is_a_network():
    tool = load_tool("benchmark_model")
    names = [name for family in tool.FAMILIES for name in tool.networks(family)]
    assert len(names) == 18
    assert names.count("rigid") == 2


def test_torchvision_stands_in_with_equal_results():
    tool = load_tool("benchmark_model")
    config = tool.networks("MNV2")["dcn"]
    ours, theirs = tool.build(config, "cpu"), tool.use_torchvision(tool.build(config, "cpu"))
    for model in ours, theirs:
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "offset_generator" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    assert any(type(m) is tool.TorchvisionDeformConv2d for m in theirs.modules())
    x = torch.randn(1, 3, 64, 64)
    ours, theirs = (m.backbone.bottom_up(x)["res5"] for m in (ours.eval(), theirs.eval()))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * ours.abs().max().item())


@pytest.fixture
def benchmark_data(tmp_path, monkeypatch):
    """The tool, with twelve drawn shapes in the place of the data set."""
    write_split(tmp_path / "shapes", "train", 12, seed=0, side=64)
    splits = {name: file for name, file in datasets.SPLITS.items() if name == "shapes_train"}
    monkeypatch.setattr(datasets, "SPLITS", splits)

    def register(root):
        DatasetCatalog.remove("shapes_train")
        MetadataCatalog.remove("shapes_train")
        datasets.register_all(root)

    register(tmp_path)
    yield load_tool("benchmark_data")
    register(datasets.datasets_root())


def test_data_loading_is_measured_against_training(benchmark_data, monkeypatch, capsys):
    config = TOOLS.parent / "configs" / "demo" / "shapes_MNV2_FPN_dk_l3.yaml"
    arguments = f"--config-file {config} --workers 0 2 --images 8 --steps 1"
    small = "INPUT.MIN_SIZE_TRAIN (64,) SOLVER.IMS_PER_BATCH 2"
    monkeypatch.setattr(sys, "argv", f"benchmark_data.py {arguments} {small}".split())
    benchmark_data.main()
    report = capsys.readouterr().out
    first, second, _ = report.split("\n\n")
    stages = [line.split("|")[1:-1] for line in first.splitlines()[2:]]
    assert [name.strip() for name, _, _ in stages] == ["decode", "augment", "collate"]
    assert sum(float(share) for _, _, share in stages) == pytest.approx(100, abs=2)
    rows = [[float(x) for x in line.split("|")[1:-1]] for line in second.splitlines()[2:]]
    assert [row[0] for row in rows] == [0, 2]
    assert all(rate > 0 and over > 0 for _, rate, over in rows)
    assert "Recommended: DATALOADER.NUM_WORKERS" in report


@pytest.mark.parametrize(
    ("need", "workers", "starves"),
    [(None, 4, False), (10.0, 2, False), (30.0, 2, False), (500.0, 4, True)],
)
def test_the_recommendation_is_the_fewest_workers_that_suffice(need, workers, starves):
    tool = load_tool("benchmark_data")
    rates = {0: 20.0, 2: 38.0, 4: 60.0, 8: 61.0}
    text = tool.advice(rates, need, {"decode": 9.0, "augment": 4.0, "collate": 0.1})
    assert text.startswith(f"DATALOADER.NUM_WORKERS {workers}")
    assert ("the model waits" in text and "decode" in text) == starves

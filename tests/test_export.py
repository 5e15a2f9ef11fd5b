"""Files that run without Python code compute what the network does, at any size of an image."""

import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from sklearn.datasets import load_sample_image
from torch import nn

from dk_detectron.commands import export as command
from dk_detectron.export import ExportError, _paired, export, operators
from dk_detectron.layers import KINDS, LocalDeformKernel2d
from dk_detectron.model_zoo import CONFIGS, load_config
from dk_detectron.modeling import FeatureList, mobilenet_v2, resnet_dw

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore:deform_kernel_conv2d runs composed",
    "ignore:Converting a tensor to a Python:torch.jit.TracerWarning",
    "ignore:.*:DeprecationWarning",
)


@pytest.fixture
def onnx():
    pytest.importorskip("onnxruntime", reason="needs dk_detectron[onnx]")
    return pytest.importorskip("onnx", reason="needs dk_detectron[onnx]")


def learnt(model: nn.Module) -> nn.Module:
    """With offsets and gates that follow the input, and norms that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_generator." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.0)
    return model.eval()


def layers(kind: str, groups: int) -> nn.Module:
    """A layer with stride, dilation and bias, and a pointwise one."""
    return learnt(
        nn.Sequential(
            KINDS[kind](4, 4, 3, stride=2, padding=2, dilation=2, groups=groups),
            KINDS[kind](4, 6, 1),
        )
    )


BACKBONES = {
    "MNV2": lambda: mobilenet_v2(conv1x1="global", conv3x3="local", out_features=["res2", "res3"]),
    "R_50_DW": lambda: resnet_dw(
        width=4, stem_channels=8, res2_channels=16, conv1x1="conditional", conv3x3="local",
        offset_generator="shared",
        data_offset=[False, True, False, False], out_features=["res2", "res3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("groups", [4, 2], ids=["depthwise", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_in_standard_onnx_operators(kind, groups, onnx, tmp_path):
    """Verified by onnxruntime, as export itself does, at two sizes, and here at a third."""
    import onnxruntime

    model = layers(kind, groups)
    found = export(model, torch.randn(1, 4, 12, 16), tmp_path / "layer.onnx")
    assert found.sizes == [(12, 16), (32, 12)] and found.differences["output"] < 1e-5
    graph = onnx.load(found.path)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)]
    session = onnxruntime.InferenceSession(found.path, providers=["CPUExecutionProvider"])
    x = torch.randn(1, 4, 21, 9)
    (output,) = session.run(None, {"image": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format, suffix", [("onnx", "onnx"), ("export", "pt2")])
@pytest.mark.parametrize("family", BACKBONES)
def test_backbones(family, format, suffix, request, tmp_path):
    if format == "onnx":
        request.getfixturevalue("onnx")
    model = learnt(BACKBONES[family]()).train()
    found = export(model, torch.randn(1, 3, 64, 96), tmp_path / f"backbone.{suffix}", format)
    assert model.training
    assert found.outputs == ["res2", "res3"] and found.sizes == [(64, 96), (192, 64)]
    with torch.no_grad():
        largest = max(
            float(x.abs().max()) for x in model.eval()(torch.randn(1, 3, 64, 96)).values()
        )
    assert max(found.differences.values()) < 1e-5 * largest
    assert [p.name for p in tmp_path.iterdir()] == [f"backbone.{suffix}"]


@pytest.mark.parametrize("format, suffix", [("onnx", "onnx"), ("export", "pt2")])
def test_a_list_of_features(format, suffix, request, tmp_path):
    if format == "onnx":
        request.getfixturevalue("onnx")
    model = learnt(FeatureList(mobilenet_v2(conv3x3="local", out_features=["res2", "res3"])))
    found = export(model, torch.randn(1, 3, 64, 96), tmp_path / f"features.{suffix}", format)
    assert found.outputs == ["output_0", "output_1"] == [*found.differences]


class Outputs(nn.Module):
    """A layer, and what ``function`` makes of what it gives."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = layers("local", 4), function

    def forward(self, x):
        return self.function(self.layer(x))


def test_outputs_of_any_type_of_number(onnx, tmp_path):
    model = Outputs(lambda y: {"class": y.argmax(1), "mask": y > 0, "byte": (y > 0).byte()})
    found = export(model, torch.randn(1, 4, 12, 16), tmp_path / "model.onnx")
    assert found.differences == {"class": 0, "mask": 0, "byte": 0}


def test_modules_keep_their_modes(onnx, tmp_path):
    """Such as a norm that is held in evaluation mode while the rest trains."""
    model = nn.Sequential(layers("local", 4), nn.BatchNorm2d(6), nn.BatchNorm2d(6)).train()
    model[1].eval()
    export(model, torch.randn(1, 4, 12, 16), tmp_path / "model.onnx")
    assert model.training and not model[1].training and model[2].training


WITHOUT_US = """
import sys, torch
library, path, load = sys.argv[1:]
torch.ops.load_library(library)
model = torch._inductor.aoti_load_package(path) if load == "aoti" else (
    torch.export.load(path).module())
x, expected = torch.load("x.pth"), torch.load("y.pth")
torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
assert not any(name.startswith("dk_detectron") for name in sys.modules)
print("same")
"""


@pytest.mark.parametrize("format", ["export", "aoti"])
def test_a_program_needs_our_operators_alone(format, tmp_path):
    """In a process without this package: the library of operators, and the file."""
    model = learnt(
        nn.Sequential(
            LocalDeformKernel2d(4, 4, 3, padding=1, groups=4),
            KINDS["global"](4, 4, 3, padding=1, groups=4),
        )
    )
    found = export(model, torch.randn(1, 4, 12, 16), tmp_path / "layer.pt2", format)
    assert found.differences["output"] < 1e-5
    x = torch.randn(1, 4, 10, 14)
    torch.save(x, tmp_path / "x.pth")
    torch.save(model(x).detach(), tmp_path / "y.pth")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, operators(), found.path, format],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout == "same\n", result.stderr


def photograph(height: int, width: int) -> torch.Tensor:
    """A real one, of scikit-learn, in RGB."""
    picture = torch.from_numpy(np.array(load_sample_image("china.jpg"))).permute(2, 0, 1).float()
    return nn.functional.interpolate(picture[None], (height, width), mode="bilinear")[0]


def detector(config: str) -> nn.Module:
    """Of random weights, whose scores nevertheless tell objects apart."""
    opts = ["MODEL.MOBILENETV2.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", 32]
    opts += ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.RPN.POST_NMS_TOPK_TEST", 50]
    opts += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_HEADS.NUM_CLASSES", 5]
    opts += ["MODEL.RETINANET.NUM_CLASSES", 5, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    model = learnt(build_model(load_config(CONFIGS / config, opts)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cls_subnet." in name and name.endswith("weight"):  # RetinaNet's, drawn far smaller
                parameter.mul_(5)
            elif name.endswith(("objectness_logits.weight", "cls_score.weight")):
                parameter.mul_(100)
    return model


@pytest.mark.parametrize(
    "config, outputs",
    [
        ("COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml", 3),
        ("COCO-InstanceSegmentation/mask_rcnn_MNV2_FPN_dk_l3_1x.yaml", 4),
        ("COCO-Detection/retinanet_MNV2_FPN_dk_l3_1x.yaml", 3),
    ],
)
def test_a_whole_detector_on_a_photograph(config, outputs, onnx, tmp_path):
    """Boxes in pixels, scores and classes, of sizes that are no multiple of any stride."""
    model = detector(config)
    found = export(model, photograph(100, 150), tmp_path / "model.onnx")
    assert found.outputs == ["pred_boxes", "scores", "pred_classes", "pred_masks"][:outputs]
    assert found.sizes == [(100, 150), (300, 100)]
    assert found.differences["pred_boxes"] < 0.02 and found.differences["scores"] < 1e-4
    assert found.differences["pred_classes"] == 0


def test_where_no_object_is_found_nothing_is_called_verified(tmp_path, monkeypatch):
    """Any file gives as much, also one that computes something else."""
    model = detector("COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml")
    monkeypatch.setattr(model.roi_heads.box_predictor, "test_score_thresh", 1.0)
    message = r"image: expected one with objects .*, got none at 64x96: .* \(--image PICTURE\)"
    with pytest.raises(ExportError, match=message):
        export(model, photograph(64, 96), tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]


def test_a_size_that_the_backbone_cannot_have(tmp_path):
    backbone = detector("COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml").backbone
    message = "image: expected height and width that are multiples of 32, got 64x150"
    with pytest.raises(ValueError, match=message):
        export(backbone, torch.randn(1, 3, 64, 150), tmp_path / "model.pt2", "export")


def test_bad_arguments(tmp_path):
    model, image = layers("local", 4), torch.randn(1, 4, 12, 16)
    for arguments, message in (
        ((image, "x.onnx", "torchscript"), "format: expected one of onnx, export, aoti, got 'tor"),
        ((image, "x.onnx", "aoti"), "path: expected a name that ends in .pt2, got x.onnx"),
        (
            (image[0], "x.pt2", "export"),
            "format: expected 'onnx' for a whole detector, got 'export",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, *arguments)


def test_a_size_that_is_fixed_is_told_with_its_cure(tmp_path):
    """torch.export takes a size of 1 for a constant."""
    model = nn.Sequential(nn.MaxPool2d(1, 4), nn.Conv2d(3, 2, 3, padding=1), nn.ReLU())
    with pytest.raises(ExportError, match="fixes those of 1, .* give a larger one; nothing has"):
        export(model, torch.rand(1, 3, 4, 8), tmp_path / "model.pt2", "export")
    assert not [*tmp_path.iterdir()]


def test_without_the_packages_for_onnx_their_name_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dk_detectron\[onnx\]'"):
        export(layers("local", 4), torch.randn(1, 4, 12, 16), tmp_path / "layer.onnx")


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize(
    "function, dtype, message",
    [
        (lambda y: {"mask": y, "aux": None}, torch.float32, "aux: expected a tensor .* a NoneType"),
        (lambda y: [y, [y]], torch.float32, "output_1: expected a tensor .* got a list: wrap"),
        (lambda y: y, torch.float64, "'onnx' can express and run, .* float32; got NotImplemented"),
        (lambda y: y, torch.bfloat16, "'onnx' can express and run, .* float32; got "),
    ],
)
def test_what_cannot_be_exported_is_an_export_error(function, dtype, message, onnx, tmp_path):
    with pytest.raises(ExportError, match=message):
        image = torch.randn(1, 4, 12, 16, dtype=dtype)
        export(Outputs(function).to(dtype), image, tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]


class Fixed(nn.Module):
    """What a trace fixes: the mean over a number of pixels that Python counted."""

    def forward(self, x):
        return x.sum((2, 3)) / int(x.shape[2] * x.shape[3])


def test_a_network_that_cannot_be_exported_leaves_what_was_there(onnx, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("precious")
    with pytest.raises(ExportError, match="model: expected one that torch.export follows"):
        export(Branching(), torch.rand(1, 1, 4, 6), path, "export")
    assert path.read_text() == "precious"
    path = path.with_suffix(".onnx")
    path.write_text("precious")
    for scale in 1, 1e-4:  # what differs is told by the outputs' own scale
        with pytest.raises(ExportError, match="output: expected the file to give what the network"):
            export(Fixed(), scale * (torch.rand(1, 1, 4, 6) + 5), path)
        assert path.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.pt2"]


def detections(*rows) -> dict[str, torch.Tensor]:
    values = torch.tensor(rows)
    return {"pred_boxes": values[:, :4], "scores": values[:, 4], "pred_classes": values[:, 5]}


def test_detections_are_compared_whatever_their_order_but_each_once(device):
    """Of two near each other, the second must not stand in for one that is missing."""
    one, near, far = (0, 0, 9, 9, 0.5, 1), (0, 0, 9, 9.5, 0.5, 1), (20, 20, 40, 40, 0.5, 1)
    network = {name: t.to(device) for name, t in detections(one, near, far).items()}
    expected, found = _paired(network, detections(far, one, near))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.cpu())
    wrong = (50.0, 50, 60, 60, 0.9, 2)
    expected, found = _paired(detections(one, near, far), detections(wrong, far, one))
    assert torch.equal(found["pred_boxes"][:, 0], torch.tensor([0.0, 50, 20]))
    _, found = _paired(detections(one, far), detections(far, (math.nan, 0, 9, 9, 0.5, 1)))
    assert found["pred_boxes"][0].isnan().any()


def test_the_command_line(onnx, monkeypatch, capsys, tmp_path):
    opts = ["MODEL.MOBILENETV2.OUT_FEATURES", ["res2"], "MODEL.CLASSIFIER.NUM_CLASSES", 4]
    cfg = load_config(CONFIGS / "ImageNet" / "MNV2_dk_l3.yaml", opts)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_0000009.pth")

    def tag(name):
        (tmp_path / "last_checkpoint").write_text(name)

    tag("model_0000009.pth")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / "export.py"), run_name="__main__")

    run("--size", 64, 96)
    text = capsys.readouterr().out
    assert re.search(r"Written: .*model.onnx, largest differences at 64x96 and 192x64: out", text)
    run("--format", "export", "--size", 64, 96, "--output", tmp_path / "new" / "mine.pt2")
    assert "torch.ops.load_library" in capsys.readouterr().out
    assert (tmp_path / "new" / "mine.pt2").is_file()
    tag("")
    with pytest.raises(SystemExit, match="RUN_DIR: expected a checkpoint in"):
        run()
    with pytest.raises(SystemExit, match="config.yaml"):
        monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "nothing")])
        runpy.run_path(str(ROOT / "tools" / "export.py"), run_name="__main__")


def test_weights_that_nobody_trained_are_not_exported(onnx, monkeypatch, tmp_path):
    config = CONFIGS / "ImageNet" / "MNV2_dk_l3.yaml"
    cfg = load_config(config, ["MODEL.CLASSIFIER.NUM_CLASSES", 4])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    state = build_model(cfg).state_dict()
    backbone = {name: tensor for name, tensor in state.items() if "linear" not in name}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    arguments = "--weights", tmp_path / "backbone.pth", "--size", 64, 96
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), *map(str, arguments)])
    with pytest.raises(
        SystemExit, match="expected trained weights of the whole network, .* linear"
    ):
        command.main()
    assert not (tmp_path / "model.onnx").exists()

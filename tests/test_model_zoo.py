"""Configurations by name, as detectron2's own model zoo gives them."""

import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from dk_detectron import add_dk_config, model_zoo
from dk_detectron.engine.checks import flat

ROOT = Path(__file__).parent.parent
NAME = "COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml"


def test_names_and_paths_lead_to_the_same_file(tmp_path, monkeypatch):
    path = model_zoo.CONFIGS / NAME
    monkeypatch.chdir(tmp_path)
    for name in NAME, f"configs/{NAME}", path, str(path):
        assert model_zoo.get_config_file(name) == str(path)


def test_the_configuration_is_the_files():
    expected = get_cfg()
    add_dk_config(expected)
    expected.merge_from_file(str(model_zoo.CONFIGS / NAME))
    assert model_zoo.get_config(NAME) == expected
    assert expected.MODEL.DEFORM_KERNEL.CONV_3X3 == "local"


def test_every_key_is_documented_with_its_default():
    keys = get_cfg()
    add_dk_config(keys)
    added = flat(keys).keys() - flat(get_cfg()).keys()
    expected = {key: repr(value) for key, value in flat(keys).items() if key in added}
    page = (ROOT / "docs" / "keys.md").read_text()
    assert dict(re.findall(r"^\| `([A-Z][A-Z0-9_.]+)` \| `(.+?)` \|", page, re.M)) == expected


def test_keys_in_the_documents_exist():
    keys = get_cfg()
    add_dk_config(keys)
    known = {key[: dot.start()] for key in flat(keys) for dot in re.finditer(r"\.|$", key)}
    key = re.compile(r"\b(?:MODEL|SOLVER|INPUT|DATALOADER|DATASETS|TEST)(?:\.[A-Z][A-Z0-9_]*)+\b")
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("dk_detectron/commands/*.py"),
    ):
        assert {*key.findall(path.read_text())} <= known, path


def test_the_network_of_a_name():
    model = model_zoo.get("ImageNet/MNV2_dk_l3.yaml", device="cpu")
    assert type(model.backbone.res3[0].conv2).__name__ == "LocalDeformKernel2d"


def test_unknown_names_are_told():
    with pytest.raises(FileNotFoundError, match="got 'faster_rcnn.yaml'; they are in .*configs"):
        model_zoo.get_config_file("faster_rcnn.yaml")
    with pytest.raises(FileNotFoundError, match="did you mean ImageNet/MNV2.yaml"):
        model_zoo.get_config_file("COCO-Detection/MNV2.yaml")


def test_there_are_no_trained_weights_yet():
    for call in model_zoo.get, model_zoo.get_config:
        with pytest.raises(ValueError, match="trained: expected False, as no weights of COCO"):
            call(NAME, trained=True)


def test_a_configuration_runs_no_code(tmp_path):
    """detectron2's own reading would run it."""
    path = tmp_path / "config.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{tmp_path}/made]\n")
    with pytest.raises(ValueError, match="config.yaml: expected plain YAML"):
        model_zoo.get_config(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {DEFORM_KERNEL: {CONV_3x3: local}}", "key: MODEL.DEFORM_KERNEL.CONV_3x3; did you "
         "mean MODEL.DEFORM_KERNEL.CONV_3X3?"),
        ("SOLVER: {BASE_LR: fast}", "for config key: SOLVER.BASE_LR"),
        ("- MODEL", "cannot be merged"),
        ("", "cannot be merged"),
        ("1: 2", "cannot be merged"),
        ("MODEL: 5", "cannot be merged"),
        ("VERSION: two", "cannot be merged"),
        ("TEST: {DATE: 2020-99-99}", "month must be in 1..12"),
        ("_BASE_: config.yaml", "a _BASE_ that leads back to its own file"),
        ("_BASE_: [5]", "cannot be merged"),
        ("a: &a [*a]", "a value inside itself"),
        ("\n".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" if i else "x0: &x0 [1]"
                   for i in range(12)) + "\nSOLVER: {BASE_LR: *x11}", "more than 100,000 values"),
        ("MODEL: {WEIGHTS: \x00}", "expected plain YAML"),
        ("MODEL: {DEVICE: '" + "(" * 5000 + "'}", None),
    ],
)  # fmt: skip
def test_what_is_no_configuration(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    if message is None:
        assert model_zoo.get_config(path).MODEL.DEVICE.startswith("(((")
        return
    with pytest.raises(ValueError, match="config.yaml: expected ") as error:
        model_zoo.get_config(path)
    assert message in str(error.value) and len(str(error.value)) < 600


def test_a_lazy_configuration_is_for_another_command():
    with pytest.raises(ValueError, match="expected YAML, got Python, .*lazyconfig_train_net.py"):
        model_zoo.get_config("lazy/faster_rcnn_MNV2_FPN_dk_l3.py")


def test_a_base_that_is_missing(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("_BASE_: base.yaml")
    with pytest.raises(FileNotFoundError, match="config.yaml: .* _BASE_ names, got .*/base.yaml"):
        model_zoo.get_config(path)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.WEIGHT", "x.pth"], "key: MODEL.WEIGHT; did you mean MODEL.WEIGHTS?"),
        (["SOLVER.MAX_ITER"], "odd length"),
        (["SOLVER.MAX_ITER", "many"], "for config key: SOLVER.MAX_ITER"),
    ],
)
def test_options_that_cannot_be(opts, message):
    with pytest.raises(ValueError, match="options KEY VALUE ...: expected") as error:
        model_zoo.load_config(NAME, opts)
    assert message in str(error.value)

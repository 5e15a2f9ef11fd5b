"""Configurations by name, as detectron2's own model zoo gives them."""

import pytest
from detectron2.config import get_cfg

from dk_detectron import add_dk_config, model_zoo

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

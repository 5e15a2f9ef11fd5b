"""Configurations of strangers: merged, or refused with the file or the key that is at fault."""

import tempfile
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from fuzzing import ANYTHING, READERS, attempt, cases, damaged, spoilt
from hypothesis import strategies as st

from dk_detectron.model_zoo import CONFIGS, get_config, merge_options

DEMO = yaml.safe_load((CONFIGS / "demo" / "Base-MNV2-FPN-scratch.yaml").read_text())
BASE = "_BASE_"
TAGS = [b"!!python/object/apply:os.getcwd []", b"!!python/name:os.system", b"&a [*a]", b"? [a]"]


@st.composite
def yaml_files(draw) -> bytes:
    content = draw(spoilt({k: v for k, v in DEMO.items() if k != BASE}))
    if draw(st.booleans()) and isinstance(content, dict):
        content[BASE] = draw(st.sampled_from(["found.yaml", "none.yaml", "../..", 3, "", "/"]))
    try:
        raw = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        raw = b"MODEL: {}"
    raw += b"\nX: " + draw(st.sampled_from(TAGS)) if draw(st.integers(0, 5)) == 0 else b""
    return draw(damaged(raw, most=draw(st.sampled_from([0, 0, 2]))))


@cases(READERS, 0.03, raw=yaml_files())
def test_files(raw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "found.yaml")
        path.write_bytes(raw)
        found = attempt(get_config, str(path), names="found.yaml")
        assert isinstance(found, CfgNode | Exception)
        assert [p.name for p in Path(folder).iterdir()] == ["found.yaml"]


KEYS = "SOLVER.BASE_LR", "MODEL.FPN.NORM", "MODEL", "DATASETS.TRAIN", "SOLVER.STEPS", "MODEL.X", ""


@cases(READERS, 0.02, opts=st.lists(st.sampled_from(KEYS) | ANYTHING, max_size=4))
def test_options(opts):
    cfg = get_config("demo/shapes_MNV2_FPN_dk_l3.yaml")
    before = cfg.dump()
    if isinstance(attempt(merge_options, cfg, opts), Exception):
        return
    if not opts:
        assert cfg.dump() == before

"""Parameters and multiply-adds of a configuration, or the paper's tables beside its figures.

%(prog)s --config-file COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml
%(prog)s --paper-tables
"""

import argparse
import sys
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..analysis import count_multiply_adds, count_parameters
from ..config import is_classifier
from ..model_zoo import CONFIGS, load_config, paper_rows

CLASSIFIER_SIZE = (224, 224)
DETECTOR_SIZE = (800, 1216)


def build(cfg: CfgNode) -> nn.Module:
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def multiply_adds(cfg: CfgNode, model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    if is_classifier(cfg):
        return count_multiply_adds(model, torch.zeros(1, 3, *size))
    return count_multiply_adds(model, [{"image": torch.randint(0, 256, (3, *size))}])


def analyze(cfg: CfgNode, size: tuple[int, int] | None) -> None:
    model = build(cfg)
    classifier = is_classifier(cfg)
    size = size or (CLASSIFIER_SIZE if classifier else DETECTOR_SIZE)
    parameters = [(name, count_parameters(child)) for name, child in model.named_children()]
    parameters.append(("total", count_parameters(model)))
    print(tabulate(parameters, ["module", "parameters"], tablefmt="github", intfmt=","))
    costs = sorted(multiply_adds(cfg, model, size).items(), key=lambda item: -item[1])
    rows = [(name, cost / 1e9) for name, cost in (*costs, ("total", sum(c for _, c in costs)))]
    print(f"\nOne image of {size[0]}x{size[1]}:\n")
    print(tabulate(rows, ["layer", "G multiply-adds"], tablefmt="github", floatfmt=".3f"))


def print_paper_tables() -> None:
    for table in 1, 2:
        rows = []
        for row in tqdm(paper_rows(table), desc=f"Table {table}", leave=False):
            cfg = load_config(CONFIGS / row["config"])
            model = build(cfg)
            parameters = count_parameters(model)
            giga = sum(multiply_adds(cfg, model, CLASSIFIER_SIZE).values()) / 1e9
            rows.append(
                [
                    row["config"].removeprefix("ImageNet/").removesuffix(".yaml"),
                    parameters,
                    parameters / 1e6,
                    float(row["params_m"]),
                    giga,
                    float(row["gflops"]),
                ]
            )
        header = ["config", "parameters", "#P (M)", "paper", "GFLOPs", "paper"]
        print(f"\nTable {table}\n")
        formats = ("", "", ".1f", ".1f", ".2f", ".2f")
        print(tabulate(rows, header, tablefmt="github", intfmt=",", floatfmt=formats))
    print_architectures()


def describe_stage(stage: nn.Sequential) -> str:
    """A stage as Table 5 prints it: the convolutions of its blocks, and their number."""
    convs: list[Any] = [getattr(stage[0], f"conv{i}") for i in (1, 2, 3)]
    parts = []
    for conv in convs:
        size = "x".join(map(str, conv.kernel_size))
        parts.append(
            f"{size}, {conv.out_channels}" + (f", G={conv.groups}" if conv.groups > 1 else "")
        )
    return f"[{'; '.join(parts)}] x{len(stage)}"


def print_architectures() -> None:
    """Table 5."""
    names = "R_50", "R_50_DW"
    models = [build(load_config(CONFIGS / "ImageNet" / f"{name}.yaml")) for name in names]
    paper = [
        row for name in names for row in paper_rows(1) if row["config"] == f"ImageNet/{name}.yaml"
    ]
    outputs = {}
    for model in models:
        for name in "res2", "res3", "res4", "res5":
            stage = getattr(model.backbone, name)
            stage.register_forward_hook(
                lambda _, __, out, name=name: outputs.update({name: tuple(out.shape[2:])})
            )
        model.eval()(torch.zeros(1, 3, *CLASSIFIER_SIZE))
    rows = [["112x112", *["7x7, 64, stride 2"] * 2], ["56x56", *["3x3 max pool, stride 2"] * 2]]
    for name, size in outputs.items():
        stages = [describe_stage(getattr(model.backbone, name)) for model in models]
        rows.append(["x".join(map(str, size)), *stages])
    parameters = [count_parameters(m) / 1e6 for m in models]
    rows.append(
        ["#P (M), ours / paper"]
        + [f"{p:.1f} / {r['params_m']}" for p, r in zip(parameters, paper, strict=True)]
    )
    costs = [
        sum(count_multiply_adds(m, torch.zeros(1, 3, *CLASSIFIER_SIZE)).values()) / 1e9
        for m in models
    ]
    rows.append(
        ["GFLOPs, ours / paper"]
        + [f"{c:.2f} / {r['gflops']}" for c, r in zip(costs, paper, strict=True)]
    )
    print("\nTable 5\n")
    print(tabulate(rows, ["output", "ResNet-50", "ResNet-50-DW"], tablefmt="github"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", help="a YAML file")
    what.add_argument("--paper-tables", action="store_true", help="Tables 1, 2 and 5")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"),
        help="image size (default: 224 224 for classifiers, 800 1216 for detectors)",
    )  # fmt: skip
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the configuration")
    args = parser.parse_args()
    if args.paper_tables:
        print_paper_tables()
        return
    try:
        analyze(load_config(args.config_file, args.opts), args.size and tuple(args.size))
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()

"""Writes a run's network as a file that runs without Python code, and verifies it.

    %(prog)s output/mine --format onnx --image picture.jpg

Reads the run's config.yaml and its last checkpoint, and writes RUN_DIR/model.onnx (or .pt2).
"onnx" is of the whole detector or classifier; "export" (a program of torch.export) and "aoti"
(compiled for the CPU) are of a detector's backbone with its pyramid, and of the whole classifier.
Heights and widths are free, batches are of one image.
"""

import argparse
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..config import is_classifier
from ..engine.record import CONFIG_FILE, last_checkpoint
from ..export import FORMATS, ExportError, export, operators
from ..model_zoo import load_config
from ..weights import Checkpointer, CheckpointError

DEFAULT_SIZE = (320, 416)


def network(cfg: CfgNode, weights: str, format: str) -> nn.Module:
    """What is exported of the configured model, trained."""
    model = build_model(cfg)
    checkpointer = Checkpointer(model)
    checkpointer.load(weights, checkpointables=[])
    if checkpointer.report:
        checkpointer.report.check_complete()
    classifier = is_classifier(cfg)
    return model if classifier or format == "onnx" else model.backbone


def example(cfg: CfgNode, picture: str | None, size: tuple[int, int], whole: bool) -> Tensor:
    """A picture, or noise, of ``size``: pixels for a detector, else a normalised batch."""
    image = torch.rand(3, *size) * 255
    if picture:
        pixels = read_image(picture, cfg.INPUT.FORMAT)
        resize = transforms.ResizeTransform(*pixels.shape[:2], *size)
        image = torch.from_numpy(resize.apply_image(pixels).copy()).permute(2, 0, 1).float()
    if whole and not is_classifier(cfg):
        return image
    mean, std = (torch.tensor(cfg.MODEL[f"PIXEL_{k}"]).view(-1, 1, 1) for k in ("MEAN", "STD"))
    return ((image - mean) / std).unsqueeze(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="OUTPUT_DIR of a training")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_argument("--weights", help="checkpoint (default: the last in RUN_DIR)")
    parser.add_argument("--output", help="file to write (default: RUN_DIR/model.onnx or .pt2)")
    parser.add_argument(
        "--image",
        help="a picture to verify with, where a detector finds something (default: noise)",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), default=DEFAULT_SIZE,
        help="of the example, multiples of 32, beyond 64 (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    run = Path(args.run_dir)
    output = args.output or run / f"model{FORMATS[args.format]}"
    try:
        cfg = load_config(run / CONFIG_FILE)
        weights = args.weights or last_checkpoint(run)
        if not weights:
            raise FileNotFoundError(f"RUN_DIR: expected a checkpoint in {run}, got none yet")
        model = network(cfg, str(weights), args.format)
        image = example(cfg, args.image, tuple(args.size), args.format == "onnx")
        print(f"Written: {export(model, image, output, args.format)}")
    except (CheckpointError, ExportError, ModuleNotFoundError, OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    if args.format != "onnx":
        print(f"It needs the operators: torch.ops.load_library({str(operators())!r})")


if __name__ == "__main__":
    main()

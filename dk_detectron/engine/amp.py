"""Mixed precision on any device: bfloat16, or float16 with scaled gradients."""

from __future__ import annotations

import logging
import time

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import Tensor, nn

# Below detectron2's, whose handlers write to the terminal and to log.txt.
LOGGER = logging.getLogger("detectron2.dk_detectron.engine.amp")

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def check_amp(cfg: CfgNode) -> None:
    """Raises ``ValueError`` if ``SOLVER.AMP.PRECISION`` is unknown."""
    if cfg.SOLVER.AMP.PRECISION not in PRECISIONS:
        raise ValueError(
            f"SOLVER.AMP.PRECISION: expected one of {', '.join(PRECISIONS)}, "
            f"got {cfg.SOLVER.AMP.PRECISION!r}"
        )


def build_loop(cfg: CfgNode, model: nn.Module, data_loader, optimizer) -> SimpleTrainer:
    """The training loop that ``SOLVER.AMP`` asks for.

    Raises:
        ValueError: ``SOLVER.AMP.PRECISION`` is unknown.
    """
    check_amp(cfg)
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer(model, data_loader, optimizer)
    precision = PRECISIONS[cfg.SOLVER.AMP.PRECISION]
    # bfloat16 has the range of float32: no gradient is lost unscaled.
    scaler = torch.amp.GradScaler(cfg.MODEL.DEVICE, enabled=precision == torch.float16)
    return MixedPrecisionTrainer(
        model, data_loader, optimizer, grad_scaler=scaler, precision=precision
    )


class MixedPrecisionTrainer(AMPTrainer):
    """detectron2's, whose own step insists on CUDA."""

    def load_state_dict(self, state_dict: dict) -> None:
        # Empty is that of bfloat16.
        if not state_dict.get("grad_scaler"):
            if self.grad_scaler.is_enabled():
                LOGGER.warning(
                    "The run to resume did not scale gradients, as float16 needs it: they are "
                    "scaled from %g on",
                    self.grad_scaler.get_scale(),
                )
            state_dict["grad_scaler"] = self.grad_scaler.state_dict()
        super().load_state_dict(state_dict)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, dtype=self.precision):
            losses = self.model(data)
        if isinstance(losses, Tensor):
            losses = {"total_loss": losses}
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

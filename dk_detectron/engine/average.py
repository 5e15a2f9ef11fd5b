"""The weights' exponential moving average, beside the weights."""

from __future__ import annotations

import os

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..weights import write_checkpoint


class WeightAverage(HookBase):
    """Keeps the exponential moving average of a model's weights and buffers.

    It is part of the checkpoints. After the last iteration it is also written for itself, as
    ``model_final_ema.pth``, a checkpoint like ``model_final.pth``.
    """

    def __init__(self, model: nn.Module, decay: float, output_dir: str):
        self.averaged = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )
        self.path = os.path.join(output_dir, "model_final_ema.pth")

    def start_at(self, model: nn.Module) -> bool:
        """Takes a model's weights, if no step has been averaged yet; whether that is so."""
        if self.averaged.n_averaged:
            return False
        self.averaged.module.load_state_dict(model.state_dict())
        return True

    def after_step(self):
        self.averaged.update_parameters(self.trainer.model)

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            content = {"model": self.averaged.module.state_dict()}
            write_checkpoint(content | {"classes": self.trainer.checkpointer.classes}, self.path)

    def state_dict(self):
        return self.averaged.state_dict()

    def load_state_dict(self, state_dict):
        self.averaged.load_state_dict(state_dict)

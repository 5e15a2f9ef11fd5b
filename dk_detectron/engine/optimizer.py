"""Optimizers that treat the generators of offsets apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from detectron2.solver.build import get_default_optimizer_params, reduce_param_groups
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ..weights import state_by_name

GENERATOR = "offset_generator"


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay: float = 0.0,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    offset_lr_factor: float = 1.0,
    bias_lr_factor: float = 1.0,
) -> list[dict]:
    """detectron2's parameter groups; the rate of offset generators is multiplied by a factor.

    The biases of generators, which hold where the taps rest, do not decay.

    Returns:
        Groups for any optimizer, with the names of their parameters under "param_names".
    """

    def lr_factor(name: str) -> float:
        # The bias factor is folded in here, because detectron2's own would undo the other.
        return (offset_lr_factor if f"{GENERATOR}." in name else 1.0) * (
            bias_lr_factor if name.endswith(".bias") else 1.0
        )

    groups = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        weight_decay_bias=weight_decay_bias,
        lr_factor_func=lr_factor,
    )
    resting = [
        module.bias
        for name, module in model.named_modules()
        if name.endswith(GENERATOR) and module.weight.requires_grad
    ]
    if resting:
        groups = reduce_param_groups([*groups, {"params": resting, "weight_decay": 0.0}])
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]
    return groups


def build_optimizer(
    params: list[dict],
    *,
    kind: Callable[..., Optimizer] = SGD,
    clip_offset_gradients: float = 0.0,
    **options,
) -> Optimizer:
    """An optimizer of :func:`parameter_groups` whose state is loaded by the parameters' names.

    Args:
        clip_offset_gradients: before a step, the gradient of each offset generator, weights and
            bias together, is scaled down to at most this norm; 0 for no limit.
        options: of ``kind``.
    """
    optimizer = kind(params, **options)
    generators: dict[str, list[Tensor]] = {}
    for group in params:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            module, inside, _ = name.partition(f"{GENERATOR}.")
            if inside:
                generators.setdefault(module, []).append(parameter)
    if clip_offset_gradients:
        clip = partial(_clip_each, list(generators.values()), clip_offset_gradients)
        optimizer.register_step_pre_hook(clip)
    optimizer.register_load_state_dict_pre_hook(state_by_name)
    return optimizer


def _clip_each(generators: list[list[Tensor]], limit: float, *_) -> None:
    for parameters in generators:
        nn.utils.clip_grad_norm_(parameters, limit)

"""The state of optimizers, by the names of their parameters."""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import chain
from typing import Any

import torch

from .files import CheckpointError


def state_by_name(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict | None:
    """A load hook: the state of every parameter by its name, and the rates that schedules left.

    So a run goes on though another ``SOLVER.OFFSET_LR_FACTOR`` groups its parameters otherwise, or
    other ones are frozen. What no schedule changes, such as weight decay, is as configured. Names
    count without the prefixes of wrappers (``module.``, ``_orig_mod.``). Older checkpoints have no
    names: they are loaded as they are.

    Raises:
        CheckpointError: it has no names, and groups its parameters otherwise; or they are another
            network's.
    """
    groups, saved = optimizer.state_dict()["param_groups"], state_dict["param_groups"]
    if any("param_names" not in group for group in saved):
        _check_sizes(groups, saved)
        return None
    places, origins = _by_name(groups), _by_name(saved)
    _check_names(places.keys(), origins.keys())
    state = {}
    for name, (group, new) in reversed(places.items()):  # a group's first parameter has its way
        if name not in origins:
            continue
        origin, old = origins[name]
        group |= _scheduled(origin, optimizer.defaults)
        if old in state_dict["state"]:
            state[new] = state_dict["state"][old]
    return {"state": state, "param_groups": groups}


def _by_name(groups: Sequence[dict]) -> dict[str, tuple[dict, int]]:
    """The group of every parameter, and its index."""
    names = list(chain.from_iterable(group["param_names"] for group in groups))
    places = [(group, index) for group in groups for index in group["params"]]
    return dict(zip(_without_wrappers(names), places, strict=True))


def _without_wrappers(names: list[str]) -> list[str]:
    """Without the prefixes of compiled networks and of distributed ones, which all names have."""
    names = [name.replace("_orig_mod.", "") for name in names]
    wrapped = all(name.startswith("module.") for name in names)
    return [name.removeprefix("module.") for name in names] if wrapped else names


def _scheduled(group: dict, defaults: dict) -> dict[str, Any]:
    """Of a group's options, those that torch's schedulers change, or have added for themselves."""
    changed = {"lr"}
    if "max_momentum" in group:  # by OneCycleLR or CyclicLR
        changed |= {"momentum", "betas"}
    own = group.keys() - defaults.keys() - {"params", "param_names"}
    return {key: group[key] for key in group.keys() & changed | own}


def _check_sizes(groups: Sequence[dict], saved: Sequence[dict]) -> None:
    expected, got = ([len(group["params"]) for group in side] for side in (groups, saved))
    if expected != got:
        raise CheckpointError(
            f"optimizer: expected groups of {expected} parameters to resume, got {got}, as "
            "version 0.1 of dk_detectron made them; start a run from these weights, with "
            "MODEL.WEIGHTS and another OUTPUT_DIR"
        )


def _check_names(expected: Set[str], got: Set[str]) -> None:
    """Raises unless one of them has all names of the other, which has more frozen parameters."""
    missing, unknown = sorted(expected - got), sorted(got - expected)
    if missing and unknown:
        raise CheckpointError(
            "optimizer: expected the state of the same network's parameters to resume, got none of "
            f"{len(missing)}, such as {missing[0]}, but of {len(unknown)} others, such as "
            f"{unknown[0]}; build it for the network that was saved, or start a run from its "
            "weights alone"
        )

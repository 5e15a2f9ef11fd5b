"""The small modules that predict what adapts a layer: their names, and their start at zero."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# Names of generators' tensors, in a layer and in a network.
GENERATOR = re.compile(r"((kernel|data|mask|shared)_offset|gate)_generator(?=\.)")
Generator = Any  # nn.Conv2d or nn.Linear, which torch declares as though it had no bias


class StartsAtZero:
    """A generator's start, whichever is reset last: the generator or its layer.

    What is drawn before is for the sake of seeds: layers without it would have other weights.
    """

    def reset_parameters(self: Any) -> None:
        super().reset_parameters()  # type: ignore[misc]
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class LinearGenerator(StartsAtZero, nn.Linear):
    """What predicts numbers of a whole image."""


class ConvGenerator(StartsAtZero, nn.Conv2d):
    """What predicts numbers for every output location."""

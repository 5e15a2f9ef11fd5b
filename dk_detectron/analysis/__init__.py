"""What a network costs, and what it looks at."""

from ..layers.costs import count_multiply_adds, count_parameters
from .measures import measure
from .offsets import observe
from .receptive_field import ReceptiveFields, effective_receptive_field

__all__ = [
    "ReceptiveFields",
    "count_multiply_adds",
    "count_parameters",
    "effective_receptive_field",
    "measure",
    "observe",
]

"""What a network costs."""

from ..layers.costs import count_multiply_adds, count_parameters

__all__ = ["count_multiply_adds", "count_parameters"]

"""What a network costs."""

from .costs import count_multiply_adds, count_parameters

__all__ = ["count_multiply_adds", "count_parameters"]

"""Data sets, registered with detectron2 on import."""

from . import datasets

__all__ = ["datasets"]

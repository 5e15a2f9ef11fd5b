"""Data sets, registered with detectron2 on import."""

from . import datasets, image_folder

__all__ = ["datasets", "image_folder"]

"""Changes to whole models."""

from batchnorm.surgery.convert import from_torch

__all__ = ["from_torch"]

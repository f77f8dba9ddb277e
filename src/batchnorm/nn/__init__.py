"""Layers: drop-in subclasses of torch's own."""

from batchnorm.nn.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

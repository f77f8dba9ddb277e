"""Layers: drop-in subclasses of torch's own, and where their training statistics come from."""

from batchnorm.nn.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.sources import Batch, Domains, Ghost, Renorm, Source, Synced

__all__ = ["Batch", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Domains", "Ghost", "Renorm", "Source", "Synced"]

"""Batch normalization for PyTorch (Ioffe & Szegedy 2015): train in fewer steps, and measure by how much."""

from importlib.metadata import version

from batchnorm.functional import batch_norm
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.population import recalibrate
from batchnorm.racing.runner import race
from batchnorm.racing.task import Task
from batchnorm.surgery import from_torch

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Task", "batch_norm", "from_torch", "race", "recalibrate"]
__version__ = version("batchnorm")

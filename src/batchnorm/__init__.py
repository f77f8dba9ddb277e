"""Batch normalization for PyTorch (Ioffe & Szegedy 2015): train in fewer steps, and measure by how much."""

from importlib.metadata import version

from batchnorm.functional import batch_norm
from batchnorm.nn import Batch, BatchNorm1d, BatchNorm2d, BatchNorm3d, Domains, Ghost, Renorm, Source, Synced
from batchnorm.population import accumulate_statistics, freeze, preserve_state, recalibrate, unfreeze
from batchnorm.racing.contenders import Contender
from batchnorm.racing.runner import race
from batchnorm.racing.task import Task
from batchnorm.recipe import RECIPES, Recipe, accelerate, find_learning_rate
from batchnorm.surgery import convert_sync_batchnorm, fold, from_torch, insert, remove, revert_sync_batchnorm, to_torch

__all__ = [
    "RECIPES",
    "Batch",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Contender",
    "Domains",
    "Ghost",
    "Recipe",
    "Renorm",
    "Source",
    "Synced",
    "Task",
    "accelerate",
    "accumulate_statistics",
    "batch_norm",
    "convert_sync_batchnorm",
    "find_learning_rate",
    "fold",
    "freeze",
    "from_torch",
    "insert",
    "preserve_state",
    "race",
    "recalibrate",
    "remove",
    "revert_sync_batchnorm",
    "to_torch",
    "unfreeze",
]
__version__ = version("batchnorm")

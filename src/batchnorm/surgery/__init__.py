"""Changes to whole models: torch's layers to ours, statistics to synchronized ones and back."""

from batchnorm.surgery.convert import from_torch, to_torch
from batchnorm.surgery.fold import fold
from batchnorm.surgery.insert import insert
from batchnorm.surgery.remove import remove
from batchnorm.surgery.sync import convert_sync_batchnorm, revert_sync_batchnorm

__all__ = ["convert_sync_batchnorm", "fold", "from_torch", "insert", "remove", "revert_sync_batchnorm", "to_torch"]

"""Which layers have running statistics, which of them are updated in training, which are read in evaluation.

The one place that decides it, for torch's layers and ours: ``track_running_stats`` may be switched off after the layer
was built (virtual adversarial training, test-time adaptation), and the buffers may be set to None.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.ops.repetition import is_repeated


def has_running_statistics(layer: nn.Module) -> bool:
    """Whether there are running statistics: evaluation reads them then, whatever ``track_running_stats`` says."""
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None


def is_frozen(layer: nn.Module) -> bool:
    """Whether ``freeze`` keeps the layer's running statistics: training reads them too, and never updates them."""
    return bool(getattr(layer, "frozen_statistics", False))


def updates_running_statistics(layer: nn.Module) -> bool:
    """Whether the layer, in train mode, moves its running statistics: it has some, tracks them, is not frozen."""
    return has_running_statistics(layer) and bool(layer.track_running_stats) and not is_frozen(layer)


def is_recomputing(layer: nn.Module) -> bool:
    """Whether the layer's forward that runs now repeats an earlier one, for activation checkpointing say."""
    return layer.running_mean is not None and is_repeated(layer)

"""What is made of the mean and variance of each batch: an estimate of the population's, in float64.

Comes from: the hooks of ``recalibrate`` and ``accumulate_statistics``. Goes to: running statistics. A new estimator is
one class and one line in ``ESTIMATORS``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.norm import is_recomputing


class Estimator:
    """The common part: how much was seen, and two (C,) sums of what an estimator decides."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.sums = torch.zeros(2, layer.num_features, dtype=torch.float64, device=layer.running_mean.device)  # type: ignore[union-attr]
        self.clear()

    def clear(self) -> None:
        """As if nothing had been seen."""
        self.values = self.batches = 0  # values per channel
        self.sums = torch.zeros_like(self.sums)

    def collect(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """As a forward hook of a layer with momentum 1: its running statistics are then those of the last batch."""
        values = inputs[0].numel() // inputs[0].shape[1] if inputs[0].numel() else 0
        if values and layer.training and not getattr(layer, "frozen_statistics", False) and not is_recomputing():
            running: Any = layer
            mean_C, var_C = running.running_mean.double(), running.running_var.double()
            if getattr(layer, "skipped_batches", None) is not None:  # there the buffers do not hold the batch
                mean_C = mean_C.masked_fill(running.skipped_batches > 0, torch.nan)
            self.add(values, mean_C, var_C)

    def add(self, values: int, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        """One batch."""
        raise NotImplementedError

    def packed(self) -> Tensor:
        """All of it in one tensor, (2 + 2 C,)."""
        return torch.cat([self.sums.new_tensor([self.values, self.batches]), self.sums.flatten()])

    def merge(self, packed: Tensor) -> None:
        """What another process has seen."""
        raise NotImplementedError

    def mean_C(self) -> Tensor:
        """E[x]."""
        raise NotImplementedError

    def unbiased_var_C(self) -> Tensor:
        """Var[x]."""
        raise NotImplementedError


class Pooled(Estimator):
    """Mean and variance of all values of all batches. ``sums``: the mean; the squared distances from it."""

    def add(self, values: int, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        """Law of total variance."""
        self._merge(values, 1, mean_C, unbiased_var_C * (values - 1))

    def _merge(self, values: int, batches: int, mean_C: Tensor, squares_C: Tensor) -> None:
        """Chan et al. 1979."""
        total, delta_C = self.values + values, mean_C - self.sums[0]
        if values:
            mean = self.sums[0] + delta_C * (values / total)
            squares = self.sums[1] + squares_C + delta_C**2 * (self.values * values / total)
            self.sums = torch.stack([mean, squares])
        self.values, self.batches = total, self.batches + batches

    def merge(self, packed: Tensor) -> None:
        """What another process has seen."""
        mean_C, squares_C = packed[2:].view(2, -1)
        self._merge(int(packed[0]), int(packed[1]), mean_C, squares_C)

    def mean_C(self) -> Tensor:
        """E[x]."""
        return self.sums[0]

    def unbiased_var_C(self) -> Tensor:
        """Var[x]."""
        return self.sums[1] / (self.values - 1)


class BatchMean(Estimator):
    """The averages over batches of their mean and unbiased variance: Algorithm 2 to the letter."""

    def add(self, values: int, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        """One batch counts one, whatever its size."""
        self.sums = self.sums + torch.stack([mean_C, unbiased_var_C])
        self.values, self.batches = self.values + values, self.batches + 1

    def merge(self, packed: Tensor) -> None:
        """What another process has seen."""
        self.sums = self.sums + packed[2:].view(2, -1)
        self.values, self.batches = self.values + int(packed[0]), self.batches + int(packed[1])

    def mean_C(self) -> Tensor:
        """E[x] = E_B[mu_B]."""
        return self.sums[0] / self.batches

    def unbiased_var_C(self) -> Tensor:
        """Var[x] = E_B[m / (m - 1) * var_B]."""
        return self.sums[1] / self.batches


ESTIMATORS: dict[str, type[Estimator]] = {"pooled": Pooled, "batch_mean": BatchMean}

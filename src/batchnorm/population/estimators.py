"""Estimators of the population's mean and variance from those of each batch, in float64.

Shapes: L layers, C channels of all of them side by side, K batches.

A new estimator is one class and one line in ``ESTIMATORS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WAITING = 32  # batches that are merged together: on small tensors a call costs more than its arithmetic


class Population(NamedTuple):
    """The estimate for one layer; ``values``: per channel."""

    values: int
    batches: int
    mean_C: Tensor
    unbiased_var_C: Tensor


class Estimator:
    """Statistics of the batches that layers have seen. ``sums``, (2, C), are the estimator's."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.sizes = torch.tensor([len(layer.running_mean) for layer in layers], dtype=torch.int64)
        self.device = layers[0].running_mean.device if layers else torch.device("cpu")
        self.waiting: list[tuple[dict[int, int], Tensor]] = []
        self.clear()

    def clear(self) -> None:
        """As if nothing had been seen."""
        self.values_L, self.batches_L = torch.zeros(2, len(self.layers), dtype=torch.float64)
        self.sums = torch.zeros(2, int(self.sizes.sum()), dtype=torch.float64, device=self.device)

    def take(self, values: dict[int, int], row_2C: Tensor) -> None:
        """One batch: how many values some of the layers saw, and the means of all layers, then the variances."""
        if values:
            self.waiting.append((values, row_2C))
            if len(self.waiting) == _WAITING:
                self._settle()

    def results(self) -> list[Population]:
        """For each layer."""
        self._settle()
        parts = [t.split(self.sizes.tolist()) for t in (self.mean_C(), self.unbiased_var_C())]
        counts = (self.values_L.long().tolist(), self.batches_L.long().tolist())
        return [Population(*row) for row in zip(*counts, *parts, strict=True)]

    def packed(self) -> Tensor:
        """All of it in one tensor, (2 L + 2 C,)."""
        self._settle()
        return torch.cat([self.values_L.to(self.device), self.batches_L.to(self.device), self.sums.flatten()])

    def merge(self, packed: Tensor) -> None:
        """Add the batches that another process has seen."""
        layers = len(self.layers)
        values_L, batches_L = packed[: 2 * layers].view(2, -1).cpu()
        self.add(values_L, packed[2 * layers :].view(2, -1))
        self.values_L, self.batches_L = self.values_L + values_L, self.batches_L + batches_L

    def _settle(self) -> None:
        """Merge the batches that wait."""
        if not self.waiting:
            return
        layers = range(len(self.layers))
        values_KL = torch.tensor([[noted.get(i, 0) for i in layers] for noted, _ in self.waiting], dtype=torch.float64)
        values_KC = self.per_channel(values_KL)
        both_2KC = torch.stack([row for _, row in self.waiting]).double().unflatten(1, (2, -1)).transpose(0, 1)
        self.waiting = []
        mean_KC, var_KC = both_2KC.where(values_KC > 0, 0.0)  # the others are of another batch, or of none
        self.add(values_KL.sum(0), self.sums_of(values_KC, mean_KC, var_KC))
        self.values_L, self.batches_L = self.values_L + values_KL.sum(0), self.batches_L + (values_KL > 0).sum(0)

    def per_channel(self, counts_L: Tensor) -> Tensor:
        """(..., L) -> (..., C)."""
        return counts_L.repeat_interleave(self.sizes, dim=-1).to(self.device)

    def sums_of(self, values_KC: Tensor, mean_KC: Tensor, unbiased_var_KC: Tensor) -> Tensor:
        """The sums of these batches."""
        raise NotImplementedError

    def add(self, values_L: Tensor, sums: Tensor) -> None:
        """To ``sums`` those of other values; ``values_L`` is added afterwards."""
        raise NotImplementedError

    def mean_C(self) -> Tensor:
        """E[x]."""
        raise NotImplementedError

    def unbiased_var_C(self) -> Tensor:
        """Var[x]."""
        raise NotImplementedError


class Pooled(Estimator):
    """Mean and variance of all values of all batches. ``sums``: the mean; the squared distances from it."""

    def sums_of(self, values_KC: Tensor, mean_KC: Tensor, unbiased_var_KC: Tensor) -> Tensor:
        """Law of total variance."""
        mean_C = (values_KC * mean_KC).sum(0) / values_KC.sum(0).clamp(min=1)
        squares_KC = (values_KC - 1) * unbiased_var_KC + values_KC * (mean_KC - mean_C) ** 2
        return torch.stack([mean_C, squares_KC.sum(0)])

    def add(self, values_L: Tensor, sums: Tensor) -> None:
        """Chan et al. 1979."""
        before_C, values_C = self.per_channel(self.values_L), self.per_channel(values_L)
        share_C = values_C / (before_C + values_C).clamp(min=1)
        delta_C = sums[0] - self.sums[0]
        squares_C = self.sums[1] + sums[1] + delta_C**2 * before_C * share_C
        self.sums = torch.stack([self.sums[0] + delta_C * share_C, squares_C])

    def mean_C(self) -> Tensor:
        """E[x]."""
        return self.sums[0]

    def unbiased_var_C(self) -> Tensor:
        """Var[x]; of one value, nothing."""
        return self.sums[1] / (self.per_channel(self.values_L) - 1)


class BatchMean(Estimator):
    """The averages over batches of their mean and unbiased variance: Algorithm 2 to the letter."""

    def sums_of(self, values_KC: Tensor, mean_KC: Tensor, unbiased_var_KC: Tensor) -> Tensor:
        """One batch counts one, whatever its size; one value has no variance to count."""
        unbiased_var_KC = unbiased_var_KC.where(values_KC != 1, torch.nan)
        return torch.stack([mean_KC.sum(0), unbiased_var_KC.sum(0)])

    def add(self, values_L: Tensor, sums: Tensor) -> None:
        """One after the other."""
        self.sums = self.sums + sums

    def mean_C(self) -> Tensor:
        """E[x] = E_B[mu_B]."""
        return self.sums[0] / self.per_channel(self.batches_L)

    def unbiased_var_C(self) -> Tensor:
        """Var[x] = E_B[m / (m - 1) * var_B]."""
        return self.sums[1] / self.per_channel(self.batches_L)


ESTIMATORS: dict[str, type[Estimator]] = {"pooled": Pooled, "batch_mean": BatchMean}

"""The arguments that ops share, as tuples in the ops' order: ``forward(x, *affine)``, ``train(x, *affine, *running)``.

Shapes: N examples, C channels, S places (none for (N, C)). x_NCS is (N, C, ...).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.ops.activations import Activation


class Affine(NamedTuple):
    """The step after the statistics: y = g(weight * xhat + bias + residual), with eps for xhat.

    In backward ``residual_NCS`` is what ``autograd.keep`` kept: y where that tells dg/dz, else the residual.
    """

    weight_C: Tensor | None = None
    bias_C: Tensor | None = None
    residual_NCS: Tensor | None = None
    eps: float = 1e-5
    activation: int = 0
    a: float = 0.0
    b: float = 0.0

    @property
    def g(self) -> Activation:
        """The activation."""
        return Activation(*self[4:])

    def in_one_dtype(self, x_NCS: Tensor) -> tuple[Tensor, Affine]:
        """x and the residual in the dtype that ``y + residual`` has."""
        if self.residual_NCS is None or self.residual_NCS.dtype == x_NCS.dtype:
            return x_NCS, self
        dtype = torch.promote_types(x_NCS.dtype, self.residual_NCS.dtype)
        return x_NCS.to(dtype), self._replace(residual_NCS=self.residual_NCS.to(dtype))


class Running(NamedTuple):
    """Running statistics, which training moves in place: running <- (1 - momentum) * running + momentum * batch.

    ``batches`` counts this one; with momentum=None the running statistics are the plain average over all. With
    ``skipped``, (C,) int64, a channel's running statistics never take up what is not finite: it is counted there.
    """

    mean_C: Tensor | None = None
    var_C: Tensor | None = None
    batches: Tensor | None = None
    skipped: Tensor | None = None
    momentum: float | None = 0.1


class Moments(NamedTuple):
    """Mean and biased variance of each channel in float64; of how many values: (1,), or (C,) where channels differ."""

    mean_C: Tensor
    var_C: Tensor
    values: Tensor

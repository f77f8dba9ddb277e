"""A layer in the words of TorchScript. It reads annotations as they are: no ``from __future__ import annotations``."""
# mypy: disable-error-code="arg-type, operator"

# (mypy takes buffers for ``Tensor | Module``; a class annotation, which would tell it, hides them from TorchScript.)

from typing import Any

import torch
from torch import Tensor, nn


class Scripted(nn.Module):
    """A layer in torch's own functions, for ``torch.jit.script``."""

    __constants__ = ("momentum", "epsilon", "tracks", "has_statistics", "frozen")

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._parameters, self._buffers = layer._parameters, layer._buffers
        self.epsilon, self.momentum, self.training = layer.epsilon, layer.momentum, layer.training
        self.tracks = layer.track_running_stats and layer.running_mean is not None
        self.has_statistics = layer.running_mean is not None
        self.frozen = layer.frozen_statistics
        self.then = layer.g.module()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(BN(input) + residual)"""
        in_train = self.training and not self.frozen
        share = 0.0 if self.momentum is None else self.momentum
        batches = self.num_batches_tracked
        if in_train and self.tracks and batches is not None:
            batches.add_(1)
            if self.momentum is None:
                share = 1.0 / float(batches)
        read = self.tracks if in_train else self.has_statistics
        y = torch.nn.functional.batch_norm(
            input,
            self.running_mean if read else None,
            self.running_var if read else None,
            self.weight,
            self.bias,
            in_train or not self.has_statistics,
            share,
            self.epsilon,
        )
        if residual is not None:
            y = y + residual
        return self.then(y)

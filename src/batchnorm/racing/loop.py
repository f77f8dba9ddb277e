"""What a training does around its batches, beyond forward, backward and step.

Comes from: ``Task.loop``. Goes to: ``trainer.py``, which calls it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


class Loop:
    """Nothing but the network's modes. ``number``: of a batch, since the training began."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def to_train(self) -> None:
        """Before each step."""
        self.model.train()

    def to_eval(self) -> None:
        """Before the network is scored."""
        self.model.eval()

    def before_zero_grad(self, optimizer: Optimizer) -> None:
        """Before each step."""

    def before_batch(self, batch: Any, number: int) -> Any:
        """The batch that is trained on, of one that is on its device."""
        return batch

    def before_step(self, optimizer: Optimizer) -> None:
        """When the gradients are there."""

    def after_batch(self) -> None:
        """After the step, where the batch was a step's last."""

"""The work of a training around its batches, beyond forward, backward and step."""

from __future__ import annotations

from collections.abc import Iterable
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

    def before_forward(self, optimizer: Optimizer) -> None:
        """Before a step's first forward pass, which has the gradients' memory where they are cleared here."""
        optimizer.zero_grad()

    def before_batch(self, batch: Any, number: int) -> Any:
        """The batch that is trained on, of one that is on its device."""
        return batch

    def before_backward(self, optimizer: Optimizer) -> None:
        """Before a step's first backward pass: until here its gradients must have been cleared."""

    def after_backward(self) -> None:
        """After each batch's."""

    def to_clip(self, optimizer: Optimizer) -> Iterable[nn.Parameter]:
        """Whose gradients' norm is clipped."""
        return self.model.parameters()

    def before_step(self, optimizer: Optimizer) -> None:
        """When the gradients are there, as they are without a scaler, before they are clipped."""

    def after_batch(self) -> None:
        """After the step, where the batch was a step's last."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the model's."""

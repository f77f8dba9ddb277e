"""A copy to train, beside the model, which is as before afterwards: whoever reaches it past the copy is told so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.population.snapshots import check_materialized, set_aside
from batchnorm.surgery.copies import copied


class TrainedCopy:
    """``model``: the copy, in train mode; the model that it is of must not get the gradients."""

    def __init__(self, original: nn.Module) -> None:
        self.original, self.model = original, copied(original).train()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not self.trainable:
            raise ValueError(
                "find_learning_rate: the model has no parameter that requires a gradient, so there is nothing to "
                "train: model.requires_grad_() first, or pass the model before it was frozen."
            )
        self.reached = False  # whether a gradient has reached the copy

    def optimizer(self, make: Callable[..., torch.optim.Optimizer], rate: float) -> torch.optim.Optimizer:
        """``make``'s, which is to stand on the copy's parameters."""
        example = "torch.optim.SGD, or functools.partial(torch.optim.SGD, momentum=0.9)"
        if not callable(make):
            raise TypeError(
                f"optimizer is a function of (parameters, lr=...), which makes one for the copy that is trained; got "
                f"{_what(make)}: pass {example}."
            )
        made: Any = make(self.trainable, lr=rate)
        if not hasattr(made, "param_groups"):
            raise TypeError(f"optimizer(parameters, lr=...) returned {_what(made)}, no optimizer: pass {example}.")
        if isinstance(made, torch.optim.LBFGS):
            raise ValueError("find_learning_rate makes one step per batch, and LBFGS needs a closure: choose another.")
        held = {id(p) for group in made.param_groups for p in group["params"]}
        others = held & {id(p) for p in self.original.parameters()}
        if others or not held & {id(p) for p in self.trainable}:
            whose = "the model's own parameters" if others else "parameters of another model"
            raise ValueError(
                f"optimizer(parameters, lr=...) returned one that holds {whose}, not the copy's, which is trained: "
                "use the parameters that it is given."
            )
        optimizer: torch.optim.Optimizer = made
        return optimizer

    def check(self, owner: str) -> None:
        """After a backward: the copy has got gradients, the original none. ``owner``: of the loss, forward or loss."""
        self.reached = self.reached or any(p.grad is not None for p in self.trainable)
        found = next((name for name, p in self.original.named_parameters() if p.grad is not None), None)
        if found is None and self.reached:
            return
        what = f"{found} of the model itself got a gradient" if found else "no parameter of the copy got a gradient"
        advice = (
            "use the model that forward is given, forward(model, batch), for a penalty on its parameters too"
            if owner == "forward"
            else "a loss that reads the model's parameters, a penalty say, goes into forward=, which is given the "
            "copy: lambda model, batch: loss(model(batch[0]), batch[1]) + penalty(model)"
        )
        raise ValueError(f"find_learning_rate trains a copy of the model, and {owner} uses another ({what}): {advice}.")


@contextmanager
def trained_copy(model: nn.Module) -> Iterator[TrainedCopy]:
    """A copy to train. The model's gradients, buffers and modes, and torch's random numbers, are as before afterwards.

    Raises:
        TypeError: not a module.
        ValueError: a lazy layer; nothing that could be trained.
    """
    check_materialized(model, "find_learning_rate", weights=True, runs=True)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices), torch.enable_grad():
        trained = TrainedCopy(model)
        with set_aside(model), _without_gradients(model):
            yield trained


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    gradients: list[tuple[nn.Parameter, Tensor | None]] = [(p, p.grad) for p in model.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient


def _what(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"

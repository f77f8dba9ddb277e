"""What is scored, and how: a metric over all test examples, on one process or several.

Comes from: ``Task.metric``. Goes to: ``trainer.py``, one score per evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree


class Metric(Protocol):
    """What torchmetrics.Metric has, of it: outputs and targets batch by batch, then one number."""

    def update(self, output: Any, target: Any) -> None: ...

    def compute(self) -> Any: ...


class Mean:
    """The mean over examples of ``value(output, target)``, itself a mean over the batch's examples."""

    def __init__(self, value: Callable[[Any, Any], Tensor]) -> None:
        self.value, self.total, self.count = value, 0.0, 0

    def update(self, output: Any, target: Any) -> None:
        examples = count_of(target)
        self.total += float(self.value(output, target)) * examples
        self.count += examples

    def compute(self) -> float:
        total, count = self.total, self.count
        if dist.is_initialized():
            both: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(both, (total, count))
            total, count = sum(t for t, _ in both), sum(c for _, c in both)
        return round(total / count, 6)  # sums of float32 means: equal counts must give equal scores


class OfAll:
    """A function of all outputs and all targets: kept on the CPU, joined along their first dimension."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function
        self.kept: list[Any] = []

    def update(self, output: Any, target: Any) -> None:
        self.kept.append(_pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), (output, target)))

    def compute(self) -> Any:
        kept = self.kept
        if dist.is_initialized():
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, kept)
            kept = [pair for share in shares for pair in share]
        return self.function(*_pytree.tree_map(lambda *parts: _joined(parts), kept[0], *kept[1:]))


def _joined(parts: tuple[Any, ...]) -> Any:
    if not all(isinstance(part, Tensor) for part in parts):
        return parts[0] if len(parts) == 1 else list(parts)
    return torch.cat(parts) if parts[0].ndim else torch.stack(parts)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of examples whose largest output is their class: output (N, classes, ...), target (N, ...) -> scalar."""
    return (output.argmax(1) == target).float().mean()


def metric_of(given: Any, loss: Callable[[Any, Any], Tensor]) -> Metric:
    """A new one for an evaluation: ``"accuracy"``, ``"loss"``, a function of all outputs and targets, a torchmetrics.Metric."""
    if given == "accuracy":
        return Mean(accuracy)
    if given == "loss":
        return Mean(loss)
    if is_object(given):
        own = copy.deepcopy(given)
        own.reset()
        return own  # type: ignore[no-any-return]
    return OfAll(given)


def is_object(given: Any) -> bool:
    """Whether it is a torchmetrics.Metric or the like."""
    return all(callable(getattr(given, name, None)) for name in ("update", "compute", "reset"))


def name_of(given: Any) -> str:
    """For tables: of a function its name, of a metric its class."""
    if isinstance(given, str):
        return given
    name = type(given).__name__ if is_object(given) else getattr(given, "__name__", type(given).__name__)
    return "metric" if name == "<lambda>" else name


def count_of(batch: Any) -> int:
    """Examples in a batch: the length of its first tensor."""
    first = next((leaf for leaf in _pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
    return 1 if first is None else len(first)


def logits_of(output: Any) -> Any:
    """Of a model's output what is compared with targets: ``.logits`` or ``["logits"]`` where it has them."""
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)

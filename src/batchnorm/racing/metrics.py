"""Metrics over all test examples, on one process or several."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree

from batchnorm.racing.errors import RaceError


class Metric(Protocol):
    """The part of torchmetrics.Metric that a race needs: outputs and targets batch by batch, then one number."""

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
        return rounded(total / count, 6)  # sums of float32 means: equal counts must give equal scores


def rounded(value: float, digits: int) -> float:
    """To so many decimals; below 1, as losses of small targets are, to so many significant digits."""
    if not value or not math.isfinite(value):
        return value
    return round(value, digits - min(0, math.floor(math.log10(abs(value))) + 1))


class OfAll:
    """A function of all outputs and all targets: kept on the CPU, tensors joined along their first dimension.

    Lists with an entry per example, as detection has them, become one list.
    """

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
        outputs, targets = zip(*kept, strict=True)
        return self.function(_joined(outputs), _joined(targets))


def _joined(parts: tuple[Any, ...] | list[Any]) -> Any:
    """The parts that batches have in common, by place and key, joined over all batches."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else torch.stack(parts)
    if isinstance(first, Mapping):
        whole = {key: _joined([part[key] for part in parts]) for key in first}
        return type(first)(**whole) if is_dataclass(first) else whole  # transformers' outputs are both
    if isinstance(first, list | tuple):
        if _per_example(first) or len({len(part) for part in parts}) > 1:
            return [one for part in parts for one in part]
        places = [_joined(some) for some in zip(*parts, strict=True)]
        return type(first)(*places) if hasattr(first, "_fields") else type(first)(places)
    return first if len(parts) == 1 else list(parts)


def _per_example(value: Any) -> bool:
    """Whether it is a list with an entry per example: of dicts, texts or numbers, not of tensors for all of them."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields"):
        return False
    return bool(value) and all(isinstance(one, Mapping | str | int | float) for one in value)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of examples whose largest output is their class: output (N, classes, ...), target (N, ...) -> scalar.

    Raises:
        RaceError: other shapes, which would be compared all the same where they broadcast.
    """
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in (output, target)]
    if not (isinstance(output, Tensor) and output.ndim > 1 and output.shape[1] > 1):
        raise RaceError(f"accuracy is of outputs (N, classes, ...), and got {shapes[0]}: give another metric=.")
    if not (isinstance(target, Tensor) and target.shape == (len(output), *output.shape[2:])):
        raise RaceError(
            f"accuracy is of outputs (N, classes, ...) and targets (N, ...), and got {shapes[0]} and {shapes[1]}: give "
            "another metric=."
        )
    return (output.argmax(1) == target).float().mean()


def metric_of(given: Any, loss: Callable[[Any, Any], Tensor]) -> Metric:
    """A new one for an evaluation, of what ``Task.metric`` may be."""
    if isinstance(given, str):  # torchmetrics' == makes another metric, which counts as true
        return Mean(accuracy if given == "accuracy" else loss)
    if is_object(given):
        own = copy.deepcopy(given)
        own.reset()
        return own
    return OfAll(given)


def check_metric(who: str, given: Any) -> None:
    """Refuse what cannot score.

    Raises:
        RaceError: with what a metric may be.
    """
    if isinstance(given, str) and given not in ("accuracy", "loss"):
        raise RaceError(f'{who}: metric is "accuracy", "loss", a function or a torchmetrics.Metric (got {given!r}).')
    if isinstance(given, type):
        raise RaceError(f"{who}: metric must be an object, not its class: {given.__name__}(...).")
    if given is not None and not (isinstance(given, str) or callable(given) or is_object(given)):
        raise RaceError(f"{who}: metric must be a function of all outputs and targets (got {given!r}).")


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
    """Examples in a batch: of graphs as it says, else the length of its first tensor or list of an entry per example.

    Wherever that is: in mappings (those of transformers' collators), sequences and dataclasses.
    """
    return _count_of(batch) or 1


def _count_of(batch: Any) -> int | None:
    graphs = getattr(batch, "num_graphs", None)  # PyTorch Geometric's batches
    if isinstance(graphs, int):
        return graphs
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if _per_example(batch):
        return len(batch)
    parts: Any = batch if isinstance(batch, list | tuple) else ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif is_dataclass(batch):
        parts = [getattr(batch, field.name) for field in fields(batch)]
    return next(filter(None, map(_count_of, parts)), None)


def logits_of(output: Any) -> Any:
    """Of a model's output what is compared with targets: ``.logits`` or ``["logits"]`` where it has them."""
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)

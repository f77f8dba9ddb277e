"""Logged values of a LightningModule, as Lightning keeps them: of steps, and of epochs, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from batchnorm.racing.errors import RaceError
from batchnorm.racing.metrics import is_object

REDUCTIONS = {"mean": "mean", "avg": "mean", "sum": "sum", "max": "max", "min": "min", "amax": "max", "amin": "min"}


@dataclass
class Entry:
    """One name: its last value, and what an epoch's is made of. ``metric``: the torchmetrics object, if it is one."""

    on_step: bool
    on_epoch: bool
    how: str = "mean"
    metric: Any = None
    last: Any = None
    total: Any = None
    weight: float = 0

    def add(self, value: Any, weight: float) -> None:
        if self.metric is not None:
            self.last = value._forward_cache if hasattr(value, "_forward_cache") else None
            return
        self.last = value
        if self.how in ("mean", "sum"):
            more = value * weight if self.how == "mean" else value
            self.total = more if self.total is None else self.total + more
        else:
            self.total = value if self.total is None else getattr(torch, self.how)(self.total, value)
        self.weight += weight

    def value(self, of_step: bool) -> Any:
        """Of the last step, or of the epoch until now; None where it is not kept."""
        if of_step:
            return self.last if self.on_step else None
        if not self.on_epoch:
            return None
        if self.metric is not None:
            return self.metric.compute()
        return self.total / self.weight if self.how == "mean" else self.total


@dataclass
class Logged:
    """Values logged in an epoch, of training (whose steps' values count too) or of validation."""

    training: bool = True
    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, name: str, value: Any, on_step: bool, on_epoch: bool, reduce: Any, weight: float) -> None:
        how = getattr(reduce, "__name__", reduce)
        how = REDUCTIONS.get(how.lower() if isinstance(how, str) else "")
        if is_object(value):
            new = Entry(on_step, on_epoch, metric=value)
        elif how is None:
            raise RaceError(f"self.log({name!r}, reduce_fx={reduce}): a race knows mean, sum, max and min.")
        else:
            new, value = Entry(on_step, on_epoch, how), _as_tensor(name, value)
        self.entries.setdefault(name, new).add(value, weight)

    def values(self, of_step: bool = False) -> dict[str, Any]:
        """By name, also as ``name_step`` or ``name_epoch`` where both are kept: of the last step or the epoch."""
        found: dict[str, Any] = {}
        for name, entry in self.entries.items():
            value = entry.value(of_step) if self.training or not of_step else None
            if value is not None:
                found[name] = value.detach() if isinstance(value, Tensor) else value
                if entry.on_step and entry.on_epoch:
                    found[f"{name}_{'step' if of_step else 'epoch'}"] = found[name]
        return found

    def reset(self) -> None:
        for entry in self.entries.values():
            if entry.metric is not None:
                entry.metric.reset()
        self.entries = {}

    def state_dict(self) -> dict[str, Any]:
        """The objects are the module's: ``seen_by_metrics`` has them, and they are logged again."""
        return {name: vars(entry) for name, entry in self.entries.items() if entry.metric is None}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.entries = {name: Entry(**on_device(stored, device)) for name, stored in state.items()}


def _as_tensor(name: str, value: Any) -> Tensor:
    """A scalar of float32 or wider, as Lightning keeps it."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.get_default_dtype())
    if value.numel() != 1:
        raise ValueError(f"self.log({name!r}, ...): the tensor must have a single element, or take its mean.")
    value = value.detach().clone().squeeze()
    return value if value.dtype in (torch.float32, torch.float64) else value.to(torch.get_default_dtype())


def on_device(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same, its tensors there."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}


def seen_by_metrics(module: nn.Module) -> dict[str, tuple[dict[str, Any], int]]:
    """The states of a module's torchmetrics until now, by their names in it; state_dict leaves them out."""
    return {name: (_copied(each.metric_state), each._update_count) for name, each in _metrics_of(module)}


def see_again(module: nn.Module, seen: dict[str, tuple[dict[str, Any], int]]) -> None:
    """Its torchmetrics go on from there."""
    for name, metric in _metrics_of(module):
        if name in seen:
            for key, value in _copied(seen[name][0], metric.device).items():
                setattr(metric, key, value)
            metric._update_count, metric._computed = seen[name][1], None


def _metrics_of(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in module.named_modules() if is_object(each) and hasattr(each, "_defaults")]


def _copied(state: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """States are tensors, or lists of them."""
    return {name: tree_map_only(Tensor, lambda t: t.detach().clone().to(device=device), state[name]) for name in state}

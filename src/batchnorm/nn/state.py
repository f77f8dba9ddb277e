"""A layer's source of training statistics, and the state that it brings.

The layer's buffers are torch's alone, since torch's tools and others walk over them in parallel, average, slice and
allocate them; a source may bring some of its own while it is there. All else are attributes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from batchnorm.nn.blank import blank
from batchnorm.nn.freezing import Freezing
from batchnorm.nn.skipping import Skipping
from batchnorm.nn.sources import Batch, Source
from batchnorm.nn.sources.source import names_of_buffers


def _needed(kind: type) -> str:
    """The arguments that a source must be given: "(size)"."""
    parameters = inspect.signature(kind).parameters.values()
    return f"({', '.join(p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)})"


def _keys(brought: Any) -> str:
    return ", ".join(map(str, brought)) if isinstance(brought, dict) else repr(brought)


class State(Freezing, Skipping):
    """torch's layer and what ours keep besides: a source of statistics, what is frozen, what was skipped."""

    _statistics: Source = Batch()

    @property
    def statistics(self) -> Source:
        """The source of training statistics. May be set; some bring buffers of their own."""
        return self._statistics

    @statistics.setter
    def statistics(self, statistics: Source) -> None:
        if not isinstance(statistics, Source):
            known = ", ".join(f"{kind.__name__}{_needed(kind)}" for kind in Source.__subclasses__())
            raise TypeError(f"statistics takes a value, {known}, or one of another Source, got {statistics!r}.")
        brought = statistics.buffers(self)
        own = {"running_mean", "running_var", "num_batches_tracked"}
        if not isinstance(brought, dict) or {*brought} & own or {*brought} - {*statistics.initial}:
            raise ValueError(
                f"buffers() of {type(statistics).__name__} gives a dict of the tensors that `initial` names, none of "
                f"them torch's own; initial: {', '.join(statistics.initial) or 'nothing'}, got {_keys(brought)}."
            )
        for name in self._statistics.initial:
            if name not in brought:
                self._buffers.pop(name, None)
        now = self._buffers
        if all(name in now and now[name].shape == t.shape for name, t in brought.items()):  # type: ignore[union-attr]
            brought = {}  # of the same kind with other settings: what was seen stays
        for name, tensor in brought.items():
            if tensor.is_meta:
                tensor = blank(tensor.shape, tensor.dtype, tensor.device, statistics.initial[name])
            self.register_buffer(name, tensor)
        self._statistics = statistics

    def reset_parameters(self) -> None:
        """torch's, and nothing was seen."""
        super().reset_parameters()
        for name, value in self._statistics.initial.items():
            if name in self._buffers:  # torch calls this before there is one
                self._buffers[name].fill_(value)  # type: ignore[union-attr]

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """torch's: to another device, dtype or memory. A source's buffers keep their values where nothing is copied."""
        initial = self._statistics.initial
        before = {name: self._buffers.get(name) for name in initial}
        super()._apply(function, recurse)
        for name, value in initial.items():
            old, now = before[name], self._buffers.get(name)
            if now is not None and now.is_meta:
                self._buffers[name] = blank(now.shape, now.dtype, now.device, value)
            elif now is not None and now is not old and type(now) is Tensor:
                with torch.inference_mode(now.is_inference()):
                    now.copy_(old) if type(old) is Tensor and not old.is_meta else now.fill_(value)
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str],
        *rest: Any,
    ) -> None:  # fmt: skip
        """torch's. Buffers of sources may be missing, and may be there for a layer that has another source."""
        initial = self._statistics.initial
        lacking = {n: self._buffers.pop(n) for n in initial if n in self._buffers and f"{prefix}{n}" not in state_dict}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *rest)
        for name, own in lacking.items():
            if own is not None and own.is_meta and self.running_mean is not None and not self.running_mean.is_meta:
                own = blank(own.shape, own.dtype, self.running_mean.device, initial[name])
            self._buffers[name] = own
        for name in names_of_buffers():
            if f"{prefix}{name}" in unexpected:
                unexpected.remove(f"{prefix}{name}")

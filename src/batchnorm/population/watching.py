"""Layers that are watched: with momentum 1 they leave the statistics of their last batch in their buffers.

Shapes: L layers, C channels of all of them side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.utils import _pytree

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.tracking import is_recomputing, updates_running_statistics
from batchnorm.population.attachments import Attached
from batchnorm.population.estimators import Estimator

STATISTICS = ("running_mean", "running_var")
_KNOWN = (_BatchNorm.forward, SyncBatchNorm.forward, FusedBatchNorm.forward)
_DEPENDS = 0.01  # the share of the old statistics in new ones from which on they are no batch's


def place(layer: nn.Module, name: str) -> dict[str, Any]:
    """The dict in which the layer holds this tensor: its buffers, or its attributes where one took a buffer's place."""
    return layer._buffers if name in layer._buffers else vars(layer)


def counted(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors that a batch changes, as far as the layer has them: a count may be set to None, or deleted."""
    of_source = layer.statistics.initial if isinstance(layer, FusedBatchNorm) else ()
    held = {name: place(layer, name).get(name) for name in (*STATISTICS, "num_batches_tracked", *of_source)}
    return {name: t for name, t in held.items() if t is not None}


def finite(t: Tensor) -> Tensor:
    """A copy with 0 for what is not finite: with momentum 1 nothing is left of old values, but 0 * NaN is NaN."""
    return t.nan_to_num(0.0, 0.0, 0.0)


@contextmanager
def batch_in_buffers(layers: Sequence[Any]) -> Iterator[None]:
    """In train, layers leave the statistics of their last batch in their buffers, whether they are finite or not."""
    before = [dict(vars(layer)) for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 1.0
            if isinstance(layer, FusedBatchNorm):
                layer.guarded, layer.counts, layer.gathering = False, [], True
        yield
    finally:
        for layer, held in zip(layers, before, strict=True):
            for name in ("momentum", "guarded", "counts", "gathering"):
                vars(layer).pop(name, None)
                if name in held:
                    vars(layer)[name] = held[name]


class Values:
    """How many values per channel the statistics are of that a forward pass leaves in the layer's buffers.

    A forward that is neither torch's nor ours may give torch's a part of its input: ``_check_input_dim`` is told which.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.last = layer, -1
        self.foreign = "forward" in vars(layer) or type(layer).forward not in _KNOWN

    def begin(self) -> None:
        """Before the forward pass."""
        if self.foreign:
            self.last = -1
            vars(self.layer)["_check_input_dim"] = self._given

    def _given(self, x: Tensor) -> None:
        self.last = _per_channel(x)
        type(self.layer)._check_input_dim(self.layer, x)

    def end(self, args: Any, output: Any) -> int:
        """After it; 0 where the layer does not update."""
        layer = self.layer
        if self.foreign:
            vars(layer).pop("_check_input_dim", None)
        # With a mask, or of several processes, a batch has not as many values as its shape says.
        if getattr(layer, "counts", None):
            return int(layer.counts.pop().max())
        return self.last if self.last >= 0 else _per_channel(args[0] if args else output)


def _per_channel(x: Tensor) -> int:
    return x.numel() // max(x.shape[1], 1)


class Watch:
    """Layers and what each batch leaves in their buffers, for an estimator.

    Whoever reads a layer's buffers between its forward passes finds the statistics that were there at first, but for
    what is not finite. Layers that do not update them, whatever their mode and flags say, are ``left`` alone.
    """

    again = True  # of none: the hooks of a copy that a class makes in a way of its own

    def __init__(self, estimate: Estimator) -> None:
        self.estimate, self.layers = estimate, estimate.layers
        self.own = self._now()
        self.start = [finite(t) for t in self.own]
        self.apart = len({t.device for t in self.own}) > 1
        if self.own:
            torch._foreach_copy_(self.own, self.start)
        self.values = [Values(layer) for layer in self.layers]
        self.noted: dict[int, int] = {}  # values of the layers whose batch is still in their buffers
        self.left: set[int] = set()
        self.still: set[int] = set()  # of these, the ones that never move
        self.looked_at: dict[int, Any] = {}  # layers with a forward of their own, by what they were first given
        self.mine: dict[int, bool] = {}  # whether a forward pass has these buffers; others are of preserve_state
        self.again = False

    def __reduce__(self) -> Any:
        return object.__new__, (Watch,)

    def _now(self) -> list[Tensor]:
        """The means of all layers, then the variances."""
        return [place(layer, name)[name] for name in STATISTICS for layer in self.layers]

    def _restore(self, now: list[Tensor]) -> None:
        if any(t is not own for t, own in zip(now, self.own, strict=True)):
            for own, (name, layer) in zip(self.own, ((n, m) for n in STATISTICS for m in self.layers), strict=True):
                place(layer, name)[name] = own
        torch._foreach_copy_(self.own, self.start)

    def hooks(self) -> list[Attached]:
        """Have the layers note what they see; ``read`` is to be called after each forward pass of the model."""
        return [
            Attached(
                layer,
                (
                    layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True),
                    layer.register_forward_hook(partial(self._after, index), with_kwargs=True),
                ),
            )
            for index, layer in enumerate(self.layers)
        ]

    def _before(self, index: int, layer: Any, args: Any, kwargs: Any) -> None:
        if self.again:
            return
        if index in self.noted:  # used twice in one forward pass
            self.read()
        self.mine[index] = place(layer, "running_mean")["running_mean"] is self.own[index]
        self.values[index].begin()
        if self.values[index].foreign and index not in self.looked_at:
            self.looked_at[index] = _pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))

    def _after(self, index: int, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self.again:
            return
        values = self.values[index].end(args, output)
        if not values or not self.mine[index]:
            return
        has_noted = isinstance(layer, FusedBatchNorm) and not torch.compiler.is_compiling()  # its run, by itself
        if not (has_noted and torch._C._current_graph_task_id() == -1) and is_recomputing(layer):
            return
        if layer.training and updates_running_statistics(layer) and index not in self.still:
            self.noted[index] = values
        else:
            self.left.add(index)

    def read(self) -> None:
        """Take over what is in the buffers."""
        if not self.noted:
            return
        now = self._now()
        row = torch.cat([t.to(self.estimate.device) for t in now] if self.apart else now)
        for index in [index for index in self.noted if self.looked_at.get(index)]:
            found = [t.clone() for t in now[index :: len(self.layers)]]
            if not self._takes_the_batchs(index, found):
                self.still.add(index)
                self.left.add(index)
                del self.noted[index]
            self.looked_at[index] = None
        self.estimate.take(self.noted, row)
        self.noted = {}
        self._restore(now)

    def _takes_the_batchs(self, index: int, found: list[Tensor]) -> bool:
        """Whether a forward of somebody's own takes the batch's statistics over; not where it leaves the old ones.

        The same forward pass again, with other statistics before, shows how much of them is left.

        Raises:
            ValueError: a share of them.
        """
        layer, (args, kwargs) = self.layers[index], self.looked_at[index]
        start = self.start[index :: len(self.layers)]
        other = [s + 10 * (1 + s.abs() + f.abs()) for s, f in zip(start, found, strict=True)]
        self._restore(self._now())
        for t, o in zip(self.own[index :: len(self.layers)], other, strict=True):
            t.copy_(o)
        self.again = True
        try:
            layer.forward(*args, **kwargs)
        except Exception:  # it needs what was around it the first time: nothing is known of it
            return True
        finally:
            self.again = False
        again = [place(layer, name)[name] for name in STATISTICS]
        if all(torch.equal(*pair) for pair in (*zip(found, start, strict=True), *zip(again, other, strict=True))):
            return False
        shares = [(a - f) / (o - s) for a, f, o, s in zip(again, found, other, start, strict=True)]
        if any((share.nan_to_num(0.0, 0.0, 0.0).abs() > _DEPENDS).any() for share in shares):
            raise OldStatistics(type(layer).__name__, index)
        return True


class OldStatistics(ValueError):
    """A layer's statistics after a batch are not the batch's, whatever its momentum: of which class, and which one."""

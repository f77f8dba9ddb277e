"""Blocks of code around which running statistics are kept, or updated once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.tracking import is_recomputing, updates_running_statistics
from batchnorm.ops.arguments import Running
from batchnorm.ops.running import blend_
from batchnorm.population.attachments import ABSENT, Attached, own_now
from batchnorm.population.estimators import Pooled, Population
from batchnorm.population.snapshots import check_materialized, kind, let_go, set_aside, times_set_aside
from batchnorm.population.watching import STATISTICS, Values, counted, finite, place

Model = TypeVar("Model", bound=nn.Module)

_SETTINGS = ("guarded", "counts", "gathering", "held")


@contextmanager
def preserve_state(model: Model) -> Iterator[Model]:
    """Whatever happens inside leaves no trace in the model's buffers and modes, on an exception too.

    Buffers have their old values afterwards, in the same tensors; those that were added are gone; every module is in
    the mode (train or eval) that it was in. Batch normalization layers, torch's and ours, are as before in all that can
    be set on them: frozen or not (``freeze``, ``unfreeze``, and which of their parameters require a gradient), where
    their statistics come from, momentum, batches skipped. Other parameters and random number generators are not looked
    after.

    Inside, the model works on copies of its buffers, so that the block may stand between a forward pass and its
    backward, and hold a forward pass whose backward comes later. Inside ``accumulate_statistics`` what it sees is not
    counted. Where the model moves inside, to another device or dtype, its buffers follow its parameters, with their old
    values, in new tensors.

    Args:
        model: any module; given to the ``with`` statement again.

    Raises:
        ValueError: a lazy layer has no shape yet: run the model once before.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm1d(3)
        >>> with bn.preserve_state(layer):  # try out a batch, or another domain's statistics
        ...     _ = layer.train()(torch.randn(8, 3) + 5)
        >>> layer.running_mean.tolist()
        [0.0, 0.0, 0.0]
    """
    check_materialized(model, "preserve_state")
    with set_aside(model):
        yield model


@contextmanager
def accumulate_statistics(model: Model) -> Iterator[Model]:
    """Several micro-batches, one update of the running statistics: as from one large batch.

        running <- (1 - momentum) * running + momentum * (mean, unbiased variance of all values seen inside)

    Each forward inside normalizes with its own micro-batch, as always in training; only the running statistics wait.
    At the end they move once, and ``num_batches_tracked`` counts one. So a layer with no batch normalization before it
    ends with exactly the large batch's running statistics; a layer after another one sees inputs that were normalized
    per micro-batch. An exception discards what was seen. A channel whose new statistics would not be finite keeps its
    old ones, mean and variance; our layers count that as one of their ``skipped_batches`` and say so at the next
    ``eval()``. In the plain average (momentum=None), which has one count for all channels, such an update enters in
    none and is not counted.

    Inside, between forward passes, the running statistics are those from before, so that evaluation and ``recalibrate``
    work there. What is seen inside ``preserve_state`` does not count; a block inside another one of the same model adds
    to the outer one, and a block inside ``preserve_state`` updates what is gone after it. Layers that do not update
    (frozen, ``track_running_stats=False``, in eval) are left alone, and those that ``recalibrate`` runs meanwhile.
    Backward may come inside or after the block. A momentum that is set inside stays and is the one of the update; the
    model may move to another device or dtype, be loaded, copied or saved.

    Args:
        model: any module; stock ``torch.nn.BatchNorm*`` layers count too. Given to the ``with`` statement again.

    Raises:
        ValueError: a lazy layer has no shape yet: run the model once before.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer, x = bn.BatchNorm1d(3), torch.randn(32, 3)
        >>> with bn.accumulate_statistics(layer):
        ...     for part in x.split(8):
        ...         _ = layer(part)  # and backward
        >>> torch.allclose(layer.running_mean, 0.1 * x.mean(0)), layer.num_batches_tracked.item()
        (True, 1)

    Source: the sums of Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    check_materialized(model, "accumulate_statistics")
    gathered = [
        _Gathered(layer)
        for layer in model.modules()
        if updates_running_statistics(layer) and "momentum" not in own_now(layer)  # else others read each batch
    ]
    held: list[Attached] = []
    try:
        for one in gathered:
            held.append(one.hold())
        yield model
    finally:
        for attached in held:
            attached.remove()
        for one in gathered:
            one.release()
    for one in gathered:
        (seen,) = one.pooled.results()
        if seen.values and one.has_its_own() and updates_running_statistics(one.layer):  # not frozen meanwhile
            _move(one.layer, seen)


class _Watched(float):
    """A layer's eps inside the block. Its type makes torch.compile look again, and find the hooks.

    Copies and files have the plain number.
    """

    def __reduce__(self) -> Any:
        return float, (float(self),)


class _Gathered:
    """The batches that one layer sees inside the block, in buffers of each forward pass's own.

    A pending backward of torch's layers holds the buffers of its forward pass, so each gets new ones. Between forward
    passes the layer is as it was: what is copied, loaded, moved or set then needs no care.
    """

    layer: Any = None  # of none: the hooks of a copy that a class makes in a way of its own

    def __init__(self, layer: Any) -> None:
        self.layer, self.pooled, self.values = layer, Pooled([layer]), Values(layer)
        self.aside = times_set_aside(layer)
        self.eps: float = vars(layer)["eps"]
        self.mark = _Watched(self.eps)  # not made in a hook: compiled ones
        self.settings = {name: vars(layer)[name] for name in _SETTINGS if name in vars(layer)}
        self.guarded = getattr(layer, "guarded", None)
        self.gathers = self.repeats = self.marked = False  # this forward pass
        self.moves: bool | None = None if self.values.foreign else True  # not known of somebody's own forward
        self.adopt(layer)

    def __reduce__(self) -> Any:
        return object.__new__, (_Gathered,)

    def hold(self) -> Attached:
        """From now on."""
        vars(self.layer)["eps"] = self.mark
        if self.guarded is not None:
            vars(self.layer)["gathering"] = True
        hooks = [
            self.layer.register_forward_pre_hook(self.before),
            self.layer.register_forward_hook(self.after, always_call=True),
            self.layer.register_load_state_dict_post_hook(self.adopt),
        ]
        return Attached(self.layer, hooks, self.of_copies)

    def of_copies(self) -> dict[str, Any]:
        """Values for copies of the layer: those from before the block, and during a forward pass its own."""
        settings = {name: self.settings.get(name, ABSENT) for name in _SETTINGS}
        inside = self.own | {"momentum": self.momentum, "_check_input_dim": ABSENT} if self.gathers else {}
        return settings | inside

    def has_its_own(self) -> bool:
        """Whether the layer works on what it had when the block began, not on copies of ``preserve_state``."""
        return times_set_aside(self.layer) == self.aside

    def release(self) -> None:
        """As before, but for what was set inside."""
        if isinstance(vars(self.layer)["eps"], _Watched):
            vars(self.layer)["eps"] = self.eps
        for name in _SETTINGS:
            vars(self.layer).pop(name, None)
        vars(self.layer).update(self.settings)

    def adopt(self, layer: Any, _: Any = None) -> None:
        """Other buffers take the place of the layer's own: it was moved, or loaded with ``assign=True``."""
        if layer is self.layer and self.has_its_own():
            self.own = counted(layer)

    def before(self, layer: Any, inputs: Any) -> None:
        """Give the forward pass buffers of its own, unless others are in place (of ``preserve_state``, say)."""
        if layer is not self.layer:
            return
        self.marked = isinstance(vars(layer)["eps"], _Watched)
        if self.marked:
            vars(layer)["eps"] = self.eps
        now = layer.running_mean
        if now is not None and kind(now) != kind(self.own["running_mean"]):
            self.adopt(layer)
        self.gathers = now is self.own["running_mean"] and layer.training and updates_running_statistics(layer)
        if not self.gathers:
            return
        self.repeats = is_recomputing(layer)
        self.own = counted(layer)
        if self.guarded is not None:
            vars(layer).update(guarded=False, counts=[])
        if self.guarded is not None:
            vars(layer)["held"] = layer.statistics.known(layer)  # what Renorm goes on correcting towards
        for name, t in self.own.items():
            place(layer, name)[name] = finite(t) if name in STATISTICS else t.clone()
        self.momentum = layer.momentum
        vars(layer)["momentum"] = 1.0
        self.values.begin()

    def after(self, layer: Any, inputs: Any, output: Any) -> None:
        """Each batch is read at once; None is the output of a forward pass that failed."""
        if layer is not self.layer:
            return
        if self.gathers:
            values = self.values.end(inputs, output) if output is not None else 0
            if values and layer.training and updates_running_statistics(layer) and not self.repeats:
                self.read(values)
            for name, t in self.own.items():
                place(layer, name)[name] = t
            vars(layer)["momentum"] = self.momentum
            if self.guarded is not None:
                vars(layer).update(guarded=self.guarded, counts=None, held=None)
        if self.marked:
            vars(layer)["eps"] = self.mark
        self.gathers = self.marked = False

    def read(self, values: int) -> None:
        """Take over what is in the buffers; of somebody's own forward, where the first one moved them."""
        now = [place(self.layer, name)[name] for name in STATISTICS]
        if self.moves is None and not torch.compiler.is_compiling():
            before = [finite(self.own[name]) for name in STATISTICS]
            self.moves = not all(torch.equal(t, old) for t, old in zip(now, before, strict=True))
        if self.moves is not False:
            self.pooled.take({0: values}, torch.cat([t.to(self.pooled.device) for t in now]))


def _move(layer: _BatchNorm, seen: Population) -> None:
    """One update of the running statistics, in the channels where both stay finite."""
    running: Any = layer
    mean, var = running.running_mean, running.running_var
    let_go(mean, var)
    if isinstance(layer, FusedBatchNorm):
        layer.statistics.moved(layer, torch.tensor([seen.values]))
    unbiased_var_C = seen.unbiased_var_C if seen.values > 1 else var  # one value has none
    # torch's layers have no counter; nothing that is not finite enters them either.
    counter = layer.counter(mean) if isinstance(layer, FusedBatchNorm) else None
    skipped = torch.zeros_like(mean, dtype=torch.int64) if counter is None else counter
    batches = counted(layer).get("num_batches_tracked")
    momentum = 0.0 if layer.momentum is None and batches is None else layer.momentum
    running_statistics = Running(mean, var, batches, skipped, momentum)
    blend_(running_statistics, seen.mean_C.to(mean.device), unbiased_var_C.to(var.device))

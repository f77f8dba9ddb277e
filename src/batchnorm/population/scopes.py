"""Blocks of code around which running statistics are kept, or updated once.

Comes from: any model, torch's layers or ours. Goes to: its buffers and modes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.statistics import Running
from batchnorm.ops.running import blend_
from batchnorm.population.estimate import start_afresh
from batchnorm.population.estimators import Pooled, Population, batch_in_buffers

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def preserve_state(model: Model) -> Iterator[Model]:
    """Whatever happens inside leaves no trace in the model's buffers and modes, on an exception too.

    Buffers have their old values afterwards, in the same tensors; those that were added are gone; every module is in
    the mode (train or eval) that it was in. Parameters and random number generators are not looked after.

    Args:
        model: any module; given to the ``with`` statement again.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm1d(3)
        >>> with bn.preserve_state(layer):  # try out a batch, or another domain's statistics
        ...     _ = layer.train()(torch.randn(8, 3) + 5)
        >>> layer.running_mean.tolist()
        [0.0, 0.0, 0.0]
    """
    modes = [(module, module.training) for module in model.modules()]
    saved = [
        (module, dict(module._buffers), set(module._non_persistent_buffers_set),
         {name: t.detach().clone() for name, t in module._buffers.items() if t is not None})
        for module in model.modules()
    ]  # fmt: skip
    try:
        yield model
    finally:
        with torch.no_grad():
            for module, buffers, not_saved, values in saved:
                if not isinstance(module, torch.jit.ScriptModule):  # which can neither gain nor lose buffers
                    module._buffers.clear()
                    module._buffers.update(buffers)
                    module._non_persistent_buffers_set.clear()
                    module._non_persistent_buffers_set.update(not_saved)
                for name, value in values.items():
                    module._buffers[name].copy_(value)  # type: ignore[union-attr]
        for module, training in modes:
            module.training = training


@contextmanager
def accumulate_statistics(model: Model) -> Iterator[Model]:
    """Several micro-batches, one update of the running statistics: as from one large batch.

        running <- (1 - momentum) * running + momentum * (mean, unbiased variance of all values seen inside)

    Each forward inside normalizes with its own micro-batch, as always in training; only the running statistics wait.
    At the end they move once, and ``num_batches_tracked`` counts one. So a layer with no batch normalization before it
    ends with exactly the large batch's running statistics; a layer after another one sees inputs that were normalized
    per micro-batch. An exception discards what was seen. A channel whose new statistics would not be finite keeps its
    old ones, mean and variance; our layers count that as one of their ``skipped_batches`` and say so at the next
    ``eval()``. With momentum=None the average is over the updates that were not skipped. Inside, the running statistics
    are not to be read.

    Args:
        model: any module; stock ``torch.nn.BatchNorm*`` layers count too. Given to the ``with`` statement again.

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
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    saved = [(layer, Pooled([layer]), {name: t.clone() for name, t in layer.named_buffers()}) for layer in layers]
    hooks = [hook for layer, pooled, _ in saved for hook in _watch(layer, pooled)]
    done = False
    try:
        for layer, _, old in saved:
            if "renorm_steps" in old:  # goes on correcting towards what it had
                layer.held = Running(old["running_mean"], old["running_var"], old["renorm_steps"])  # type: ignore[assignment]
        with batch_in_buffers(layers):
            yield model
        done = True
    finally:
        for hook in hooks:
            hook.remove()
        for layer, pooled, old in saved:
            if "renorm_steps" in old:
                layer.held = None  # type: ignore[assignment]
            for name, t in layer.named_buffers():
                t.copy_(old.get(name, t))
            (seen,) = pooled.results()
            if done and seen.values:
                _move(layer, seen)


def _watch(layer: _BatchNorm, pooled: Pooled) -> list[RemovableHandle]:
    """Each batch is read at once: DistributedDataParallel overwrites buffers before the next one."""
    return [
        layer.register_forward_pre_hook(start_afresh),
        *pooled.watch(),
        layer.register_forward_hook(lambda *_: pooled.read()),
    ]


def _move(layer: _BatchNorm, seen: Population) -> None:
    """One update of the running statistics, in the channels where both stay finite."""
    running: Any = layer
    if "renorm_steps" in layer._buffers:
        running.renorm_steps.add_(1)
    unbiased_var_C = seen.unbiased_var_C if seen.values > 1 else running.running_var  # one value has none
    # torch's layers have no counter; nothing that is not finite enters them either.
    skipped = (
        layer.counter(running.running_mean)
        if isinstance(layer, FusedBatchNorm)
        else torch.zeros_like(seen.mean_C, dtype=torch.int64)
    )
    blend_(
        running.running_mean, running.running_var, running.num_batches_tracked, skipped, seen.mean_C, unbiased_var_C,
        layer.momentum,
    )  # fmt: skip

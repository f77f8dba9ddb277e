"""One call of a layer: what it has, as the tuples that ops take, and who computes y.

Shapes: N examples, C channels, S places. input is (N, C, ...).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.functional import as_mask, masked_in_eval, of_source, of_whole_batch
from batchnorm.nn.freezing import STATISTICS
from batchnorm.nn.sources import Batch, Source
from batchnorm.ops.activations import NO_ACTIVATION
from batchnorm.ops.arguments import Affine, Moments, Running
from batchnorm.ops.repetition import in_backward, is_repeated, own_copies

if TYPE_CHECKING:
    from batchnorm.nn.base import FusedBatchNorm

_BATCH, _NONE = Batch(), Running()


def forward(layer: FusedBatchNorm, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    """activation(BN(input) + residual) by what the layer has now; in train its running statistics move."""
    layer._check_input_dim(input)
    in_train = layer.training and not layer._frozen & STATISTICS
    buffers, parameters = layer._buffers, layer._parameters
    tensors: Any
    if "running_mean" in buffers and "running_var" in buffers and "weight" in parameters and "bias" in parameters:
        # Past Module.__getattr__, which takes a microsecond each.
        tensors = buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"]
    else:  # computed: parametrizations, pruning
        tensors = layer.running_mean, layer.running_var, layer.weight, layer.bias
    mean, var, weight, bias = tensors
    if in_train and not layer.track_running_stats:
        mean = var = None
    if (mean is None) != (var is None):
        raise ValueError(
            "running_mean and running_var must either both be None or neither be None: "
            f"{'running_mean' if mean is None else 'running_var'} of {type(layer).__name__}({layer.num_features}) is "
            "None alone."
        )
    running, updates = _NONE, False
    if not in_train:
        running = Running(mean, var)
    elif mean is not None:
        updates = (torch.is_grad_enabled() and not in_backward()) or not is_repeated(layer)
        batches, skipped = buffers.get("num_batches_tracked"), layer.counter(mean)  # a count may be deleted
        if not updates:
            mean, var, batches, skipped = own_copies(mean, var, batches, skipped)
        momentum = 0.0 if layer.momentum is None and batches is None else layer.momentum
        running = Running(mean, var, batches, skipped, momentum)
    elif layer.track_running_stats and buffers.get("num_batches_tracked") is not None:
        # torch's count goes on alone
        buffers["num_batches_tracked"].add_(not is_repeated(layer))  # type: ignore[union-attr]
    g, behind = layer.g, None  # behind: a sum that the network broadcasts, where it did not do so when fused
    if layer.fused and residual is not None and residual.shape != input.shape:
        g, behind, residual = NO_ACTIVATION, residual, None
    affine = Affine(weight, bias, residual, layer.__dict__["eps"], *g)
    batches = running.batches
    # A count of another dtype, of a checkpoint that was averaged say, or on another device, is none that kernels take.
    plain = batches is None or (batches.dtype == torch.int64 and batches.is_cpu == input.is_cpu)
    if mask is None and plain and (not in_train or layer._statistics.whole_batch):
        y = of_whole_batch(input, affine, running, in_train or mean is None)
    else:
        y = _with_source(layer, input, affine, running, mask, updates)
    return y if behind is None else layer.g.in_place(y + behind)


def _checked(source: Source, found: Any, x: Tensor) -> tuple[Tensor, Moments]:
    """What a source gives, if it is what it should be."""
    pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)
    if not (pair and isinstance(found[1], Moments) and found[0].shape == x.shape):
        got = f"y of {tuple(found[0].shape)} and a {type(found[1]).__name__}" if pair else f"a {type(found).__name__}"
        raise TypeError(
            f"normalize of {type(source).__name__} returns (y, moments), y of {tuple(x.shape)} and moments as "
            f"self.moments(x) has them; got {got}."
        )
    return found


def _with_source(
    layer: FusedBatchNorm, input: Tensor, affine: Affine, running: Running, mask: Tensor | None, updates: bool
) -> Tensor:
    """y where the fused op does not serve: a mask, or statistics of another source than the whole batch."""
    mask = None if mask is None else as_mask(mask, input)
    in_train = layer.training and not layer._frozen & STATISTICS
    if not in_train and running.mean_C is not None:
        return masked_in_eval(input, affine, running, mask)  # type: ignore[arg-type]
    source = layer._statistics if in_train else _BATCH
    known = source.known(layer) if layer.held is None else layer.held

    def normalize(x: Tensor, affine: Affine, mask: Tensor | None) -> Any:
        y, moments = _checked(source, source.normalize(x, affine, mask, known), x)
        if layer.counts is not None and (source.beyond_batch or mask is not None):
            layer.counts.append(moments.values)
        if updates:
            source.after(layer, known, moments)
        return y, moments

    return of_source(normalize, input, affine, running, mask, source.beyond_batch)

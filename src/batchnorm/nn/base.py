"""What BatchNorm1d, 2d and 3d share: torch's layer with activation, residual, mask, other statistics, and guards.

Shapes: N examples, C channels (``num_features``), then the places: none, (L), (H, W) or (D, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from batchnorm.functional import (
    ActivationLike,
    as_mask,
    masked_in_eval,
    of_source,
    of_whole_batch,
    overridden,
    parse_activation,
    refuse_others,
)
from batchnorm.nn import tracing
from batchnorm.nn.guards import Epsilon, QConfig
from batchnorm.nn.sources import Batch, Source
from batchnorm.nn.state import STATISTICS, State
from batchnorm.ops.activations import NO_ACTIVATION
from batchnorm.ops.arguments import Affine, Running
from batchnorm.ops.repetition import in_backward, is_repeated, own_copies

_LAYOUTS = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
_LAYERS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


_BATCH = Batch()


class FusedBatchNorm(State):
    """The three layers' common part; they differ in the number of dimensions alone.

    Its state, and what of it is saved, is in ``state.py``.
    """

    activation: str | tuple[Any, ...] | None = None
    g = NO_ACTIVATION  # the same, as ops take it
    before_sync: type | None = None  # the class that ``revert_sync_batchnorm`` restores
    held: Any = None  # what the source knew before the running statistics went into use elsewhere
    counts: list[Tensor] | None = None  # where someone wants to know how many values a batch had
    fused = False  # the activation, or a residual, came from the network around it (``from_torch``)
    # Whose work the layer does: each gets it back by its ``hand_back()``, and must where it no longer ``is_there()``.
    taken_from: tuple[Any, ...] = ()
    eps: Any = Epsilon()
    qconfig = QConfig()
    # Not looked at by torch.jit: some refuse to be read, and none means anything to TorchScript.
    __jit_ignored_attributes__ = ("eps", "epsilon", "qconfig", "statistics", "frozen_statistics", "frozen_affine")
    _dims: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
        statistics: Source = _BATCH,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # torch 2.10 does not know the argument
            self.bias = None  # type: ignore[assignment]
        self.activation = activation  # type: ignore[assignment]
        if self.running_mean is not None:
            self.counter(self.running_mean)
        self.statistics = statistics

    def __setattr__(self, name: str, value: Any) -> None:
        """torch's; an activation in any form, a module too, is kept as its name, or (name, parameters ...)."""
        if name == "activation":
            g = parse_activation(value)
            vars(self)["g"] = g
            value = g.as_users_write_it()
        super().__setattr__(name, value)

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """activation(BN(input) + residual): batch statistics in train, running ones in eval (where tracked)."""
        for owner in self.taken_from:
            if not owner.is_there():
                self.hand_back()  # it may be of the class that it had before
                more = () if residual is None and mask is None else (residual, mask)
                return type(self).forward(self, input, *more)
        if type(input) is not Tensor or residual is not None or mask is not None:
            if any(isinstance(t, torch.fx.Proxy) for t in (input, residual, mask)):
                return tracing.as_node(self, input, residual, mask)
            refuse_others(input=input, residual=residual)
            if overridden(input, residual, mask):  # subclasses of Tensor, whose __torch_function__ wants to know
                return handle_torch_function(_forward, (input, residual, mask), self, input, residual, mask)
        return _forward(self, input, residual, mask)

    def __prepare_scriptable__(self) -> nn.Module:
        """For ``torch.jit.script``."""
        return tracing.scriptable(self)

    @property
    def epsilon(self) -> float:
        """``eps``, without what reading that one means: see ``guards.Epsilon``."""
        return self.__dict__["eps"]

    def hand_back(self) -> None:
        """Undo what ``from_torch`` fused into this layer: those that it came from do it again."""
        owners, self.taken_from, self.activation, self.fused = self.taken_from, (), None, False
        for owner in owners:
            owner.hand_back()

    def extra_repr(self) -> str:
        """torch's, with the activation, other statistics and what is frozen appended, where there is any."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        source = "" if type(self.statistics) is Batch else f", statistics={self.statistics!r}"
        both = (("statistics", self.frozen_statistics), ("affine", self.frozen_affine))
        kept = [what for what, is_kept in both if is_kept]
        return super().extra_repr() + activation + source + (f", frozen={'+'.join(kept)}" if kept else "")

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._dims:
            layouts = " or ".join(_LAYOUTS[dim] for dim in self._dims)
            raise ValueError(
                f"expected {' or '.join(f'{dim}D' for dim in self._dims)} input (got {input.dim()}D input): "
                f"{type(self).__name__} takes {layouts}, got {tuple(input.shape)}; {self._dims_advice(input, layouts)}."
            )

    def _dims_advice(self, input: Tensor, layouts: str) -> str:
        one_example = input.dim() + 1 in self._dims and input.dim() and input.shape[0] == self.num_features
        if one_example and (input.dim() < 2 or input.shape[1] != self.num_features):
            return "one example by itself has no batch dimension: pass input.unsqueeze(0)"
        fitting = _LAYERS.get(input.dim())
        return f"use {fitting}" if fitting else f"reshape it to {layouts}"


def _forward(layer: FusedBatchNorm, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
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
        running = Running(
            mean, var, batches, skipped, 0.0 if layer.momentum is None and batches is None else layer.momentum
        )
    elif layer.track_running_stats and buffers.get("num_batches_tracked") is not None:
        buffers["num_batches_tracked"].add_(not is_repeated(layer))  # type: ignore[union-attr]  # torch's count goes on alone
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


_NONE = Running()


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
        y, moments = source.normalize(x, affine, mask, known)
        if layer.counts is not None and (source.beyond_batch or mask is not None):
            layer.counts.append(moments.values)
        if updates:
            source.after(layer, known, moments)
        return y, moments

    return of_source(normalize, input, affine, running, mask, source.beyond_batch)

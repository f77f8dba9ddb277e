"""What BatchNorm1d, 2d and 3d share: torch's layer with activation, residual, mask, other statistics, and guards.

Shapes: N examples, C channels (``num_features``), then the places: none, (L), (H, W) or (D, H, W).
"""

from __future__ import annotations

from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from batchnorm.functional import (
    ActivationLike,
    as_mask,
    normalize,
    normalize_by,
    normalize_masked,
    overridden,
    parse_activation,
    refuse_others,
)
from batchnorm.nn import tracing
from batchnorm.nn.guards import Epsilon, QConfig
from batchnorm.nn.state import State
from batchnorm.nn.statistics import Batch, Renorm, Running, Statistics, Synced
from batchnorm.nn.tracking import has_running_statistics
from batchnorm.ops.activations import NO_ACTIVATION
from batchnorm.ops.repetition import is_repeated, own_copies
from batchnorm.ops.split import Affine, count_, is_eager

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
    held: Running | None = None  # of Renorm: what to correct towards while the running statistics are in use elsewhere
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
        statistics: Statistics = _BATCH,
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
    in_train = layer.training and not layer.frozen_statistics
    mean, var, weight, bias = _tensors(layer)
    if in_train and not layer.track_running_stats:
        mean = var = None
    if (mean is None) != (var is None):
        raise ValueError(
            "running_mean and running_var must either both be None or neither be None: "
            f"{'running_mean' if mean is None else 'running_var'} of {type(layer).__name__}({layer.num_features}) is "
            "None alone."
        )
    count = layer._buffers.get("num_batches_tracked")  # None where it was deleted too
    if mean is None and in_train and layer.track_running_stats and count is not None:
        count.add_(not is_repeated(layer))  # torch's count goes on alone
    training = in_train or mean is None
    updates = in_train and mean is not None and not is_repeated(layer)
    batches = skipped = None
    if in_train and mean is not None:
        batches, skipped = count, layer.counter(mean)
        if not updates:
            mean, var, batches, skipped = own_copies(mean, var, batches, skipped)
    # A count of another dtype, of a checkpoint that was averaged say, or on another device, is none that kernels take.
    plain = batches is None or (batches.dtype == torch.int64 and batches.is_cpu == input.is_cpu)
    momentum = 0.0 if layer.momentum is None and batches is None else layer.momentum
    g = layer.g
    behind = None  # a sum that the network broadcasts, where it did not do so when the layer took it over
    if layer.fused and residual is not None and residual.shape != input.shape:
        behind, residual, g = (residual, g), None, NO_ACTIVATION
    if mask is None and plain and (not in_train or type(layer.statistics) is Batch):
        y = normalize(
            input,
            mean,
            var,
            weight,
            bias,
            training,
            momentum,
            layer.epsilon,
            g,
            residual,
            batches,
            skipped,
        )
    else:
        affine = Affine(weight, bias, residual, layer.epsilon, g)
        mask = None if mask is None else as_mask(mask, input)
        if training:
            source = _source(layer, in_train, updates)
            one_value = isinstance(layer.statistics, Synced) and in_train
            y = normalize_by(source, input, mean, var, affine, mask, momentum, batches, skipped, one_value)
        else:
            y = normalize_masked(input, mean, var, affine, mask)  # type: ignore[arg-type]
    return y if behind is None else behind[1].in_place(y + behind[0])


def _tensors(layer: FusedBatchNorm) -> list[Any]:
    """running_mean, running_var, weight and bias: past ``Module.__getattr__``, which takes a microsecond each."""
    buffers: Any = layer._buffers
    parameters: Any = layer._parameters  # neither holds what parametrizations or pruning compute
    return [
        *(buffers[name] if name in buffers else getattr(layer, name) for name in ("running_mean", "running_var")),
        *(parameters[name] if name in parameters else getattr(layer, name) for name in ("weight", "bias")),
    ]


def _source(layer: FusedBatchNorm, in_train: bool, updates: bool) -> Any:
    """The layer's source of statistics, as ``normalize_by`` takes it; without running statistics to correct towards,
    as after test-time adaptation took them away, ``Renorm`` is the batch's."""
    source = layer.statistics if in_train else _BATCH
    renorm, synced = isinstance(source, Renorm), isinstance(source, Synced)
    if renorm and not has_running_statistics(layer):
        source, renorm = _BATCH, False
    known = _known(layer) if renorm else None

    def normalized(x: Tensor, affine: Affine, mask: Tensor | None) -> Any:
        y, moments = source.normalize(x, affine, mask, known)
        if layer.counts is not None and (synced or mask is not None):
            layer.counts.append(moments.values)
        if renorm and updates:
            if is_eager() and isinstance(known, Running):
                _HISTORY.setdefault(layer, deque(maxlen=32)).append(known._replace(seen_C=moments.mean_C))
            count_(layer.renorm_steps, moments.values)  # type: ignore[arg-type]
        return y, moments

    return normalized


# What layers with ``Renorm`` knew before each of their last batches: for forwards that are repeated.
_HISTORY: WeakKeyDictionary[nn.Module, deque[Running]] = WeakKeyDictionary()


def _known(layer: Any) -> Running | list[Running]:
    """What ``Renorm`` corrects towards: the statistics before this batch."""
    if layer.held is not None:
        return layer.held
    if is_recomputing(layer):
        fitting = [known for known in _HISTORY.get(layer, ()) if known.mean_C.shape == layer.running_mean.shape]
        if fitting:
            return fitting
    return Running(layer.running_mean.clone(), layer.running_var.clone(), layer.renorm_steps.clone())


def is_recomputing(layer: nn.Module) -> bool:
    """Whether the layer's forward that runs now repeats an earlier one, for activation checkpointing say."""
    return layer.running_mean is not None and is_repeated(layer)

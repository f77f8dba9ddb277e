"""What BatchNorm1d, 2d and 3d share: torch's layer with activation, residual, mask, other statistics, and guards.

Shapes: N examples, C channels (``num_features``), then the places: none, (L), (H, W) or (D, H, W).

Comes from: ``norm``. Goes to: ``functional``.
"""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function

from batchnorm.functional import (
    Activation,
    as_mask,
    normalize,
    normalize_by,
    normalize_masked,
    overridden,
    parse_activation,
)
from batchnorm.nn import tracing
from batchnorm.nn.guards import Epsilon, QConfig
from batchnorm.nn.statistics import Batch, Renorm, Running, Statistics, Synced
from batchnorm.nn.tracking import has_running_statistics
from batchnorm.ops.repetition import is_repeated, own_copies
from batchnorm.ops.split import Affine, count_, is_eager

_LAYOUTS = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
_LAYERS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


_BATCH = Batch()

# Bits of what is frozen: the statistics, the affine parameters, and which of these required a gradient before.
_FROZEN = (_STATISTICS, _AFFINE, _WEIGHT, _BIAS) = 1, 2, 4, 8


class FusedBatchNorm(_BatchNorm):
    """What the three layers share; they differ in the number of dimensions alone.

    Its buffers are torch's alone, since torch's tools and others walk over them in parallel, average, slice and
    allocate them (``renorm_steps`` is there while ``statistics=Renorm()`` is). ``skipped_batches``, (C,): how many
    batches were not finite; an attribute, made anew where it does not fit. ``frozen_statistics`` and ``frozen_affine``
    are of ``batchnorm.freeze``; a key ``frozen`` carries them in state_dicts while something is frozen.
    """

    activation: str | tuple[str, float] | None = None
    _statistics: Statistics = _BATCH
    before_sync: type | None = None  # the class that ``revert_sync_batchnorm`` restores
    held: Running | None = None  # of Renorm: what to correct towards while the running statistics are in use elsewhere
    counts: list[Tensor] | None = None  # where someone wants to know how many values a batch had
    skipped_batches: Tensor | None = None
    _frozen = 0
    guarded = True  # False: running statistics take up what is not finite too, as torch's do
    fused = False  # the activation, or a residual, came from the network around it (``from_torch``)
    taken_from: tuple[Any, ...] = ()  # whose work the layer does: each gets it back by its ``hand_back()``
    _told = 0
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
        activation: Activation = None,
        statistics: Statistics = _BATCH,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # torch 2.10 does not know the argument
            self.bias = None  # type: ignore[assignment]
        name, slope = parse_activation(activation)
        self.activation = (name, slope) if name == "leaky_relu" else name
        if self.running_mean is not None:
            self.counter(self.running_mean)
        self.statistics = statistics

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """activation(BN(input) + residual): batch statistics in train, running ones in eval (where tracked)."""
        if type(input) is not Tensor or residual is not None or mask is not None:
            if any(isinstance(t, torch.fx.Proxy) for t in (input, residual, mask)):
                return tracing.as_node(self, input, residual, mask)
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

    @property
    def frozen_statistics(self) -> bool:
        """Whether the running statistics are kept, and used, in train too."""
        return bool(self._frozen & _STATISTICS)

    @property
    def frozen_affine(self) -> bool:
        """Whether weight and bias are kept from training."""
        return bool(self._frozen & _AFFINE)

    def hand_back(self) -> None:
        """Undo what ``from_torch`` fused into this layer: those that it came from do it again."""
        owners, self.taken_from, self.activation, self.fused = self.taken_from, (), None, False
        for owner in owners:
            owner.hand_back()

    @property
    def statistics(self) -> Statistics:
        """Where training statistics come from. May be set; ``Renorm`` brings the buffer that it counts steps in."""
        return self._statistics

    @statistics.setter
    def statistics(self, statistics: Statistics) -> None:
        if not isinstance(statistics, Statistics):
            raise TypeError(
                f"statistics takes a value, Batch(), Ghost(size), Renorm() or Synced(), got {statistics!r}."
            )
        if isinstance(statistics, Renorm):
            if self.running_mean is None:
                raise ValueError("Renorm corrects towards the running statistics: it needs track_running_stats=True.")
            if "renorm_steps" not in self._buffers:
                self.register_buffer("renorm_steps", torch.tensor(0, device=self.running_mean.device))
        elif "renorm_steps" in self._buffers:
            del self.renorm_steps
        self._statistics = statistics

    def reset_parameters(self) -> None:
        """torch's, and no step was made."""
        super().reset_parameters()
        if "renorm_steps" in self._buffers:  # torch calls this before there is one
            self.renorm_steps.zero_()  # type: ignore[operator]

    def train(self, mode: bool = True) -> Any:
        """torch's; when training ends it is said what did not enter the running statistics."""
        if not mode and self.training:
            self.tell_skipped()
        return super().train(mode)

    def reset_running_stats(self) -> None:
        """torch's, and no batch was skipped."""
        super().reset_running_stats()
        self._forget_skipped()

    def _forget_skipped(self) -> None:
        self._told = 0
        if self.skipped_batches is not None:
            self.skipped_batches.zero_()

    def counter(self, mean: Tensor) -> Tensor | None:
        """``skipped_batches``, beside the running mean as it is now; None where nothing is to be left out."""
        counter = self.skipped_batches
        if not self.guarded:
            return None
        if counter is None or counter.shape != mean.shape or counter.device != mean.device:
            counter = self.skipped_batches = torch.zeros(mean.shape, dtype=torch.int64, device=mean.device)
            self._told = 0
        return counter if type(counter) is type(mean) else None  # fake tensors count nothing

    def tell_skipped(self) -> None:
        """Warn, once, of batches that were not finite since it was last said. Waits for the device."""
        skipped = self.skipped_batches
        if type(skipped) is not Tensor or skipped.is_meta or not len(skipped) or torch.compiler.is_compiling():
            return
        most = int(skipped.max())
        if most > self._told:
            self._told = most
            warnings.warn(
                f"batchnorm: {most} batches were not finite in {int((skipped > 0).sum())} channels of "
                f"{type(self).__name__}({self.num_features}). Its running statistics left them out; the weights may "
                "have suffered: look at the data, the loss scale and the learning rate.",
                stacklevel=3,
            )

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """torch's: to another device, dtype or memory. The counter goes along."""
        super()._apply(function, recurse)
        mean, counter = self.running_mean, self.skipped_batches
        if mean is not None and counter is not None and counter.device != mean.device:
            self.skipped_batches = None if counter.is_meta or mean.is_meta else counter.to(mean.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """torch's. What is frozen are four numbers, 0 or 1, that averaging and casting leave what they are."""
        self.tell_skipped()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._frozen:
            own = next((t for t in (*self.parameters(), *self.buffers()) if not t.is_meta), torch.empty(0))
            flags = [float(bool(self._frozen & bit)) for bit in _FROZEN]
            destination[f"{prefix}frozen"] = torch.tensor(flags, dtype=torch.float32, device=own.device)

    def extra_repr(self) -> str:
        """torch's, with the activation, other statistics and what is frozen appended, where there is any."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        source = "" if type(self.statistics) is Batch else f", statistics={self.statistics!r}"
        kept = [what for what, bit in (("statistics", _STATISTICS), ("affine", _AFFINE)) if self._frozen & bit]
        return super().extra_repr() + activation + source + (f", frozen={'+'.join(kept)}" if kept else "")

    def set_frozen(self, statistics: bool, affine: bool) -> None:
        """Keep the running statistics in train too; no gradients for weight and bias. See ``batchnorm.freeze``."""
        before = self._frozen
        bits = statistics * _STATISTICS + affine * _AFFINE
        for bit, name in ((_WEIGHT, "weight"), (_BIAS, "bias")):
            leaves = self._leaves(name)
            if not leaves:
                continue
            if before & _AFFINE:
                bits |= before & bit * affine
                required = not affine and bool(before & bit)
            elif affine:
                bits |= bit * any(p.requires_grad for p in leaves)
                required = False
            else:
                continue
            for p in leaves:
                p.requires_grad_(required)
        self._frozen = bits

    def _leaves(self, name: str) -> list[Tensor]:
        """The parameters that a weight or bias is made of: itself, or those of pruning and parametrizations."""
        return [p for key, p in self.named_parameters() if key.removeprefix("parametrizations.").startswith(name)]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        *rest: Any,
    ) -> None:
        """torch's; a layer that was frozen when it was saved is frozen, one that is frozen stays so.

        ``renorm_steps`` may be missing, and may be there for a layer that does not count steps.
        """
        self._forget_skipped()  # the loaded statistics have a past of their own
        saved = state_dict.get(f"{prefix}frozen")
        if saved is not None and not saved.is_meta:
            bits = _frozen_bits(saved)
            self.set_frozen(bool(bits & _STATISTICS), bool(bits & _AFFINE))
            self._frozen = bits
        steps = self._buffers.pop("renorm_steps", None) if f"{prefix}renorm_steps" not in state_dict else None
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *rest)
        if steps is not None:
            fits = not steps.is_meta or self.running_mean is None or self.running_mean.is_meta
            self._buffers["renorm_steps"] = steps if fits else torch.zeros_like(steps, device=self.running_mean.device)  # type: ignore[union-attr]
        for name in ("frozen", "renorm_steps"):
            if f"{prefix}{name}" in unexpected:
                unexpected.remove(f"{prefix}{name}")

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


def _frozen_bits(saved: Tensor) -> int:
    """Of four flags; earlier versions saved the bits as one integer."""
    if saved.numel() == 1:
        return int(saved)
    return sum(bit for bit, flag in zip(_FROZEN, saved.tolist(), strict=True) if flag > 0.5)


def _forward(layer: FusedBatchNorm, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    layer._check_input_dim(input)
    in_train = layer.training and not layer._frozen & _STATISTICS
    mean, var, weight, bias = _tensors(layer)
    if mean is None or var is None or not (layer.track_running_stats or not in_train):
        mean = var = None
        if in_train and layer.track_running_stats and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(not is_repeated(layer.num_batches_tracked))  # torch's count goes on alone
    training = in_train or mean is None
    updates = in_train and mean is not None and not is_repeated(mean)
    batches = count = started = skipped = None
    if in_train and mean is not None:
        batches, skipped = layer._buffers.get("num_batches_tracked"), layer.counter(mean)
        if not updates:
            mean, var, batches, skipped = own_copies(mean, var, batches, skipped)
        if batches is not None and (batches.dtype != torch.int64 or batches.is_cpu != input.is_cpu):
            count, started = batches, batches.to(input.device, torch.int64)  # of a checkpoint that was averaged, say
            batches = started.clone()
    momentum = 0.0 if layer.momentum is None and batches is None else layer.momentum
    name, slope = parse_activation(layer.activation)
    if mask is None and (not in_train or type(layer.statistics) is Batch):
        y = normalize(
            input,
            mean,
            var,
            weight,
            bias,
            training,
            momentum,
            layer.epsilon,
            name,
            slope,
            residual,
            batches,
            skipped,
        )
    else:
        affine = Affine(weight, bias, residual, layer.epsilon, name, slope)
        mask = None if mask is None else as_mask(mask, input)
        if training:
            source = _source(layer, in_train, updates)
            one_value = isinstance(layer.statistics, Synced) and in_train
            y = normalize_by(source, input, mean, var, affine, mask, momentum, batches, skipped, one_value)
        else:
            y = normalize_masked(input, mean, var, affine, mask)  # type: ignore[arg-type]
    if count is not None and batches is not None and started is not None:
        count.add_((batches - started).to(count))  # which may be no whole number
    return y


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
    if is_recomputing(layer) and layer in _HISTORY:
        return list(_HISTORY[layer])
    return Running(layer.running_mean.clone(), layer.running_var.clone(), layer.renorm_steps.clone())


def is_recomputing(layer: nn.Module) -> bool:
    """Whether the layer's forward that runs now repeats an earlier one, for activation checkpointing say."""
    mean: Any = layer.running_mean
    return mean is not None and is_repeated(mean)

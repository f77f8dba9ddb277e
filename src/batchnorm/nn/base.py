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

from batchnorm.functional import Activation, as_mask, normalize, normalize_by, normalize_masked, parse_activation
from batchnorm.nn.guards import Epsilon, QConfig
from batchnorm.nn.statistics import Batch, Renorm, Running, Statistics, Synced
from batchnorm.ops.split import Affine, is_eager

_LAYOUTS = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
_LAYERS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


_BATCH = Batch()

# Bits of a layer's ``frozen``: what is kept, and which parameters required a gradient before.
_STATISTICS, _AFFINE, _WEIGHT, _BIAS = 1, 2, 4, 8


class FusedBatchNorm(_BatchNorm):
    """What the three layers share; they differ in the number of dimensions alone.

    ``frozen_statistics``, ``frozen_affine``: see ``batchnorm.freeze``. A buffer ``frozen`` carries them in state_dicts.
    """

    activation: str | tuple[str, float] | None = None
    _statistics: Statistics = _BATCH
    before_sync: type | None = None  # the class that ``revert_sync_batchnorm`` restores
    held: Running | None = None  # of Renorm: what to correct towards while the running statistics are in use elsewhere
    counts: list[Tensor] | None = None  # where someone wants to know how many values a batch had
    frozen_statistics = False
    frozen_affine = False
    guarded = True  # False: running statistics take up what is not finite too, as torch's do
    fused = False  # the activation, or a residual, came from the network around it (``from_torch``)
    taken_from: tuple[Any, ...] = ()  # whose work the layer does: each gets it back by its ``hand_back()``
    _told = 0
    eps: Any = Epsilon()
    qconfig = QConfig()
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
        self.count_skipped()
        self.statistics = statistics

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """activation(BN(input) + residual): batch statistics in train, running ones in eval (where tracked)."""
        return _forward(self, input, residual, mask)

    @property
    def epsilon(self) -> float:
        """``eps``, without what reading that one means: see ``guards.Epsilon``."""
        return self.__dict__["eps"]  # type: ignore[no-any-return]

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
        skipped = self._buffers.get("skipped_batches")  # torch resets before there is one
        if skipped is not None:
            skipped.zero_()

    def count_skipped(self) -> None:
        """Have a buffer, (C,), not saved, that counts the batches whose statistics were not finite."""
        mean = self.running_mean
        zeros = None if mean is None else torch.zeros(mean.shape, dtype=torch.int64, device=mean.device)
        self.register_buffer("skipped_batches", zeros, persistent=False)

    def tell_skipped(self) -> None:
        """Warn, once, of batches that were not finite since it was last said. Waits for the device."""
        skipped = self._buffers.get("skipped_batches")
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

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.tell_skipped()
        super()._save_to_state_dict(*arguments)

    def extra_repr(self) -> str:
        """torch's, with the activation, other statistics and what is frozen appended, where there is any."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        source = "" if type(self.statistics) is Batch else f", statistics={self.statistics!r}"
        kept = [what for what in ("statistics", "affine") if getattr(self, f"frozen_{what}")]
        return super().extra_repr() + activation + source + (f", frozen={'+'.join(kept)}" if kept else "")

    def set_frozen(self, statistics: bool, affine: bool) -> None:
        """Keep the running statistics in train too; no gradients for weight and bias. See ``batchnorm.freeze``."""
        noted = self._buffers.get("frozen")
        before = 0 if noted is None else int(noted)
        bits = statistics * _STATISTICS + affine * _AFFINE
        for bit, parameter in ((_WEIGHT, self.weight), (_BIAS, self.bias)):
            if parameter is None:
                continue
            if before & _AFFINE:
                bits |= before & bit * affine
                parameter.requires_grad_(not affine and bool(before & bit))
            elif affine:
                bits |= bit * parameter.requires_grad
                parameter.requires_grad_(False)
        self._note_frozen(bits)

    def _note_frozen(self, bits: int) -> None:
        self.frozen_statistics, self.frozen_affine = bool(bits & _STATISTICS), bool(bits & _AFFINE)
        if bits:
            tensors = (*self.buffers(recurse=False), *self.parameters(recurse=False))
            self.register_buffer("frozen", torch.tensor(bits, device=tensors[0].device if tensors else None))
        elif "frozen" in self._buffers:
            del self.frozen

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
        if saved is not None:
            bits = int(saved)
            self.set_frozen(bool(bits & _STATISTICS), bool(bits & _AFFINE))
            self._note_frozen(bits)
        absent = [name for name in ("frozen", "renorm_steps") if f"{prefix}{name}" not in state_dict]
        kept = {name: self._buffers.pop(name) for name in absent if name in self._buffers}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *rest)
        self._buffers.update(kept)
        for name in ("skipped_batches", "renorm_steps"):  # load_state_dict(assign=True) into a layer on meta
            t, mean = self._buffers.get(name), self.running_mean
            if t is not None and mean is not None and t.is_meta and not mean.is_meta:
                self._buffers[name] = torch.zeros_like(t, device=mean.device)
        if f"{prefix}renorm_steps" in unexpected:
            unexpected.remove(f"{prefix}renorm_steps")

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._dims:
            layouts = " or ".join(_LAYOUTS[dim] for dim in self._dims)
            fitting = _LAYERS.get(input.dim())
            advice = f"use {fitting}" if fitting else f"reshape it to {layouts}"
            raise ValueError(
                f"expected {' or '.join(f'{dim}D' for dim in self._dims)} input (got {input.dim()}D input): "
                f"{type(self).__name__} takes {layouts}, got {tuple(input.shape)}; {advice}."
            )


@torch.fx.wrap  # one node in a traced graph: what hangs on shapes or on train and eval is decided when it runs
def _forward(layer: FusedBatchNorm, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    layer._check_input_dim(input)
    in_train = layer.training and not layer.frozen_statistics
    updates = in_train and layer.track_running_stats and not is_recomputing()
    tracked = updates or not in_train
    mean, var = (layer.running_mean, layer.running_var) if tracked else (None, None)
    training = in_train or (mean is None and var is None)
    batches = layer.num_batches_tracked if updates else None
    skipped = layer._buffers.get("skipped_batches") if updates and layer.guarded else None
    momentum = 0.0 if layer.momentum is None and batches is None else layer.momentum
    name, slope = parse_activation(layer.activation)
    if mask is None and (not in_train or type(layer.statistics) is Batch):
        return normalize(
            input,
            mean,
            var,
            layer.weight,
            layer.bias,
            training,
            momentum,
            layer.epsilon,
            name,
            slope,
            residual,
            batches,
            skipped,
        )
    affine = Affine(layer.weight, layer.bias, residual, layer.epsilon, name, slope)
    mask = None if mask is None else as_mask(mask, input)
    if not training:
        return normalize_masked(input, mean, var, affine, mask)  # type: ignore[arg-type]
    source = layer.statistics if in_train else _BATCH
    renorm, synced = isinstance(source, Renorm), isinstance(source, Synced)
    known = _known(layer) if renorm else None

    def normalized(x: Tensor, affine: Affine, mask: Tensor | None) -> Any:
        y, moments = source.normalize(x, affine, mask, known)
        if layer.counts is not None and (synced or mask is not None):
            layer.counts.append(moments.values)
        if renorm and updates:
            if is_eager() and isinstance(known, Running):
                _HISTORY.setdefault(layer, deque(maxlen=32)).append(known._replace(seen_C=moments.mean_C))
            layer.renorm_steps.add_((moments.values > 0).any())  # type: ignore[operator]
        return y, moments

    return normalize_by(normalized, input, mean, var, affine, mask, momentum, batches, skipped, synced)


# What layers with ``Renorm`` knew before each of their last batches: for forwards that are repeated.
_HISTORY: WeakKeyDictionary[nn.Module, deque[Running]] = WeakKeyDictionary()


def _known(layer: Any) -> Running | list[Running]:
    """What ``Renorm`` corrects towards: the statistics before this batch."""
    if layer.held is not None:
        return layer.held
    if is_recomputing() and layer in _HISTORY:
        return list(_HISTORY[layer])
    return Running(layer.running_mean.clone(), layer.running_var.clone(), layer.renorm_steps.clone())


def is_recomputing() -> bool:
    """Whether this forward repeats an earlier one for activation checkpointing, in either of torch's two ways."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

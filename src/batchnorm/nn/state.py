"""A layer's state from batch to batch, and its saved form: statistics, their source, frozen parts, skipped batches.

Its buffers are torch's alone, since torch's tools and others walk over them in parallel, average, slice and allocate
them; a source of statistics may bring some of its own while it is there. All else are attributes.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes

from batchnorm.nn.sources import Batch, Source
from batchnorm.nn.sources.source import names_of_buffers
from batchnorm.ops.modes import is_transformed

# Bits of what is frozen: the statistics, the affine parameters, and which of these required a gradient before.
STATISTICS, _AFFINE, _WEIGHT, _BIAS = 1, 2, 4, 8
# Their keys in a state_dict, and the attributes that code finds which looks for the owner of each key.
_KEYS = {"frozen_statistics": STATISTICS, "frozen_affine": _AFFINE, "frozen_weight": _WEIGHT, "frozen_bias": _BIAS}


class _Blank(Tensor):
    """A buffer of a source on the meta device. Memory that is made in its likeness holds its initial value already.

    Whoever makes a model of no values real (``to_empty``, transformers' ``from_pretrained``) leaves to chance what the
    checkpoint lacks, and a plain one lacks these buffers. In a state_dict it is torch's tensor.
    """

    value: float

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.empty_like:
                return torch.full_like(args[0], args[0].value, **kwargs or {})
            return function(*args, **kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), _blank(self.shape, self.dtype, self.device, self.value))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.shape, self.dtype, self.device, self.value)


def _blank(shape: Any, dtype: torch.dtype, device: Any, value: float) -> Tensor:
    """What a layer that has seen nothing has there."""
    tensor = torch.full(shape, value, dtype=dtype, device=device)
    if tensor.is_meta:
        tensor = tensor.as_subclass(_Blank)
        tensor.value = value
    return tensor


def _needed(kind: type) -> str:
    """The arguments that a source must be given: "(size)"."""
    parameters = inspect.signature(kind).parameters.values()
    return f"({', '.join(p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)})"


class State(_BatchNorm):
    """torch's layer and what ours keep besides.

    ``skipped_batches``, (C,): how many batches were not finite; made anew where it does not fit. ``frozen_statistics``
    and ``frozen_affine`` are of ``batchnorm.freeze``; keys of these names carry them in state_dicts while they are
    true: single numbers, 1.0, that averaging, casting and slicing leave what they are.
    """

    _statistics: Source = Batch()
    skipped_batches: Tensor | None = None
    guarded = True  # False: running statistics take up what is not finite too, as torch's do
    _frozen = 0
    _told = 0

    @property
    def frozen_statistics(self) -> bool:
        """Whether the running statistics are kept, and used, in train too."""
        return bool(self._frozen & STATISTICS)

    @property
    def frozen_affine(self) -> bool:
        """Whether weight and bias are kept from training. Not any more, where somebody has them require gradients."""
        return bool(self._frozen & _AFFINE) and not any(p.requires_grad for p in self._leaves("weight", "bias"))

    @property
    def frozen_weight(self) -> bool:
        """Whether ``unfreeze`` has the weight require gradients again."""
        return self.frozen_affine and bool(self._frozen & _WEIGHT)

    @property
    def frozen_bias(self) -> bool:
        """Whether ``unfreeze`` has the bias require gradients again."""
        return self.frozen_affine and bool(self._frozen & _BIAS)

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
        for name in self._statistics.initial:
            if name not in brought:
                self._buffers.pop(name, None)
        for name, tensor in brought.items():
            if name not in self._buffers:
                if tensor.is_meta:
                    tensor = _blank(tensor.shape, tensor.dtype, tensor.device, statistics.initial[name])
                self.register_buffer(name, tensor)
        self._statistics = statistics

    def reset_parameters(self) -> None:
        """torch's, and nothing was seen."""
        super().reset_parameters()
        for name, value in self._statistics.initial.items():
            if name in self._buffers:  # torch calls this before there is one
                self._buffers[name].fill_(value)  # type: ignore[union-attr]

    def train(self, mode: bool = True) -> Any:
        """torch's; when training ends it is said what did not enter the running statistics."""
        if not mode and self.training:
            self.tell_skipped()
        return super().train(mode)

    def reset_running_stats(self) -> None:
        """torch's, and no batch was skipped. Frozen statistics stay: ``torch.optim.swa_utils.update_bn`` resets all."""
        if not self.frozen_statistics:
            super().reset_running_stats()
            self.forget_skipped()

    def forget_skipped(self) -> None:
        """Forget the batches skipped so far."""
        self._told = 0
        if self.skipped_batches is not None:
            self.skipped_batches.zero_()

    def counter(self, mean: Tensor) -> Tensor | None:
        """``skipped_batches``, beside the running mean as it is now; None where nothing is to be left out."""
        counter = self.skipped_batches
        if not self.guarded:
            return None
        if counter is not None and counter.shape == mean.shape and counter.device == mean.device:
            return counter if type(counter) is type(mean) else None  # fake tensors count nothing
        compiling = torch.compiler.is_compiling()
        if type(mean) is not Tensor and not compiling:
            return None
        with nullcontext() if compiling else _disable_current_modes():
            counter = torch.zeros(mean.shape, dtype=torch.int64, device=mean.device)
        if not is_transformed():  # else it is of that call alone
            self.skipped_batches, self._told = counter, 0
        return counter

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
        """torch's: to another device, dtype or memory. What is counted goes along, also where nothing is copied."""
        initial = self._statistics.initial
        before = {name: self._buffers.get(name) for name in initial}
        super()._apply(function, recurse)
        for name, value in initial.items():
            old, now = before[name], self._buffers.get(name)
            if now is not None and now.is_meta:
                self._buffers[name] = _blank(now.shape, now.dtype, now.device, value)
            elif now is not None and now is not old and type(now) is Tensor:
                with torch.inference_mode(now.is_inference()):
                    now.copy_(old) if type(old) is Tensor and not old.is_meta else now.fill_(value)
        mean, counter = self.running_mean, self.skipped_batches
        if mean is not None and counter is not None and counter.device != mean.device:
            self.skipped_batches = None if counter.is_meta or mean.is_meta else counter.to(mean.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """torch's, and what is frozen."""
        self.tell_skipped()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = next((t for t in (*self.parameters(), *self.buffers()) if not t.is_meta), torch.empty(0))
        for key in _KEYS if self._frozen else ():
            if getattr(self, key):
                destination[f"{prefix}{key}"] = torch.tensor(1.0, device=own.device)

    def set_frozen(self, statistics: bool, affine: bool) -> None:
        """Keep the running statistics in train too; no gradients for weight and bias. See ``batchnorm.freeze``."""
        before = self._frozen if self.frozen_affine else self._frozen & STATISTICS
        bits = statistics * STATISTICS + affine * _AFFINE
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

    def _leaves(self, *names: str) -> list[Tensor]:
        """The parameters that a weight or bias is made of: itself, or those of pruning, norms and parametrizations."""
        made_of = {f"{name}{suffix}" for name in names for suffix in ("", "_orig", "_g", "_v")}
        inside = tuple(f"parametrizations.{name}." for name in names)
        return [p for key, p in self.named_parameters() if key in made_of or key.startswith(inside)]

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

        Buffers of sources may be missing, and may be there for a layer that has another source.
        """
        self.forget_skipped()  # the loaded statistics have a past of their own
        saved = {key: state_dict[f"{prefix}{key}"] for key in _KEYS if f"{prefix}{key}" in state_dict}
        bits = sum(_KEYS[key] for key, flag in saved.items() if not flag.is_meta and flag > 0.5)
        if bits:
            self.set_frozen(bool(bits & STATISTICS), bool(bits & _AFFINE))
            self._frozen = bits
        initial = self._statistics.initial
        lacking = {n: self._buffers.pop(n) for n in initial if n in self._buffers and f"{prefix}{n}" not in state_dict}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *rest)
        for name, own in lacking.items():
            if own is not None and own.is_meta and self.running_mean is not None and not self.running_mean.is_meta:
                own = _blank(own.shape, own.dtype, self.running_mean.device, initial[name])
            self._buffers[name] = own
        for name in (*_KEYS, *names_of_buffers()):
            if f"{prefix}{name}" in unexpected:
                unexpected.remove(f"{prefix}{name}")

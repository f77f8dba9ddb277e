"""Frozen parts of a layer: the bits, what they do to parameters, and their keys in a state_dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

# Bits of what is frozen: the statistics, the affine parameters, and which of these required a gradient before.
STATISTICS, _AFFINE, _WEIGHT, _BIAS = 1, 2, 4, 8
# Their keys in a state_dict, and the attributes that code finds which looks for the owner of each key.
_KEYS = {"frozen_statistics": STATISTICS, "frozen_affine": _AFFINE, "frozen_weight": _WEIGHT, "frozen_bias": _BIAS}


class Freezing(_BatchNorm):
    """A layer that ``batchnorm.freeze`` works on.

    Keys of the properties' names carry what is frozen in state_dicts while it is: single numbers, 1.0, that averaging,
    casting and slicing leave what they are.
    """

    _frozen = 0

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

    def reset_running_stats(self) -> None:
        """torch's. Frozen statistics stay: ``torch.optim.swa_utils.update_bn`` resets all."""
        if not self.frozen_statistics:
            super().reset_running_stats()

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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """torch's, and what is frozen."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = next((t for t in (*self.parameters(), *self.buffers()) if not t.is_meta), torch.empty(0))
        for key in _KEYS if self._frozen else ():
            if getattr(self, key):
                destination[f"{prefix}{key}"] = torch.tensor(1.0, device=own.device)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str],
        *rest: Any,
    ) -> None:  # fmt: skip
        """torch's; a layer that was frozen when it was saved is frozen, one that is frozen stays so."""
        saved = {key: state_dict[f"{prefix}{key}"] for key in _KEYS if f"{prefix}{key}" in state_dict}
        bits = sum(_KEYS[key] for key, flag in saved.items() if not flag.is_meta and flag > 0.5)
        if bits:
            self.set_frozen(bool(bits & STATISTICS), bool(bits & _AFFINE))
            self._frozen = bits
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, *rest)
        for key in _KEYS:
            if f"{prefix}{key}" in unexpected:
                unexpected.remove(f"{prefix}{key}")

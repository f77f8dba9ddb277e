"""Batches that are not finite: left out of the running statistics, counted, and said."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes

from batchnorm.ops.modes import is_transformed


class Skipping(_BatchNorm):
    """A layer that counts, per channel, the batches that its running statistics left out.

    ``skipped_batches``, (C,), is no buffer: nobody saves it, and it is made anew where it does not fit.
    """

    skipped_batches: Tensor | None = None
    guarded = True  # False: running statistics take up what is not finite too, as torch's do
    _told = 0

    def train(self, mode: bool = True) -> Any:
        """torch's; when training ends it is said what did not enter the running statistics."""
        if not mode and self.training:
            self.tell_skipped()
        return super().train(mode)

    def reset_running_stats(self) -> None:
        """torch's, and no batch was skipped."""
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
        """torch's: to another device, dtype or memory. The count goes along."""
        super()._apply(function, recurse)
        mean, counter = self.running_mean, self.skipped_batches
        if mean is not None and counter is not None and counter.device != mean.device:
            self.skipped_batches = None if counter.is_meta or mean.is_meta else counter.to(mean.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """torch's; what was left out is said first."""
        self.tell_skipped()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """torch's; the loaded statistics have a past of their own."""
        self.forget_skipped()
        super()._load_from_state_dict(*arguments)

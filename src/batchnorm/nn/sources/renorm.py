"""Batch renormalization: training with what eval will use.

Shapes: as in ``source``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from batchnorm.nn.sources.batch import Batch
from batchnorm.nn.sources.source import Source
from batchnorm.ops.arguments import Affine, Moments
from batchnorm.ops.modes import is_eager
from batchnorm.ops.repetition import in_backward, is_repeated
from batchnorm.ops.split import by_moments, count_, of_batch, statistics


class Before(NamedTuple):
    """A layer's state before a batch: its running statistics, and the steps counted.

    ``seen_C``: that batch's mean, by which a forward that is repeated for checkpointing finds what it knew at first.
    """

    mean_C: Tensor
    var_C: Tensor
    steps: Tensor
    seen_C: Tensor | None = None

    @staticmethod
    def of(history: list[Before], mean_C: Tensor) -> Before:
        """The state before the last batch with this mean; does not wait for the device."""
        history = history[::-1]
        seen_KC = torch.stack([known.seen_C for known in history])  # type: ignore[misc]
        nearest = (seen_KC - mean_C).abs().sum(1).argmin(0, keepdim=True)  # t[nearest[0]] would wait
        return Before(*(torch.stack(t)[nearest][0] for t in zip(*(known[:3] for known in history), strict=True)))


# What layers knew before each of their last batches: for forwards that are repeated.
_HISTORY: WeakKeyDictionary[nn.Module, deque[Before]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Renorm(Source):
    """Batch Renormalization (Ioffe 2017): train with what eval will use, for tiny or dependent batches.

        y = weight * (xhat * r + d) + bias,   xhat = (x - mu) / sigma,
        r = clip(sigma / sigma_run, 1 / r_max, r_max),   d = clip((mu - mu_run) / sigma_run, -d_max, d_max)

    with sigma = sqrt(var + eps), and mu_run, sigma_run of the running statistics. r and d are constants to the
    gradient. Without clipping, y is what eval gives. r_max and d_max grow from 1 and 0, where y is ordinary batch
    normalization, to the given values, linearly between the steps of ``schedule``; the layer counts steps in the buffer
    ``renorm_steps`` (saved), where it saw at least one value. Under activation checkpointing a forward that is repeated
    finds, among the layer's last 32 batches, what it corrected towards the first time.

    With two values per channel, (2, C), xhat is +1 and -1 whatever x is: y is right, but hardly a gradient goes through
    it to what lies below, as with batch statistics.

    Args:
        r_max, d_max: how far the batch is corrected in the end; at least 1 and 0.
        schedule: (first, last) step between which r_max grows, and the same of d_max; default: the paper's.

    Raises:
        ValueError: ``r_max`` below 1, ``d_max`` below 0, steps that do not grow; in training one value per channel.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm2d(3, statistics=bn.Renorm())
        >>> layer(torch.randn(2, 3, 8, 8)).shape, layer.renorm_steps.item()
        (torch.Size([2, 3, 8, 8]), 1)

    Source: Ioffe, "Batch Renormalization", https://arxiv.org/abs/1702.03275.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    schedule: tuple[tuple[int, int], tuple[int, int]] = ((5_000, 40_000), (5_000, 25_000))

    initial = MappingProxyType({"renorm_steps": 0})

    def __post_init__(self) -> None:
        for value, least in ((self.r_max, 1), (self.d_max, 0)):
            if not isinstance(value, int | float) or not value >= least:
                raise ValueError(
                    f"Renorm takes r_max of at least 1 and d_max of at least 0 (got {self.r_max!r}, {self.d_max!r})."
                )
        try:
            grows = len(self.schedule) == 2 and all(0 <= first <= last for first, last in self.schedule)
        except (TypeError, ValueError):
            grows = False
        if not grows:
            raise ValueError(
                "Renorm takes schedule=((first, last), (first, last)), the steps between which r_max and d_max grow "
                f"(got {self.schedule!r})."
            )

    def buffers(self, layer: nn.Module) -> dict[str, Tensor]:
        """The steps counted."""
        if layer.running_mean is None:
            raise ValueError("Renorm corrects towards the running statistics: it needs track_running_stats=True.")
        return {"renorm_steps": torch.zeros((), dtype=torch.int64, device=layer.running_mean.device)}  # type: ignore[arg-type]

    def known(self, layer: Any) -> Before | list[Before] | None:
        """The statistics before this batch; of a forward that is repeated, those of the last batches."""
        mean_C, var_C = layer.running_mean, layer.running_var
        if mean_C is None or var_C is None:  # as after test-time adaptation took them away
            return None
        if (in_backward() or not torch.is_grad_enabled()) and is_repeated(layer):
            fitting = [known for known in _HISTORY.get(layer, ()) if known.mean_C.shape == mean_C.shape]
            if fitting:
                return fitting
        return Before(mean_C.clone(), var_C.clone(), layer._buffers["renorm_steps"].clone())

    def normalize(self, x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, known: Any) -> tuple[Tensor, Moments]:
        """y, and the moments of the batch."""
        if known is None:
            return of_batch(x_NCS, affine, mask_N1S)
        x_NCS, moments = statistics(x_NCS, mask_N1S)
        if isinstance(known, list):
            known = Before.of(known, moments.mean_C)
        dtype = torch.promote_types(x_NCS.dtype, torch.float32)
        r_C, d_C = self._corrections(moments, known, affine.eps)
        r_C, d_C = r_C.to(dtype), d_C.to(dtype)
        weight_C, bias_C = affine[:2]  # weight * (xhat * r + d) + bias is another weight and bias
        scale_C, shift_C = (r_C, d_C) if weight_C is None else (weight_C * r_C, weight_C * d_C)
        affine = Affine(scale_C, shift_C if bias_C is None else bias_C + shift_C, *affine[2:])
        return by_moments(x_NCS, moments, affine, mask_N1S), moments

    def after(self, layer: nn.Module, known: Any, moments: Moments) -> None:
        """Remember what was known, and count a step."""
        if is_eager() and isinstance(known, Before):
            seen = Before(*known[:3], moments.mean_C)
            _HISTORY.setdefault(layer, deque(maxlen=32)).append(seen)
        self.moved(layer, moments.values)

    def moved(self, layer: nn.Module, values: Tensor) -> None:
        """Count a step, where there was at least one value."""
        steps = layer._buffers.get("renorm_steps")
        if steps is not None:
            count_(steps, values)

    def in_recalibrate(self, known: Any) -> Source:
        """Itself, where there is something finite to correct towards: layers behind see what they see in training."""
        finite = isinstance(known, Before) and all(t.isfinite().all() for t in known[:3])
        return self if finite else Batch()

    def _corrections(self, moments: Moments, running: Before, eps: float) -> tuple[Tensor, Tensor]:
        mean_C, var_C = moments.mean_C.detach(), moments.var_C.detach()
        sigma_C = (running.var_C.double() + eps).sqrt()
        r_max = 1 + self._limit(self.r_max - 1, running.steps, *self.schedule[0])
        d_max = self._limit(self.d_max, running.steps, *self.schedule[1])
        r_C = torch.minimum(torch.maximum((var_C + eps).sqrt() / sigma_C, r_max.reciprocal()), r_max)
        d_C = torch.minimum(torch.maximum((mean_C - running.mean_C) / sigma_C, -d_max), d_max)
        return r_C, d_C

    @staticmethod
    def _limit(in_the_end: float, steps: Tensor, first: int, last: int) -> Tensor:
        """0 up to the first step, ``in_the_end`` (which may be infinite) from the last one on."""
        share = (
            ((steps.double() - first) / max(last - first, 1)).clamp(0, 1) if last > first else (steps >= first).double()
        )
        return (share * in_the_end).where(share > 0, 0)

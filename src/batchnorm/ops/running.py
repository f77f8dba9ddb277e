"""Running statistics move towards those of a batch: the one place where that is computed in torch's own ops.

    running <- (1 - a) * running + a * batch,    a = momentum, or 1 / number of batches (momentum=None)

Shapes: C channels; all tensors are (C,) but ``batches``, one number. Kernels that update on their way follow the same
rules (``csrc/ops.cpp``, ``cuda_kernels.py``). Source: Ioffe & Szegedy 2015, Section 3.1 and Algorithm 2, line 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.ops.arguments import Running
from batchnorm.ops.modes import is_transformed


def blend_(
    running: Running,
    mean: Tensor,
    unbiased_var: Tensor,
    where: tuple[Tensor, Tensor] | None = None,
    counted: Tensor | None = None,
) -> None:
    """Move running statistics in place, in float64, and count the batch. Numbers stay tensors: nothing is waited for.

    With ``skipped``, what is not finite never enters. With a momentum each channel decides for itself. The plain
    average (momentum=None) divides by ``batches``, one number for all channels, so a batch that is not finite in any
    channel enters in none and is not counted: the count that is saved is then all that the average depends on.

    Args:
        running: with ``batches``, which counts this batch, for momentum=None; None for ``skipped`` keeps no guard.
        where: the channels whose mean moves, and those whose variance does; default: all.
        counted: whether it is a batch at all, as a tensor; default: it is.
    """
    running_mean, running_var, batches, skipped, momentum = running
    assert running_mean is not None
    assert running_var is not None
    wide = torch.float32 if running_mean.device.type == "mps" else torch.float64  # MPS has no float64
    observable = not is_transformed()
    one: Any = 1 if counted is None else counted
    a: Any = momentum
    if momentum is None and batches is not None:
        a = 1 / (batches + one).to(wide).clamp(min=1)
    both = ((running_mean, mean.to(wide)), (running_var, unbiased_var.to(wide)))
    moved = [((1 - a) * old.to(wide) + a * new).to(old.dtype) for old, new in both]
    if skipped is not None:
        tested = moved if momentum is not None else [new.to(old.dtype) for old, new in both]
        good = tested[0].isfinite() & tested[1].isfinite()
        if observable:
            skipped.add_((~good).to(skipped.dtype))  # torch.func allows no change of what a function did not get
        if momentum is None:
            good = good.all()
            one = one * good if observable else one
        moved = [new.where(good, old) for new, (old, _) in zip(moved, both, strict=True)]
    if where is not None:
        moved = [new.where(allowed, old) for new, (old, _), allowed in zip(moved, both, where, strict=True)]
    if batches is not None:
        batches.add_(one if isinstance(one, int) else one.to(batches))
    running_mean.copy_(moved[0])
    running_var.copy_(moved[1])

"""Outputs and gradients of a module on an example, compared before and after a change."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from batchnorm.surgery.copies import cloned, dense, scratch, tensors_of
from batchnorm.surgery.watch import in_eager

TOLERANCE = 1e-9  # the largest error, in float64, relative to the largest value of a tensor
LEAST = 1e-3  # of the largest value of all: what that is at the least


class Results(NamedTuple):
    """``kinds``: the classes of what is around the tensors of the output, and in it besides them."""

    kinds: Any
    tensors: list[list[Tensor]]


def results(module: nn.Module, given: Any) -> Results:
    """Outputs in eval, as it is; then in float64 outputs, gradients and buffers, in eval and train, where it can.

    A copy runs: the module notices nothing.
    """
    copied = scratch(module)
    kinds, found = _computed(copied, given, wide=False, train=False)
    del found[1:]
    for train in (False, True):
        with suppress(Exception):  # whatever user code raises: a dtype that is written down, one value per channel
            found += _computed(copied, given, wide=True, train=train).tensors
    return Results(kinds, found)


def _computed(copied: nn.Module, given: Any, wide: bool, train: bool) -> Results:
    with in_eager(copied), torch.inference_mode(False), torch.set_grad_enabled(wide):
        copied.train(train)
        copied = copied.double() if wide else copied
        args, kwargs = cloned(given, _leaf if wide else torch.clone)
        returned = copied(*args, **kwargs)
        leaves, spec = _pytree.tree_flatten(returned)
        out = [dense(t) for t in tensors_of(returned)]
        wanted = [t for t in (*tensors_of((args, kwargs)), *copied.parameters()) if t.requires_grad]
        weighted = [(t * _weights(t)).sum() for t in out if t.requires_grad]
        gradients = torch.autograd.grad(weighted, wanted, allow_unused=True) if weighted else ()
        saved, parameters = copied.state_dict(), dict(copied.named_parameters())
        buffers = [dense(t) for name, t in saved.items() if name not in parameters and isinstance(t, Tensor)]
    tensors = [[t.detach() for t in out], [dense(t) for t in gradients if t is not None], buffers]
    return Results((type(returned), spec, [type(leaf) for leaf in leaves]), tensors)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().double().clone().requires_grad_() if t.is_floating_point() else t.clone()


def _weights(t: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(t.numel())
    return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)


def difference(before: Results, after: Results, tolerance: float = TOLERANCE) -> str | None:
    """The difference, if there is one. LEAST: the gradient of a bias before batch normalization is rounding alone."""
    if before.kinds != after.kinds:
        was, now = (f"a {of.kinds[0].__name__}" for of in (before, after))
        return f"returns {now} instead of {was}" if was != now else f"returns {now} of other content"
    if [len(tensors) for tensors in before.tensors] != [len(tensors) for tensors in after.tensors]:
        return "fails, or has other gradients"
    for old, new in zip(before.tensors, after.tensors, strict=True):
        largest = max((_largest(t) for t in old), default=0.0)
        for a, b in zip(old, new, strict=True):
            if a.dtype != b.dtype or a.shape != b.shape:
                return f"gives {b.dtype} of {tuple(b.shape)} instead of {a.dtype} of {tuple(a.shape)}"
            if a.is_floating_point():
                scale = max(_largest(a), LEAST * largest)
                error = _largest(a.double() - b.double()) / scale if scale else 0.0
                # narrow ones differ by their rounding, which the wide ones tell from mistakes
                limit = tolerance if a.dtype == torch.float64 else 4 * torch.finfo(a.dtype).eps ** 0.5
                if not error <= limit:
                    return f"gives other values: {error:.1e} of the largest"
            elif not torch.equal(a, b):
                return "gives other integers"
    return None


def _largest(t: Tensor) -> float:
    return t.double().abs().max().item() if t.numel() and t.is_floating_point() else 0.0

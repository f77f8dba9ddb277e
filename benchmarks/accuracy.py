"""How far off our layer and torch's are where batch normalization is hard to compute, beside the equations.

Prints the table of docs/layer.md, "Accuracy".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.ops import reference

Function = Callable[[Tensor], Tensor]


def far_from_zero() -> list[float]:
    """float32, (4096, 8), mean 1e6, deviation 1: the largest error of y, beside float64."""
    x = 1e6 + torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    exact = reference.batch_norm(x.double(), None, None, None, None, True, 0.1, 1e-5)
    found = [function(x).double() for function in (_ours, _torchs)]
    return [(y - exact).abs().max().item() for y in found]


def derivative(order: int) -> list[float]:
    """float64, (6, 3), training: the largest error of a derivative, as a share of the largest value."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(6, 3, dtype=torch.float64, generator=generator) for _ in range(2))

    def derived(function: Function) -> Tensor:
        at = x.clone().requires_grad_()
        value = (function(at) * w).pow(2).sum()
        for _ in range(order):
            (gradient,) = torch.autograd.grad(value, at, create_graph=True)
            value = (gradient * w).pow(2).sum()
        return gradient.detach()

    exact = derived(lambda x: reference.batch_norm(x, None, None, None, None, True, 0.1, 1e-5))
    return [((derived(f) - exact).abs().max() / exact.abs().max()).item() for f in (_ours, _torchs)]


def _ours(x: Tensor) -> Tensor:
    return bn.batch_norm(x, None, None, training=True)


def _torchs(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = {
        "float32, mean 1e6, deviation 1: y": far_from_zero(),
        **{f"float64: derivative of order {order}, relative": derivative(order) for order in (1, 2, 3)},
    }
    print(f"{'the largest error of':48}{'ours':>12}{'torch':>12}")
    for name, (ours, torchs) in rows.items():
        print(f"{name:48}{ours:12.1e}{torchs:12.1e}")

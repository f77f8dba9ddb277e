"""The op through torch's own kernels (aten): what runs where there is no kernel of ours.

Shapes: N examples, C channels, S places (none for (N, C)). x_NCS is (N, C, ...).
Derivatives come from aten: first and second order are right. The third order in training is not, since aten
takes the statistics that it saved for constants there; ``ops.reference`` is right to any order.

Comes from: the signature of ``reference.batch_norm``. Goes to: ``functional``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# In place where the gradient needs the result alone: no memory besides y. For the others, in place would copy y for
# backward. (leaky_relu finds its gradient in the result only for slopes that keep the sign.)
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda y, slope: y.relu_(),
    "relu6": lambda y, slope: F.relu6(y),
    "leaky_relu": lambda y, slope: F.leaky_relu(y, slope, inplace=slope >= 0),
    "silu": lambda y, slope: F.silu(y),
    "hardswish": lambda y, slope: F.hardswish(y),
    "sigmoid": lambda y, slope: y.sigmoid_(),
    "tanh": lambda y, slope: y.tanh_(),
}


def batch_norm(
    x_NCS: Tensor,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    gamma_C: Tensor | None,
    beta_C: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None = None,
    slope: float = 0.01,
    residual_NCS: Tensor | None = None,
) -> Tensor:
    """y = g(BN(x) + residual), with batch statistics in training, else with the running ones.

    In training the running statistics, where given, are updated in place. y has torch's type of x + residual.
    """
    y = F.batch_norm(x_NCS, running_mean_C, running_var_C, gamma_C, beta_C, training, momentum, eps)
    if residual_NCS is not None:
        y = y + residual_NCS
    return y if activation is None else ACTIVATIONS[activation](y, slope)

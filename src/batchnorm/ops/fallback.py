"""The op through torch's own kernels (aten): what runs where there is no kernel of ours. And the ops it is cut into.

Shapes: N examples, C channels, S places (none for (N, C)). x_NCS is (N, C, ...).
Derivatives come from aten: first and second order are right. The third order in training is not, since aten
takes the statistics that it saved for constants there; ``ops.reference`` is right to any order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.ops import reference
from batchnorm.ops.activations import NO_ACTIVATION, Activation
from batchnorm.ops.arguments import Affine
from batchnorm.ops.autograd import reference_d_z
from batchnorm.ops.reference import over_NS, per_channel


def batch_norm(
    x_NCS: Tensor,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    gamma_C: Tensor | None,
    beta_C: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    g: Activation = NO_ACTIVATION,
    residual_NCS: Tensor | None = None,
) -> Tensor:
    """y = g(BN(x) + residual), with batch statistics in training, else with the running ones.

    In training the running statistics, where given, are updated in place. y has torch's type of x + residual.
    """
    y = F.batch_norm(x_NCS, running_mean_C, running_var_C, gamma_C, beta_C, training, momentum, eps)
    if residual_NCS is not None:
        y = y + residual_NCS
    return g.in_place(y)


# ---- the pieces, as ``schema`` has them: equations instead of kernels ------------------------------------------------


def statistics(x_NCS: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in float64."""
    var_C, mean_C = torch.var_mean(reference.widen(x_NCS), over_NS(x_NCS), correction=0)
    return mean_C.double(), var_C.double()


def normalize(x_NCS: Tensor, mean_C: Tensor, var_C: Tensor, *affine: Any) -> Tensor:
    """y by the given statistics."""
    weight_C, bias_C, residual_NCS, eps, *g = affine
    z = reference.normalize(reference.widen(x_NCS), mean_C, var_C, weight_C, bias_C, eps)
    z = z if residual_NCS is None else z + residual_NCS
    return Activation(*g).in_place(z).to(x_NCS.dtype)


def gradient_sums(dy_NCS: Tensor, x_NCS: Tensor, mean_C: Tensor, var_C: Tensor, *affine: Any) -> tuple[Tensor, Tensor]:
    """The sums of dz and of dz * xhat, in float64."""
    x, given = reference.widen(x_NCS), Affine(*affine)
    d_z = reference_d_z(dy_NCS, x, mean_C, var_C, given)
    xhat = reference.normalize(x, mean_C, var_C, None, None, given.eps)
    return d_z.sum(over_NS(x)).double(), (d_z * xhat).sum(over_NS(x)).double()


def input_gradient(
    dy_NCS: Tensor, x_NCS: Tensor, mean_C: Tensor, var_C: Tensor, *affine_and_means: Any
) -> tuple[Tensor, Tensor]:
    """dx = gamma * rstd * (dz - E[dz] - xhat * E[dz * xhat]), and dresidual = dz."""
    *affine, dz_mean_C, dz_xhat_mean_C = affine_and_means
    x, given = reference.widen(x_NCS), Affine(*affine)
    d_z = reference_d_z(dy_NCS, x, mean_C, var_C, given)
    xhat = reference.normalize(x, mean_C, var_C, None, None, given.eps)
    scale_C = (var_C + given.eps).rsqrt() * (1 if given.weight_C is None else given.weight_C)
    d_x = d_z - per_channel(dz_mean_C, x) - xhat * per_channel(dz_xhat_mean_C, x)
    return (d_x * per_channel(scale_C, x)).to(x_NCS.dtype), d_z.to(x_NCS.dtype)

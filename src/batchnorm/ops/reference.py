"""The paper's equations (Ioffe & Szegedy 2015) in plain torch: the oracle that every kernel must agree with.

Shapes: N examples, C channels, S places (none for (N, C)). x_NCS is (N, C, ...); m = N * S, values per channel.
Dtypes: the equations are computed in the dtype of x. ``batch_norm`` and ``batch_norm_backward`` widen it first: float16
and bfloat16 to float32, float32 to float64; they round once, at the end.
Every step is differentiable, the gradients too: derivatives of any order are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.ops.activations import NO_ACTIVATION, Activation


def widen(t: Tensor) -> Tensor:
    """The same values in the dtype that sums are kept in."""
    return t.to(torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else torch.float64)


def per_channel(t_C: Tensor, like_NCS: Tensor) -> Tensor:
    """(C,) -> (C, 1, ...): one value per channel, broadcast over examples and places."""
    return t_C.to(like_NCS.dtype).reshape(-1, *[1] * (like_NCS.dim() - 2))


def over_NS(t_NCS: Tensor) -> list[int]:
    """The dimensions that batch statistics sum over: all but the channels."""
    return [d for d in range(t_NCS.dim()) if d != 1]


def statistics(x_NCS: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over the mini-batch (Algorithm 1, lines 1 and 2)."""
    mu_C = x_NCS.mean(over_NS(x_NCS))  # line 1
    var_C = ((x_NCS - per_channel(mu_C, x_NCS)) ** 2).mean(over_NS(x_NCS))  # line 2
    return mu_C, var_C


def masked_statistics(x_NCS: Tensor, mask_N1S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel where the mask is True (0 for nowhere), and over how many values."""
    n = mask_N1S.sum(over_NS(x_NCS), dtype=x_NCS.dtype)
    mu_C = x_NCS.where(mask_N1S, 0).sum(over_NS(x_NCS)) / n.clamp(min=1)
    centered = (x_NCS - per_channel(mu_C, x_NCS)).where(mask_N1S, 0)
    return mu_C, (centered**2).sum(over_NS(x_NCS)) / n.clamp(min=1), n


def chosen_statistics(
    x_NCS: Tensor, running_mean_C: Tensor | None, running_var_C: Tensor | None, training: bool
) -> tuple[Tensor, Tensor]:
    """The statistics that normalize x: the mini-batch's in training, else the population's."""
    if training:
        return statistics(x_NCS)
    if running_mean_C is None or running_var_C is None:
        raise RuntimeError("running_mean and running_var must be defined in evaluation mode")
    return running_mean_C, running_var_C


def normalize(
    x_NCS: Tensor, mu_C: Tensor, var_C: Tensor, gamma_C: Tensor | None, beta_C: Tensor | None, eps: float
) -> Tensor:
    """y = gamma * xhat + beta (Algorithm 1, lines 3 and 4); a gamma or beta of None is left out.

    With population statistics it is Algorithm 2, line 11; the mean is subtracted first, since
    gamma / sqrt(var + eps) * x + (beta - gamma * mu / sqrt(var + eps)) cancels where |mu| is large.
    """
    mu, rstd = per_channel(mu_C, x_NCS), (per_channel(var_C, x_NCS) + eps).rsqrt()
    xhat = (x_NCS - mu) * rstd  # line 3
    y = xhat if gamma_C is None else per_channel(gamma_C, x_NCS) * xhat  # line 4
    return y if beta_C is None else y + per_channel(beta_C, x_NCS)


def update_running(
    running_mean_C: Tensor,
    running_var_C: Tensor,
    mu_C: Tensor,
    var_C: Tensor,
    m: int,
    momentum: float | None,
    batches: int = 1,
) -> tuple[Tensor, Tensor]:
    """running <- (1 - a) * running + a * batch, with the unbiased variance m / (m - 1) * var (Algorithm 2, line 10).

    a = momentum; for momentum=None a = 1 / batches: the plain average over all batches, this one included.
    """
    a = 1 / batches if momentum is None else momentum

    def blend(running_C: Tensor, batch_C: Tensor) -> Tensor:
        return ((1 - a) * running_C.to(batch_C.dtype) + a * batch_C).to(running_C.dtype)

    return blend(running_mean_C, mu_C), blend(running_var_C, var_C * (m / (m - 1)))


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
    x = widen(x_NCS)
    mu_C, var_C = chosen_statistics(x, running_mean_C, running_var_C, training)
    if training and running_mean_C is not None and running_var_C is not None and x_NCS.numel() > 0:
        m = x_NCS.numel() // x_NCS.shape[1]
        new = update_running(running_mean_C, running_var_C, mu_C.detach(), var_C.detach(), m, momentum)
        running_mean_C.copy_(new[0])
        running_var_C.copy_(new[1])
    z = normalize(x, mu_C, var_C, gamma_C, beta_C, eps)
    dtype = x_NCS.dtype
    if residual_NCS is not None:
        z, dtype = z + residual_NCS, torch.result_type(x_NCS, residual_NCS)
    return g.value(z).to(dtype)


def backward(
    d_y_NCS: Tensor, x_NCS: Tensor, mu_C: Tensor, var_C: Tensor, gamma_C: Tensor | None, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``normalize`` (Section 3): d_x, d_gamma, d_beta.

    In training mu and var are functions of x; otherwise they are constants, d_var = d_mu = 0.
    For derivatives of this gradient, mu and var must be ``statistics(x)`` with their graph, not saved values.
    """
    m, var_eps_C = x_NCS.numel() // x_NCS.shape[1], var_C.to(x_NCS.dtype) + eps
    rstd_C, centered = var_eps_C.rsqrt(), x_NCS - per_channel(mu_C, x_NCS)
    xhat = centered * per_channel(rstd_C, x_NCS)

    d_xhat = d_y_NCS if gamma_C is None else d_y_NCS * per_channel(gamma_C, x_NCS)
    d_x = d_xhat * per_channel(rstd_C, x_NCS)
    if training and m > 0:
        d_var_C = (d_xhat * centered).sum(over_NS(x_NCS)) * (-1 / 2) * var_eps_C ** (-3 / 2)
        d_mu_C = d_xhat.sum(over_NS(x_NCS)) * -rstd_C + d_var_C * (-2 * centered).sum(over_NS(x_NCS)) / m
        d_x = d_x + per_channel(d_var_C, x_NCS) * 2 * centered / m + per_channel(d_mu_C, x_NCS) / m
    d_gamma_C = (d_y_NCS * xhat).sum(over_NS(x_NCS))
    d_beta_C = d_y_NCS.sum(over_NS(x_NCS))
    return d_x, d_gamma_C, d_beta_C


def batch_norm_backward(
    d_y_NCS: Tensor,
    x_NCS: Tensor,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    gamma_C: Tensor | None,
    beta_C: Tensor | None,
    training: bool,
    eps: float,
    g: Activation = NO_ACTIVATION,
    residual_NCS: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of ``batch_norm``: d_x, d_gamma, d_beta, d_residual, in their tensors' dtypes; None for None."""
    x = widen(x_NCS)
    mu_C, var_C = chosen_statistics(x, running_mean_C, running_var_C, training)
    d_z = d_y_NCS.to(x.dtype)
    if g.code:
        z = normalize(x, mu_C, var_C, gamma_C, beta_C, eps)
        z = z if residual_NCS is None else z + residual_NCS
        d_z = d_z * g.derivative(z)
    d_x, d_gamma_C, d_beta_C = backward(d_z, x, mu_C, var_C, gamma_C, eps, training)
    return (
        d_x.to(x_NCS.dtype),
        None if gamma_C is None else d_gamma_C.to(gamma_C.dtype),
        None if beta_C is None else d_beta_C.to(beta_C.dtype),
        None if residual_NCS is None else d_z.to(residual_NCS.dtype),
    )

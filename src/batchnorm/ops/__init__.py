"""The op, on the kernels that this machine has: C++ on CPU, else torch's own (aten).

Shapes: as in ``schema``. Comes from: ``functional``. Goes to: ``schema`` with kernels, ``fallback``, or ``reference``.
"""

from __future__ import annotations

import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor

from batchnorm.ops import fallback, reference, schema

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CODES = {name: code for code, name in enumerate(schema.ACTIVATIONS)}


def _load() -> tuple[str, ...]:
    """Load the compiled kernels; the kinds of devices that they serve."""
    found = PathFinder.find_spec("_kernels", [str(Path(__file__).parent)])
    if found is None or found.origin is None:
        warnings.warn(
            "batchnorm: the C++ kernels are not built, torch's own run instead (slower). To build them, with g++ "
            "installed: pip install --no-build-isolation --force-reinstall --no-deps batchnorm",
            stacklevel=2,
        )
        return ()
    torch.ops.load_library(found.origin)
    return ("cpu",)


DEVICES = _load()


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
    tensors = (x_NCS, running_mean_C, running_var_C, gamma_C, beta_C)
    if momentum is None or not _has_kernel(*tensors, residual_NCS, training, eps) or torch.compiler.is_exporting():
        return fallback.batch_norm(*tensors, training, momentum, eps, activation, slope, residual_NCS)
    if torch.autograd.forward_ad._current_level >= 0:  # ops have no forward-mode derivative
        return reference.batch_norm(*tensors, training, momentum, eps, activation, slope, residual_NCS)
    if residual_NCS is not None and residual_NCS.dtype != x_NCS.dtype:
        dtype = torch.result_type(x_NCS, residual_NCS)  # as y + residual has it
        x_NCS, residual_NCS = x_NCS.to(dtype), residual_NCS.to(dtype)
    scalars = (eps, _CODES[activation], slope)
    if not training:
        if torch.is_grad_enabled():  # backward must not read live buffers, which a later step changes
            running_mean_C, running_var_C = running_mean_C.clone(), running_var_C.clone()  # type: ignore[union-attr]
        return schema.Normalize.apply(x_NCS, running_mean_C, running_var_C, gamma_C, beta_C, residual_NCS, *scalars)
    y, mean, var = schema.Forward.apply(x_NCS, gamma_C, beta_C, residual_NCS, *scalars)
    if running_mean_C is not None or running_var_C is not None:
        _update(running_mean_C, running_var_C, mean, var, x_NCS.numel() // x_NCS.shape[1], momentum)
    return y


def _has_kernel(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
) -> bool:
    """Whether a kernel of ours takes this. What torch refuses is left to torch, whose errors users know."""
    if x.device.type not in DEVICES or x.dtype not in _DTYPES or x.dim() < 2 or x.numel() == 0 or eps <= 0:
        return False
    channels, statistics = x.shape[1], (running_mean, running_var)
    if training and x.numel() == channels or (running_mean is None) != (running_var is None):
        return False
    per_channel = [t for t in (*statistics, weight, bias) if t is not None]
    dtypes = {t.dtype for t in per_channel}
    wide = x.dtype in (torch.bfloat16, torch.float16) and dtypes == {torch.float32}
    return (
        (training or running_mean is not None)
        and all(t.shape == (channels,) and t.device == x.device for t in per_channel)
        and (wide or dtypes <= {x.dtype})
        and (residual is None or (residual.device == x.device and residual.dtype in _DTYPES))
    )


def _update(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, values: int, momentum: float
) -> None:
    """running <- (1 - momentum) * running + momentum * batch, the variance unbiased (Algorithm 2, line 10)."""
    if running_mean is not None and running_var is not None and torch._C._functorch.peek_interpreter_stack() is None:
        torch.ops.batchnorm.update_running_(running_mean, running_var, None, mean, var, values, momentum)
    elif values > 0:  # torch's own ops know what vmap allows
        for running, batch in ((running_mean, mean), (running_var, var * (values / (values - 1)))):
            if running is not None:
                running.mul_(1 - momentum).add_(batch.to(running.dtype), alpha=momentum)

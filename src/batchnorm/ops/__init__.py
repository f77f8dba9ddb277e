"""The op, on the kernels that this machine has: C++ on CPU, Triton on CUDA, else torch's own (aten).

Shapes: as in ``schema``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.ops import fallback, reference, schema
from batchnorm.ops.activations import NO_ACTIVATION, Activation
from batchnorm.ops.running import blend_, is_transformed

_HALVES = (torch.bfloat16, torch.float16)


def _load_cpu() -> tuple[torch.dtype, ...]:
    """Load the compiled kernels."""
    if os.environ.get("BATCHNORM_TRITON_ON_CPU") == "1":  # for tests, with TRITON_INTERPRET=1
        return _load_cuda("CPU")
    found = PathFinder.find_spec("_kernels", [str(Path(__file__).parent)])
    if found is None or found.origin is None:
        warnings.warn(
            "batchnorm: the C++ kernels are not built, torch's own run instead (slower). To build them, with g++ "
            "installed: pip install --no-build-isolation --force-reinstall --no-deps batchnorm",
            stacklevel=2,
        )
        return ()
    torch.ops.load_library(found.origin)
    return (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load_cuda(key: str = "CUDA") -> tuple[torch.dtype, ...]:
    """Triton is imported, and tried, when the first tensor on CUDA arrives."""
    try:
        from batchnorm.ops import cuda

        cuda.register(key)
    except Exception as error:  # no Triton, no C compiler for it, a GPU that it does not know
        warnings.warn(
            f"batchnorm: Triton does not run here ({type(error).__name__}: {error}), so torch's own kernels run on "
            "CUDA (slower). It needs: pip install triton, and a C compiler (apt-get install gcc).",
            stacklevel=2,
        )
        return ()
    return cuda.DTYPES


_LOADERS = {"cpu": _load_cpu, "cuda": _load_cuda}
_SERVED: dict[str, tuple[torch.dtype, ...]] = {}


def dtypes_served(device_type: str) -> tuple[torch.dtype, ...]:
    """The dtypes that our kernels take on such a device; loads them at the first call."""
    served = _SERVED.get(device_type)
    if served is None:
        served = _SERVED[device_type] = _LOADERS.get(device_type, tuple)()
    return served


# What torch.compiler.assume_constant_result does, without importing torch._dynamo: that takes as long as torch itself.
dtypes_served._dynamo_marked_constant = True  # type: ignore[attr-defined]
dtypes_served("cpu")


def batch_norm(
    x_NCS: Tensor,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    gamma_C: Tensor | None,
    beta_C: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    g: Activation = NO_ACTIVATION,
    residual_NCS: Tensor | None = None,
    batches: Tensor | None = None,
    skipped: Tensor | None = None,
) -> Tensor:
    """y = g(BN(x) + residual), with batch statistics in training, else with the running ones.

    In training the running statistics, where given, are updated in place. y has torch's type of x + residual.
    ``batches`` counts this one; with momentum=None the running statistics are then the plain average over all.
    With ``skipped``, (C,), a channel's running statistics never take up what is not finite: it is counted there.
    """
    tensors = (x_NCS, running_mean_C, running_var_C, gamma_C, beta_C)
    rest = (g, residual_NCS)
    if not has_kernel(*tensors, residual_NCS, training, eps) or (momentum is None and batches is None):
        return _through(fallback.batch_norm, batches, skipped, tensors, training, momentum, eps, *rest)
    if forward_ad._current_level >= 0:  # ops have no forward-mode derivative
        return _through(reference.batch_norm, batches, skipped, tensors, training, momentum, eps, *rest)
    if residual_NCS is not None and residual_NCS.dtype != x_NCS.dtype:
        dtype = torch.promote_types(x_NCS.dtype, residual_NCS.dtype)  # as y + residual has it
        x_NCS, residual_NCS = x_NCS.to(dtype), residual_NCS.to(dtype)
    eager = is_eager()
    if residual_NCS is x_NCS and not eager:  # torch.compile takes no tensor twice
        residual_NCS = residual_NCS.view_as(residual_NCS)
    if not training:
        if torch.is_grad_enabled():  # backward must not read live buffers, which a later step changes
            running_mean_C, running_var_C = running_mean_C.clone(), running_var_C.clone()  # type: ignore[union-attr]
            normalize = (schema.EagerNormalize if eager else schema.Normalize).apply
        else:
            normalize = torch.ops.batchnorm.normalize.default
        return normalize(x_NCS, running_mean_C, running_var_C, gamma_C, beta_C, residual_NCS, eps, *g)
    if eager:
        train = schema.eager_forward if torch.is_grad_enabled() else _train_without_gradient
        return train(
            x_NCS,
            gamma_C,
            beta_C,
            residual_NCS,
            running_mean_C,
            running_var_C,
            batches,
            skipped,
            momentum,
            eps,
            *g,
        )
    y, mean, var = schema.Forward.apply(x_NCS, gamma_C, beta_C, residual_NCS, eps, *g)
    if running_mean_C is not None and running_var_C is not None:
        values = x_NCS.numel() // x_NCS.shape[1]
        running = (running_mean_C, running_var_C, batches, skipped)
        if torch.compiler.is_compiling():
            torch.ops.batchnorm.update_once_.default(*running, mean, var, values, None, momentum)
        else:  # torch's own ops, which know what torch.func allows
            blend_(*running, mean, var * (values / (values - 1)), momentum)
    elif batches is not None:
        batches.add_(1)
    return y


def _train_without_gradient(*arguments: Any) -> Tensor:
    y: Tensor = torch.ops.batchnorm.train.default(*arguments)[0]
    return y


def is_eager() -> bool:
    """No torch.compile and no torch.func around."""
    return not torch.compiler.is_compiling() and not is_transformed()


def is_traced() -> bool:
    """Whether torch.export, TorchScript's tracer or functionalize look for torch's own ops."""
    if is_eager():
        return torch._C._is_tracing()
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else is_functionalized()


def is_functionalized() -> bool:
    """Whether ``torch.func.functionalize`` is around: buffers that it was not given change in torch's ops alone."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Functionalize for level in stack)


is_functionalized._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_gradient(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """As torch does: running statistics are no argument to differentiate by."""
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The function 'batch_norm' is not differentiable with respect to argument '{name}'. This input cannot "
                "have requires_grad True: detach it. (In forward mode, torch.func.jacfwd, it is.)"
            )


def has_kernel(
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
    device, dtype = x.device, x.dtype
    served = dtypes_served(device.type)
    if dtype not in served or x.dim() < 2 or eps <= 0 or x.layout != torch.strided or is_traced():
        return False
    if torch.compiler.is_compiling() and is_transformed():  # Dynamo would write our Functions without their gradients
        return False
    channels, values = x.shape[1], x.numel()
    if values == 0 or (running_mean is None) != (running_var is None):
        return False
    if (training and values == channels) or (not training and running_mean is None):
        return False
    if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):  # type: ignore[union-attr]
        refuse_gradient(running_mean, running_var)
    expected = None if dtype in _HALVES else dtype
    for t in (running_mean, running_var, weight, bias):
        if t is None:
            continue
        if expected is None:  # beside a 16-bit input: all of its dtype, or all float32
            expected = t.dtype
            if expected != dtype and expected != torch.float32:
                return False
        if t.dtype != expected or t.device != device or t.shape != (channels,):
            return False
    return residual is None or (residual.device == device and torch.promote_types(dtype, residual.dtype) in served)


def _through(
    function: Callable[..., Tensor],
    batches: Tensor | None,
    skipped: Tensor | None,
    tensors: tuple[Any, ...],
    training: bool,
    momentum: float | None,
    *rest: Any,
) -> Tensor:
    """Through the fallback or the reference, which know neither the counters nor momentum=None."""
    x, running_mean, running_var, weight, bias = tensors
    skipped = None if is_traced() else skipped  # a traced graph knows the layer's buffers alone
    tracked = running_mean is not None and running_var is not None
    if tracked and training and momentum is None and batches is not None and is_functionalized():
        momentum, batches = 1 / float(batches.add_(1)), None  # as torch's layer does
    if not tracked or not training or (skipped is None and (momentum is not None or batches is None)):
        if batches is not None:
            batches.add_(1)
        if tracked and not training and torch.is_grad_enabled() and not is_traced():  # backward reads no live buffers
            running_mean, running_var = running_mean.clone(), running_var.clone()
        momentum = 0.0 if batches is not None and momentum is None else momentum  # None alone is torch's error
        return function(x, running_mean, running_var, weight, bias, training, momentum, *rest)
    # momentum=1.0 gives the batch alone, or, for an empty batch, the running statistics as they are.
    zero = torch.zeros_like(running_mean)  # 0 * NaN is NaN
    if is_transformed():
        zero = zero + x.new_zeros(running_mean.shape, dtype=running_mean.dtype)  # batched by vmap as x is
    mean, var = (t.detach().nan_to_num() + zero for t in (running_mean, running_var))
    y = function(x, mean, var, weight, bias, training, 1.0, *rest)
    blend_(running_mean, running_var, batches, skipped, mean, var, momentum)
    return y

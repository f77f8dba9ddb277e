"""The op, on the kernels that this machine has: C++ on CPU, Triton on CUDA, else torch's own (aten).

Shapes: as in ``schema``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.ops import autograd, fallback, reference
from batchnorm.ops.arguments import Affine, Running
from batchnorm.ops.modes import is_functionalized, is_traced, is_transformed
from batchnorm.ops.running import blend_

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


def batch_norm(x_NCS: Tensor, affine: Affine, running: Running, training: bool) -> Tensor:
    """y = g(BN(x) + residual), with batch statistics in training, else with the running ones.

    In training the running statistics, where given, are updated in place. y has torch's type of x + residual.
    """
    eager = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    served = has_kernel(x_NCS, affine, running, training, eager)
    if not served or (running.momentum is None and running.batches is None):
        return _through(fallback.batch_norm, x_NCS, affine, running, training)
    if forward_ad._current_level >= 0:  # ops have no forward-mode derivative
        return _through(reference.batch_norm, x_NCS, affine, running, training)
    residual_NCS = affine.residual_NCS
    if residual_NCS is not None:
        if residual_NCS.dtype != x_NCS.dtype:
            x_NCS, affine = affine.in_one_dtype(x_NCS)
        elif residual_NCS is x_NCS and not eager:  # torch.compile takes no tensor twice
            affine = affine._replace(residual_NCS=residual_NCS.view_as(residual_NCS))
    if not training:
        mean_C, var_C = running[:2]
        if not torch.is_grad_enabled():
            return torch.ops.batchnorm.normalize.default(x_NCS, mean_C, var_C, *affine)
        # backward must not read live buffers, which a later step changes
        mean_C, var_C = mean_C.clone(), var_C.clone()  # type: ignore[union-attr]
        return (autograd.eager_normalize if eager else autograd.Normalize.apply)(x_NCS, mean_C, var_C, *affine)
    if eager:
        if torch.is_grad_enabled():
            return autograd.eager_forward(x_NCS, *affine, *running)
        return torch.ops.batchnorm.train.default(x_NCS, *affine, *running)[0]
    y, mean_C, var_C = autograd.Forward.apply(x_NCS, *affine)
    if running.mean_C is not None:
        values = x_NCS.numel() // x_NCS.shape[1]
        if torch.compiler.is_compiling():
            torch.ops.batchnorm.update_once_.default(*running, mean_C, var_C, values, None)
        else:  # torch's own ops, which know what torch.func allows
            blend_(running, mean_C, var_C * (values / (values - 1)))
    elif running.batches is not None:
        running.batches.add_(1)
    return y


def refuse_gradient(running: Running) -> None:
    """As torch does: running statistics are no argument to differentiate by."""
    for name, t in (("running_mean", running.mean_C), ("running_var", running.var_C)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The function 'batch_norm' is not differentiable with respect to argument '{name}'. This input cannot "
                "have requires_grad True: detach it. (In forward mode, torch.func.jacfwd, it is.)"
            )


def has_kernel(x: Tensor, affine: Affine, running: Running, training: bool, eager: bool) -> bool:
    """Whether a kernel of ours takes this. What torch refuses is left to torch, whose errors users know."""
    device, dtype = x.device, x.dtype
    served = _SERVED.get(device.type) if eager else None
    if served is None:
        served = dtypes_served(device.type)
    if dtype not in served or x.dim() < 2 or affine.eps <= 0 or x.layout != torch.strided:
        return False
    if torch._C._is_tracing() if eager else is_traced():
        return False
    if not eager and torch.compiler.is_compiling() and is_transformed():
        return False  # Dynamo would write our Functions without their gradients
    channels, values = x.shape[1], x.numel()
    running_mean, running_var = running[:2]
    if values == 0 or (running_mean is None) != (running_var is None):
        return False
    if (training and values == channels) or (not training and running_mean is None):
        return False
    if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):  # type: ignore[union-attr]
        refuse_gradient(running)
    expected = None if dtype in _HALVES else dtype
    weight, bias, residual = affine[:3]
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


def _through(function: Callable[..., Tensor], x: Tensor, affine: Affine, running: Running, training: bool) -> Tensor:
    """Through the fallback or the reference, which know neither the counters nor momentum=None."""
    if is_traced():  # a traced graph knows the layer's buffers alone
        running = running._replace(skipped=None)
    mean, var, batches, skipped, momentum = running
    rest = (affine.eps, affine.g, affine.residual_NCS)
    tracked = mean is not None and var is not None
    if tracked and training and momentum is None and batches is not None and is_functionalized():
        momentum, batches = 1 / float(batches.add_(1)), None  # as torch's layer does
    if not tracked or not training or (skipped is None and (momentum is not None or batches is None)):
        if batches is not None:
            batches.add_(1)
        if tracked and not training and torch.is_grad_enabled() and not is_traced():  # backward reads no live buffers
            mean, var = mean.clone(), var.clone()  # type: ignore[union-attr]
        momentum = 0.0 if batches is not None and momentum is None else momentum  # None alone is torch's error
        return function(x, mean, var, affine.weight_C, affine.bias_C, training, momentum, *rest)
    # momentum=1.0 gives the batch alone, or, for an empty batch, the running statistics as they are.
    zero = torch.zeros_like(mean)  # type: ignore[arg-type]  # 0 * NaN is NaN
    if is_transformed():
        zero = zero + x.new_zeros(mean.shape, dtype=mean.dtype)  # type: ignore[union-attr]  # batched by vmap as x is
    mean, var = (t.detach().nan_to_num() + zero for t in (mean, var))  # type: ignore[union-attr]
    y = function(x, mean, var, affine.weight_C, affine.bias_C, training, 1.0, *rest)
    blend_(running, mean, var)
    return y

"""Layers as torch's graph tools take them: torch.fx and TorchScript, which know torch's own layers.

A layer that adds nothing to torch's, in eval, is torch's layer there: so that tools which look for it by its type find
it. With an activation or other statistics it stays itself in torch.fx, one node, and becomes a module of torch's
functions in TorchScript.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from batchnorm.functional import as_mask, masked_in_eval, of_source, of_whole_batch
from batchnorm.nn.sources import Batch
from batchnorm.nn.torchscript import Scripted
from batchnorm.nn.tracking import has_running_statistics, is_frozen, updates_running_statistics
from batchnorm.ops.arguments import Affine, Running
from batchnorm.ops.split import of_batch

if TYPE_CHECKING:
    from batchnorm.nn.base import FusedBatchNorm

# The attributes that a layer of ours has besides torch's.
OWN = ("_statistics", "_told", "_frozen", "activation", "before_sync", "counts", "fused", "g", "gathering", "guarded",
       "held", "skipped_batches", "taken_from")  # fmt: skip


def stock_class(layer: nn.Module) -> type[nn.Module] | None:
    """torch's class that a layer of ours stands for; None for subclasses, which may compute anything."""
    if type(layer).__module__ != "batchnorm.nn.norm":
        return None
    return next((kind for kind in type(layer).__mro__ if kind.__module__ == "torch.nn.modules.batchnorm"), None)


def as_stock(layer: FusedBatchNorm, kind: type[nn.Module]) -> nn.Module:
    """A layer of torch's with the same parameters, buffers and hooks: the same objects."""
    stock: Any = kind.__new__(kind)
    vars(stock).update({name: value for name, value in vars(layer).items() if name not in OWN})
    return stock


def adds_nothing(layer: FusedBatchNorm) -> bool:
    """Whether torch's layer does all that this one does, but for the speed and the guard in training."""
    return layer.activation is None and type(layer.statistics) is Batch and not layer._frozen


# ---- torch.fx --------------------------------------------------------------------------------------------------------


def as_node(layer: FusedBatchNorm, input: Any, residual: Any, mask: Any) -> Any:
    """One call of the module in the graph, as torch.fx records those of torch's layers by itself.

    A layer that is no module of the graph's own, as the root or one whose class does more around it, is a function.
    """
    tracer: Any = next(t for t in (input, residual, mask) if isinstance(t, fx.Proxy)).tracer
    if type(tracer).__module__.startswith("torch.ao.quantization"):
        raise TypeError(
            f"torch's quantization finds batch normalization by its exact type, and would leave {type(layer).__name__} "
            "in float: pass batchnorm.to_torch(model), or batchnorm.fold(model, example) to be rid of it."
        )
    path = tracer.path_of_module(layer)
    if path and (layer._forward_hooks or layer._forward_pre_hooks):
        raise TypeError(
            f"{path}, a {type(layer).__name__}, has forward hooks. torch.fx runs them while it traces, and the traced "
            "module would run them again: trace without them (torch.nn.utils.prune.remove takes away those of pruning),"
            " and register them on the result."
        )
    if not path or type(layer).forward is not _own_forward(layer):
        return _as_function(layer, tracer, path, input, residual, mask)
    kind = stock_class(layer)
    if kind is not None and not layer.training and residual is None and mask is None and adds_nothing(layer):
        # The graph's module is made of the tracer's root: a copy of it, so that the user's model keeps our layer.
        tracer.root = _with(tracer.root, path.split("."), as_stock(layer, kind))
    given = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
    return tracer.create_proxy("call_module", path, (input,), given)


def _own_forward(layer: FusedBatchNorm) -> Any:
    return next(kind.__dict__["forward"] for kind in type(layer).__mro__ if kind.__module__ == "batchnorm.nn.base")


def _as_function(layer: FusedBatchNorm, tracer: Any, path: str, *given: Any) -> Any:
    in_train = layer.training and not is_frozen(layer)
    if in_train and type(layer.statistics) is not Batch:
        raise TypeError(
            f"torch.fx writes {type(layer).__name__} as a function here, which knows nothing of statistics="
            f"{layer.statistics!r}: trace a module that has one of batchnorm's own layers as a child, or name "
            f"{type(layer).__name__} in your Tracer's is_leaf_module."
        )
    read = has_running_statistics(layer) and (updates_running_statistics(layer) or not in_train)
    statistics = ("running_mean", "running_var", *(["num_batches_tracked"] if in_train else []))
    tensors = {
        name: tracer.create_proxy("get_attr", f"{path}.{name}".lstrip("."), (), {})
        for name in ("weight", "bias", *(statistics if read else []))
        if getattr(layer, name, None) is not None
    }
    batches = tensors.pop("num_batches_tracked", None)
    momentum = 0.0 if layer.momentum is None and batches is None else layer.momentum
    scalars = (in_train or not read, momentum, layer.epsilon, *layer.g)
    return tracer.create_proxy(
        "call_function", batch_norm_or_masked, (*given, *scalars), {**tensors, "batches": batches}
    )


def batch_norm_or_masked(
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    a: float,
    b: float,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    batches: Tensor | None = None,
) -> Tensor:
    """A layer's forward as a graph calls it, which may learn only when it runs whether there is a mask."""
    running = Running(running_mean, running_var, batches, momentum=momentum)
    affine = Affine(weight, bias, residual, eps, activation, a, b)
    if mask is None:
        return of_whole_batch(input, affine, running, training)
    if training:
        return of_source(of_batch, input, affine, running, as_mask(mask, input))
    return masked_in_eval(input, affine, running, as_mask(mask, input))


def _with(root: nn.Module, path: list[str], layer: nn.Module) -> nn.Module:
    """A copy of the modules on the way to a layer, and of nothing else, with another one in its place."""
    twin = copy.copy(root)
    name, *rest = path
    twin._modules = dict(root._modules)
    twin._modules[name] = _with(root._modules[name], rest, layer) if rest else layer  # type: ignore[arg-type]
    return twin


# ---- TorchScript -----------------------------------------------------------------------------------------------------


def scriptable(layer: FusedBatchNorm) -> nn.Module:
    """The layer's stand-in for ``torch.jit.script``, which puts it into the model: torch does so with all stand-ins.

    Raises:
        TypeError: statistics other than the batch's, which TorchScript would lose in training; a subclass.
    """
    if type(layer).forward is not _own_forward(layer):
        raise TypeError(
            f"torch.jit.script would lose what {type(layer).__name__}.forward does around batch normalization: use "
            "torch.jit.trace, or give the class a layer of batchnorm's as a child in place of a base."
        )
    if type(layer.statistics) is not Batch:
        raise TypeError(
            f"torch.jit.script knows nothing of statistics={layer.statistics!r}: set layer.statistics = "
            "batchnorm.Batch() first (in eval the layer computes the same)."
        )
    kind = stock_class(layer)
    return as_stock(layer, kind) if kind is not None and adds_nothing(layer) else Scripted(layer)

"""From torch's layers to ours, in a whole model, and back.

Comes from: any model. Goes to: the same model with layers of ``nn.norm``.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from batchnorm.nn import Batch, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.tracing import OWN
from batchnorm.surgery.fuse import fuse, unfuse

Model = TypeVar("Model", bound=nn.Module)

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def from_torch(model: Model, *, example: Any = None) -> Model:
    """The model with every ``torch.nn.BatchNorm1d/2d/3d`` replaced by ours: same results, faster steps.

    The new model shares parameters and buffers with the given one, as the same objects, so that an optimizer stays
    valid; the given model keeps its layers. Modes, hooks and state_dict keys are as they were. Subclasses of torch's
    layers are left alone, since they may compute anything; so is ``SyncBatchNorm``.

    With an ``example``, a layer also takes over the addition and the activation behind it, where a forward pass on the
    example shows that nothing else reads what is in between. An activation module that is then done becomes an
    ``nn.Identity``; an addition or an activation that is written in a module's ``forward`` is fused in a forward that
    torch.fx writes anew. There, arguments that the example does not give and plain attributes that the forward reads
    are constants. Outputs and gradients are checked beside the old ones, of each new forward and of the whole model.
    ``batchnorm_report`` of the result has a row for each layer: what it was fused with, or why not.

    Args:
        model: any module.
        example: an input of the model: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        A model of the same class.

    Raises:
        TypeError: not a module.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> ours = bn.from_torch(model, example=torch.randn(2, 4))
        >>> type(ours[1]) is bn.BatchNorm1d, ours[1].activation
        (True, 'relu')
        >>> print(ours.batchnorm_report)
        layer  done   why
        1      fused  with 2
    """
    converted = with_same_tensors(model, "from_torch")
    for module in converted.modules():
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
            if module.running_mean is not None:
                module.counter(module.running_mean)  # type: ignore[operator]
    if example is not None:
        converted.batchnorm_report = fuse(converted, example)  # type: ignore[assignment]
    return converted


def to_torch(model: Model) -> Model:
    """The way back from ``from_torch``: torch's layers, and the activations and forwards that there were.

    Tensors are shared as in ``from_torch``.

    Raises:
        TypeError: not a module; a layer that was built with an activation, which torch's does not have.
        ValueError: a layer that is frozen, or with other ``statistics``: see ``unfreeze``, ``revert_sync_batchnorm``.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> back = bn.to_torch(bn.from_torch(model, example=torch.randn(2, 4)))
        >>> [type(module).__module__ for module in back][1], back[2]
        ('torch.nn.modules.batchnorm', ReLU())
    """
    converted = with_same_tensors(model, "to_torch")
    unfuse(converted)
    back = {ours: stock for stock, ours in OURS.items()}
    for name, layer in converted.named_modules():
        if type(layer) not in back:
            continue
        known: Any = layer
        if known.activation is not None:
            raise TypeError(
                f"layer {name!r} was built with activation={known.activation!r}, which torch's does not have: build it "
                "without, with a module for it behind."
            )
        if known.frozen_statistics or known.frozen_affine:
            raise ValueError(f"layer {name!r} is frozen, which torch's cannot be: batchnorm.unfreeze(model) first.")
        if type(known.statistics) is not Batch:
            raise ValueError(f"layer {name!r} has statistics={known.statistics!r}, which torch's does not have.")
        become_stock(known, back[type(layer)])
    converted.__dict__.pop("batchnorm_report", None)
    return converted


def become_stock(layer: FusedBatchNorm, kind: type) -> None:
    """The same object as a layer of torch's, with nothing that ours have besides."""
    layer.tell_skipped()
    for name in OWN:
        layer.__dict__.pop(name, None)
    layer.__class__ = kind


def with_same_tensors(model: Model, verb: str) -> Model:
    """A copy whose parameters and buffers are the given model's own: the same objects."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} takes a torch.nn.Module, got {type(model).__name__}.")
    modules = set(model.modules())
    groups = [module.process_group for module in modules if isinstance(module, nn.SyncBatchNorm)]
    owners = [getattr(hook, "__self__", None) for module in modules for hook in _hooks(module)]  # of bound methods
    shared = (*model.parameters(), *model.buffers(), *groups, *(o for o in owners if o not in modules))
    return copy.deepcopy(model, {id(kept): kept for kept in shared})


def _hooks(module: nn.Module) -> list[object]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for kind in kinds for hook in getattr(module, kind).values()]

"""From torch's layers to ours, in a whole model.

Comes from: any model. Goes to: the same model with layers of ``nn.norm``.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

Model = TypeVar("Model", bound=nn.Module)

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def from_torch(model: Model) -> Model:
    """The model with every ``torch.nn.BatchNorm1d/2d/3d`` replaced by ours: same results, faster steps.

    The new model shares parameters and buffers with the given one, as the same objects, so that an optimizer stays
    valid; the given model keeps its layers. Modes, hooks and state_dict keys are as they were. Subclasses of torch's
    layers are left alone, since they may compute anything; so is ``SyncBatchNorm``.

    Args:
        model: any module.

    Returns:
        A model of the same class.

    Raises:
        TypeError: not a module.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = bn.from_torch(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8)))
        >>> type(model[1]) is bn.BatchNorm1d
        True
    """
    converted = with_same_tensors(model, "from_torch")
    for module in converted.modules():
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
            module.count_skipped()  # type: ignore[operator]
    return converted


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

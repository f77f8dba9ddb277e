"""From torch's layers to ours, in a whole model, and back."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from batchnorm.nn import Batch
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.surgery.adopt import OURS as OURS
from batchnorm.surgery.adopt import become_ours, become_stock, left_alone
from batchnorm.surgery.checks import checked, in_containers, only_copies_run, replaced, scripted
from batchnorm.surgery.copies import computed, copied
from batchnorm.surgery.fuse import fuse, unfuse
from batchnorm.surgery.report import Report, Row

Model = TypeVar("Model", bound=nn.Module)


def from_torch(model: Model, example: Any = None) -> Model:
    """The model with every ``torch.nn.BatchNorm1d/2d/3d`` replaced by ours: same results, faster steps.

    The new model shares parameters and buffers with the given one, as the same objects, so that an optimizer stays
    valid; the given model keeps its layers. Modes, hooks and state_dict keys are as they were. ``SyncBatchNorm`` is
    left alone, and so are subclasses of torch's layers, since they may compute anything.

    With an ``example``, a layer also takes over the addition and the activation behind it, where a forward pass on the
    example shows that nothing else reads what is in between. An activation module that is then done becomes an
    ``nn.Identity``; an addition or an activation that is written in a module's ``forward`` is fused in a forward that
    torch.fx writes anew. There, plain values that the forward reads, attributes and global variables, are constants; a
    call with other plain arguments than the example's, other containers, runs the forward that there was, from then
    on, and so does any after a container of modules in it was changed. A forward that does something else under
    autocast, without gradients, in inference mode or with another default dtype is left alone. Subclasses of torch's
    layers that do batch normalization and then call a child of theirs, an activation (timm's ``BatchNormAct2d``),
    become ours with that activation. Outputs and gradients are checked beside the old ones, of each new forward and of
    the whole model. Copies run: the model given notices nothing. The model runs nine times, three of them to find out
    what follows what, and six for the check: before and after, in eval, and in float64 in eval and in train; a module
    whose forward is written anew six times more.

    ``batchnorm_report`` of the result has a row for each layer: what became of it, or why it was left alone. Code of
    others that folds or converts layers by their ``eps`` (a ``fuse()`` in the model's repository, torch's
    ``fuse_conv_bn_eval`` and ``SyncBatchNorm.convert_sync_batchnorm``) finds ordinary layers: reading it gives the
    activation back to where it was. So does the next forward pass after somebody put another module in a layer's place.
    What was compiled in place is to be compiled again. Parts of the result are not to be run alone: where a layer takes
    over an activation outside of its own parent, ``model.encoder(x)`` has it, and the module behind no longer does it.

    Args:
        model: any module.
        example: an input of the model: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        A model of the same class.

    Raises:
        TypeError: not a module.
        ValueError: a wrapper (``DistributedDataParallel``, ``fully_shard``, ``torch.compile``) or a scripted model,
            with what to pass instead; what cannot be copied.

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
    converted = with_same_tensors(model, "from_torch", runs=example is not None)
    for module in converted.modules():
        if type(module) in OURS and not replaced(module):
            become_ours(module, OURS[type(module)])
    before: Any = getattr(converted, "batchnorm_report", Report())
    with only_copies_run(model, "from_torch"):
        report = _replaced(converted) if example is None else fuse(converted, example)
    report.extend(in_containers(converted))
    names = {row.layer for row in report}
    kept = [row for row in before if row.layer not in names]  # of ``accelerate``, whose recipe reads it
    norms = {row.layer: before.norms[row.layer] for row in kept if row.layer in before.norms}
    converted.batchnorm_report = Report([*kept, *report], norms)  # type: ignore[assignment]
    return converted


def _replaced(model: nn.Module) -> Report:
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, FusedBatchNorm)]
    ours = [Row(name, "replaced", f"by batchnorm.{type(layer).__name__}") for name, layer in layers]
    return Report([*ours, *left_alone(model), *scripted(model)])


def to_torch(model: Model) -> Model:
    """The way back from ``from_torch``: torch's layers, and the activations and forwards that there were.

    Tensors are shared as in ``from_torch``.

    Raises:
        TypeError: not a module; a layer that was built with an activation, which torch's does not have.
        ValueError: a layer that is frozen, or with other ``statistics``: see ``unfreeze``, ``revert_sync_batchnorm``;
            what ``from_torch`` refuses.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> back = bn.to_torch(bn.from_torch(model, example=torch.randn(2, 4)))
        >>> [type(module).__module__ for module in back][1], back[2]
        ('torch.nn.modules.batchnorm', ReLU())
    """
    converted = with_same_tensors(model, "to_torch")
    for name, module in converted.named_modules():
        if isinstance(module, FusedBatchNorm) and replaced(module):
            raise ValueError(f"layer {name!r}: its forward was replaced on the object: take that away first.")
        if isinstance(module, FusedBatchNorm) and (module.frozen_statistics or module.frozen_affine):
            raise ValueError(f"layer {name!r} is frozen, which torch's cannot be: batchnorm.unfreeze(model) first.")
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
        if type(known.statistics) is not Batch:
            raise ValueError(f"layer {name!r} has statistics={known.statistics!r}, which torch's does not have.")
        become_stock(known, back[type(layer)])
    converted.__dict__.pop("batchnorm_report", None)
    return converted


def with_same_tensors(model: Model, verb: str, *, runs: bool = False) -> Model:
    """A copy whose parameters and buffers are the given model's own: the same objects."""
    checked(model, verb, runs=runs)
    modules = set(model.modules())
    groups = [module.process_group for module in modules if isinstance(module, nn.SyncBatchNorm)]
    owners = [getattr(hook, "__self__", None) for module in modules for hook in _hooks(module)]  # of bound methods
    kept = (*groups, *(o for o in owners if o not in modules), *(t for _, t in computed(model)))
    return copied(model, {id(each): each for each in (*model.parameters(), *model.buffers(), *kept)})


def _hooks(module: nn.Module) -> list[object]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for kind in kinds for hook in getattr(module, kind).values()]

"""The layers whose outputs batch normalization alone reads, so that their weights' norms are free (Section 3.3)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.population.batches import unwrapped
from batchnorm.surgery.checks import only_copies_run
from batchnorm.surgery.norms import norms_of
from batchnorm.surgery.places import layers_of, norms_behind
from batchnorm.surgery.report import Report
from batchnorm.surgery.watch import in_eager, watch, watch_in_train

_WRAPPED_PART = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names that they have without wrappers: torch.compile, checkpointing, also of parts."""
    return {_WRAPPED_PART.sub("", name).rstrip("."): module for name, module in model.named_modules()}


def normalized(model: Any, example: Any = None) -> list[nn.Module]:
    """The layers of a model, wrapped or not, that batch normalization follows.

    Args:
        model: what ``accelerate`` or ``insert`` returned; with ``example``, any with batch normalization.
        example: an input, on which a copy of the model is run to see; default: what the model's report says.

    Raises:
        TypeError: not a module.
        ValueError: no report that says it, and no example; no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimizer takes a model, got a {type(model).__name__}: recipe.optimizer(model).")
    model = unwrapped(model)
    if example is not None:
        found = _seen(model, example)
    elif not any(isinstance(m, _BatchNorm) for m in model.modules()):
        found = []
    else:
        found = _reported(model)
    if not found:
        raise ValueError(
            "optimizer: no layer of the model has batch normalization behind it: make the model by "
            "batchnorm.accelerate(model, example, recipe), then recipe.optimizer(model)."
        )
    return found


def _reported(model: Any) -> list[nn.Module]:
    report: Any = getattr(model, "batchnorm_report", Report())
    behind, modules = report.norms, modules_of(model)
    if not behind:
        raise ValueError(
            "optimizer: which layers batch normalization follows is seen when the model runs: pass an input, "
            "recipe.optimizer(model, example), or the model that accelerate() returned."
        )
    return [modules[name] for name, norm in behind.items() if name in modules and _normalizes(modules.get(norm))]


def _seen(model: nn.Module, example: Any) -> list[nn.Module]:
    layers, whole = layers_of(model), [*norms_of(model).values()]
    with only_copies_run(model, "optimizer"):
        passes = [watch(model, example, whole=whole), watch_in_train(model, example, whole=whole)]
    with in_eager(model):  # calls are played again, some of them random
        behind = {
            name: [norms_behind(seen, name, layer) for seen in passes if seen is not None]
            for name, layer in layers.items()
        }
    follows = {name for name, each in behind.items() if all(norms and all(map(_normalizes, norms)) for norms in each)}
    return [layer for name, layer in layers.items() if name in follows]


def _normalizes(norm: nn.Module | None) -> bool:
    """By the batch's statistics, in train: neither a frozen layer does, nor another package's with buffers alone."""
    return isinstance(norm, _BatchNorm) and not getattr(norm, "frozen_statistics", False)


def parameter_groups(model: nn.Module, layers: Iterable[nn.Module], **own: Any) -> list[dict[str, Any]]:
    """Two groups for ``Muon``: the weights of these layers, all other parameters.

    A weight that a further module holds too, or that is computed from others, is among the others.

    Args:
        model: the model.
        layers: some of its modules: those that ``normalized`` gives, say.
        own: what else the first group says: ``keep_norm=False`` in a network without batch normalization.
    """
    chosen = {*layers}
    elsewhere = {id(p) for m in model.modules() if m not in chosen for p in m._parameters.values()}
    blocks = {id(m._parameters.get("weight")): getattr(m, "groups", 1) for m in chosen}
    named = [*unwrapped(model).named_parameters()]
    weights = [(name, p) for name, p in named if id(p) in blocks and id(p) not in elsewhere]
    mine = {id(p) for _, p in weights}
    others = [(name, p) for name, p in named if id(p) not in mine]
    first = {"params": weights, "orthogonalize": True, "blocks": [blocks[id(p)] for _, p in weights]} | own
    return [group for group in (first, {"params": others, "orthogonalize": False}) if group["params"]]

"""Batch normalization and what it makes possible, in one call: the network now, the rest of training as a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from batchnorm.recipe.recipe import RECIPES, Recipe
from batchnorm.surgery.checks import checked, on_all_ranks, only_copies_run
from batchnorm.surgery.convert import Model
from batchnorm.surgery.copies import copied
from batchnorm.surgery.insert import insert
from batchnorm.surgery.report import LEFT, Report, Row
from batchnorm.surgery.watch import run

# Modules that hold the probability of dropout themselves, and under which name.
_PROBABILITIES: dict[type[nn.Module], str] = {_DropoutNd: "p", nn.MultiheadAttention: "dropout", nn.RNNBase: "dropout"}


@on_all_ranks
def accelerate(model: Model, example: Any, recipe: str | Recipe = "paper", *, skip: Sequence[str] = ()) -> Model:
    """The model with batch normalization, without dropout, and with a recipe for the rest of its training.

    ``insert`` puts batch normalization before the nonlinearities; dropout's probabilities are multiplied by the
    recipe's factor. What is to change in optimizer and scheduler is ``batchnorm_recipe`` of the result: ``print`` it,
    ``dataclasses.replace`` what should be otherwise, and ``apply`` it, or take its ``optimizer``. The model given is
    not changed. ``batchnorm_report`` lists what was done, layer by layer.

    Args:
        model: any module, not trained yet.
        example: an input: a tensor, a tuple of arguments or a dict of keyword arguments.
        recipe: "paper" (Section 4.2.1), "sgd" (the same with Nesterov's momentum), "fast" (the best that the race
            found, which brings its optimizer: ``recipe.optimizer(accelerated)``), or a ``Recipe``.
        skip: names of layers that ``insert`` leaves alone.

    Returns:
        A copy of the model, in its mode.

    Raises:
        ValueError: an unknown recipe; no layer that could be normalized, with the reasons; what ``insert`` refuses.
        TypeError: not a module.

    Example:
        >>> import torch, batchnorm as bn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
        >>> fast = bn.accelerate(model, torch.randn(2, 4))
        >>> print(fast.batchnorm_report)
        layer  done        why
        0      normalized  before 1
        3      left alone  its output goes to the model's output
        2      dropout     0.5 becomes 0
        >>> optimizer = torch.optim.SGD(fast.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> fast.batchnorm_recipe.apply(optimizer)
        >>> optimizer.param_groups[0]["lr"]
        0.5

    Source: Ioffe & Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167, Sections 3.4 and 4.2.1.
    """
    if isinstance(recipe, str) and recipe not in RECIPES:
        raise ValueError(f'unknown recipe "{recipe}". Known: {", ".join(RECIPES)}; or a batchnorm.Recipe.')
    value = RECIPES[recipe] if isinstance(recipe, str) else recipe
    if not isinstance(value, Recipe):
        raise TypeError(f"recipe must be a name or a batchnorm.Recipe, got {type(recipe).__name__}.")
    checked(model, "accelerate")
    with only_copies_run(model, "accelerate"):
        mine = copied(model)
        dropout = reduce_dropout(mine, value.dropout, example)
        accelerated: Any = insert(mine, example, skip=skip)
    report = accelerated.batchnorm_report
    if not report.of("normalized"):
        if report.norms:
            known = f'batchnorm.RECIPES["{value.name}"]' if RECIPES.get(value.name) == value else "recipe"
            rest = f"{known}.optimizer(model, example)"
            if not value.muon_lr:  # a report tells the layers without batch normalization, which keep their rate
                rest = f"model = batchnorm.insert(model, example), then {known}.apply(optimizer, scheduler, model)"
            dropout_too = (
                "" if value.dropout == 1 else f"; multiply the model's dropout probabilities by {value.dropout:g}"
            )
            raise ValueError(
                "accelerate: there is no layer to normalize, batch normalization is there already. The rest of the "
                f"recipe: {rest}{dropout_too}.\n{report}"
            )
        raise ValueError(f"accelerate: there is no layer to normalize.\n{report or 'The model has no affine layer.'}")
    report.extend(dropout)
    accelerated.batchnorm_recipe = value
    return accelerated


def reduce_dropout(model: nn.Module, factor: float, example: Any) -> Report:
    """Multiply the dropout probabilities of a model, in place; what was done, and the calls that cannot be reached."""
    report = Report()
    if factor == 1:
        return report
    for name, module in model.named_modules():
        for kind, attribute in _PROBABILITIES.items():
            before = getattr(module, attribute) if isinstance(module, kind) else 0
            if before:
                setattr(module, attribute, before * factor)
                report.append(Row(name, "dropout", f"{before:g} becomes {before * factor:g}"))
    changed = report.of("dropout")  # whose own calls have the new probability
    for owner, function in _dropout_calls(model, example):
        if owner in changed:
            continue
        report.append(Row(owner or "the model", LEFT, f"it calls {function}() itself: set its probability there"))
    return report


class _Noting(TorchFunctionMode):
    """Notes the calls of functions that drop something, and the module in whose forward they are."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.found: list[tuple[str, str]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "scaled_dot_product_attention":
            drops = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0
        else:
            p, training = kwargs.get("p", [*args, 0.5][1]), kwargs.get("training", [*args, True, True][2])
            drops = name.endswith("dropout") and p > 0 and training
        if drops:
            self.found.append((self.inside[-1], name))
        return function(*args, **kwargs)


def _dropout_calls(model: nn.Module, example: Any) -> list[tuple[str, str]]:
    """(module, function) of each call that drops something in train; in eval, where it cannot be trained on."""
    noting = _Noting()

    def prepare(twin: nn.Module) -> None:
        for name, module in twin.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # has no hooks
                module.register_forward_pre_hook(lambda *_, name=name: noting.inside.append(name))
                module.register_forward_hook(lambda *_: noting.inside.pop() and None, always_call=True)

    try:
        run(model, example, noting, train=True, prepare=prepare)
    except Exception:  # whatever the user's forward raises: one value per channel, say
        noting.found.clear()
        noting.inside.clear()
        run(model, example, noting, prepare=prepare)
    return list(dict.fromkeys(noting.found))

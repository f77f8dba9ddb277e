"""A recipe's changes to an optimizer and to the scheduler that stands on it, in place."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from batchnorm.population.batches import unwrapped
from batchnorm.recipe.followers import modules_of
from batchnorm.recipe.schedules import Schedule, check_schedule, family
from batchnorm.surgery.affine import affine_of, looks_affine
from batchnorm.surgery.report import LEFT

if TYPE_CHECKING:
    from batchnorm.recipe.recipe import Recipe

RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group
MARK = "recipe"  # in a parameter group: what was applied


def apply(recipe: Recipe, optimizer: Optimizer, scheduler: Any, model: nn.Module | None) -> None:
    """See ``Recipe.apply``. All is computed before anything is changed: what is refused changes nothing."""
    given = scheduler if isinstance(scheduler, list | tuple) else [] if scheduler is None else [scheduler]
    schedulers = [member for each in given for member in family(each)]
    _check(recipe, optimizer, schedulers)
    kept = set() if model is None else _not_normalized(model, optimizer)

    def kind(parameter: Tensor) -> tuple[bool, bool]:
        """(no weight decay, learning rate as it is)"""
        return recipe.only_weights and parameter.ndim <= 1, id(parameter) in kept

    groups = optimizer.param_groups
    parts = [_parts(group, kind) for group in groups]
    _check_one_group(optimizer, [part for cut in parts for part in cut[1:]])
    origins = [i for i, cut in enumerate(parts) for _ in cut[1:]]
    factors, changed = [], []
    for new in (*(cut[0] for cut in parts), *(part for cut in parts for part in cut[1:])):
        undecayed, as_it_is = kind(new["params"][0]) if new["params"] else (False, False)
        factors.append(1.0 if as_it_is else recipe.learning_rate)
        rates = {key: new[key] * factors[-1] for key in RATES if new.get(key) is not None}
        if new.get("weight_decay") is not None:
            rates["weight_decay"] = 0.0 if undecayed else new["weight_decay"] * recipe.weight_decay
        nesterov = {"nesterov": True} if recipe.nesterov else {}
        changed.append(new | rates | nesterov | {MARK: recipe.name})
    schedule = Schedule(schedulers, factors, origins, recipe.decay_speed)
    for group, new in zip(list(groups), changed, strict=False):
        group.update(new)
    groups.extend(changed[len(groups) :])
    schedule.change()


def _check(recipe: Recipe, optimizer: Optimizer, schedulers: list[Any]) -> None:
    if recipe.muon_lr:
        raise ValueError(
            f"recipe {recipe.name} brings its optimizer: optimizer = recipe.optimizer(model), then scheduler = "
            'recipe.scheduler(optimizer, steps). For an optimizer of yours: batchnorm.RECIPES["sgd"] or "paper".'
        )
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise TypeError(
            f"apply takes an optimizer first, got a {type(optimizer).__name__}: apply(optimizer, scheduler, model), "
            "with optimizer = torch.optim.SGD(model.parameters(), ...), say."
        )
    applied = [group[MARK] for group in groups if MARK in group]
    if applied:
        raise ValueError(f"recipe {applied[0]} has been applied to this optimizer: make a new one to apply another.")
    if recipe.nesterov and not all("nesterov" in g and g["momentum"] and not g["dampening"] for g in groups):
        raise ValueError(
            "the recipe asks for Nesterov's momentum: take torch.optim.SGD with a momentum, 0.9 say, and without "
            "dampening; or leave it out, dataclasses.replace(recipe, nesterov=False)."
        )
    multiplied = (*RATES * (recipe.learning_rate != 1), *("weight_decay",) * (recipe.weight_decay != 1))
    for group in groups:
        for key in multiplied:
            if not isinstance(group.get(key, 0), Real | Tensor):
                raise ValueError(
                    f"{type(optimizer).__name__} has {key}={group[key]!r}, which a recipe cannot multiply: give it a "
                    "number, lr=0.001 say (Adafactor of transformers: with relative_step=False)."
                )
    if not schedulers and any("initial_lr" in group for group in groups):
        raise ValueError("a scheduler stands on this optimizer: pass it too, apply(optimizer, scheduler).")
    for scheduler in schedulers:
        check_schedule(scheduler, optimizer, recipe.decay_speed)


def _not_normalized(model: Any, optimizer: Optimizer) -> set[int]:
    """Parameters of the affine layers that ``insert`` left without batch normalization, by their id.

    Wrappers are looked through: DistributedDataParallel, torch.compile, also of parts.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply takes a model third, got a {type(model).__name__}: apply(optimizer, scheduler, model).")
    model = unwrapped(model)
    report = getattr(model, "batchnorm_report", None)
    mine = {id(p) for p in model.parameters()}
    if report is None or not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "apply takes the model that accelerate() returned, and an optimizer of its parameters: "
            "torch.optim.SGD(accelerated.parameters(), ...)."
        )
    modules = modules_of(model)
    named = [(row, modules[row.layer]) for row in report if row.layer in modules]
    affine = [(row, m) for row, m in named if affine_of(m) is not None or looks_affine(m)]
    if not affine and any(affine_of(m) is not None for m in modules.values()):
        raise ValueError(
            "the model's report (of from_torch, say) does not tell which layers have batch normalization: make the "
            "model by accelerate() or insert(), which tell it of a network that has it too, before from_torch; and the "
            "optimizer of its parameters. Or apply the recipe without the model, and set the rate of the classifier."
        )
    left = [m for row, m in affine if row.done == LEFT and row.layer not in report.norms]
    return {id(p) for m in left for held in (m, *_computing(m)) for p in held.parameters(recurse=held is not m)}


def _computing(layer: nn.Module) -> list[nn.Module]:
    """The parametrizations that compute the layer's weight from other parameters, which they hold."""
    return [layer.get_submodule("parametrizations")] if parametrize.is_parametrized(layer) else []


def _parts(group: dict[str, Any], kind: Callable[[Tensor], tuple[bool, bool]]) -> list[dict[str, Any]]:
    """The group in pieces whose parameters are all of a kind: those that decay, and change their rate, first."""
    names = group.get("param_names", [None] * len(group["params"]))
    parts: dict[tuple[bool, bool], list[tuple[Tensor, str | None]]] = {}
    for parameter, name in zip(group["params"], names, strict=True):
        parts.setdefault(kind(parameter), []).append((parameter, name))
    if len(parts) < 2:
        return [{**group}]
    return [{**group, **_part(parts[key], "param_names" in group)} for key in sorted(parts)]


def _part(pairs: list[tuple[Tensor, str | None]], named: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"params": [p for p, _ in pairs]}
    return found | ({"param_names": [name for _, name in pairs]} if named else {})


def _check_one_group(optimizer: Optimizer, cut_off: list[dict[str, Any]]) -> None:
    """An optimizer that keeps a group's parameters elsewhere too, as LBFGS does, would not know of its pieces."""
    if not cut_off:
        return
    kind = type(optimizer).__name__
    lists = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for name, value in vars(optimizer).items():
        if isinstance(value, list | tuple) and [id(v) for v in value] in lists and value:
            raise ValueError(
                f"the recipe cuts the parameters of {kind} into {len(lists) + len(cut_off)} groups (weights, those "
                f"that do not decay, layers without batch normalization), and {kind} takes one ({name}): use SGD "
                "or AdamW, say, or apply dataclasses.replace(recipe, only_weights=False) without model=."
            )

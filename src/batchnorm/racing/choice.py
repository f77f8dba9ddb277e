"""Who races: the contenders that were asked for, or the mode's, as this task's network and optimizer can have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from batchnorm.racing.calls import keywords_of
from batchnorm.racing.changes import has_batch_norm
from batchnorm.racing.contenders import BASELINES, CONTENDERS, NORMALIZED, PLAIN, Contender
from batchnorm.racing.errors import RaceError
from batchnorm.racing.loading import load_contender
from batchnorm.racing.optimization import as_applied
from batchnorm.racing.task import Task
from batchnorm.recipe.recipe import Recipe

Mode = Literal["quick", "default", "full"]
Asked = str | Recipe | Contender


def choose(
    task: Task, asked: Sequence[Asked] | None, mode: Mode, tune: bool, normalized: bool
) -> tuple[list[str], list[Contender], list[str]]:
    """How the contenders were named, the contenders, and who is left out, with the reason."""
    taken = keywords_of(task.model)
    left_out: list[str] = []
    if asked is None:
        table = NORMALIZED if normalized else PLAIN
        known = [*table["full" if tune else mode]]
        if tune:
            known = [name for name in known if CONTENDERS[name].tuned]
        if taken is not None:  # a model function without an activation= has no sigmoid variants
            known, unfit = (
                [name for name in known if taken.issuperset(CONTENDERS[name].network) is fits] for fits in (True, False)
            )
            left_out = [
                f"{name} (the model function takes no {', '.join(CONTENDERS[name].network)}=)" for name in unfit
            ]
        asked = known
    if isinstance(asked, str | Recipe | Contender):
        raise RaceError(f"contenders must be a list of names or Contenders (got {asked!r}).")
    chosen = [load_contender(each) for each in asked]
    names = [contender.name for contender in chosen]
    for contender in chosen:
        missing = set(contender.network) - taken if taken is not None else set()
        if missing:
            raise RaceError(
                f"contender {contender.name!r} changes {', '.join(sorted(missing))}, which the model function of task "
                f"{task.name!r} does not take (it takes {', '.join(sorted(taken or ())) or 'nothing'})."
            )
        if tune and not contender.tuned:
            raise RaceError(
                f"contender {contender.name!r} has no rate of its own: it takes a multiple of the baseline's."
            )
    if len(set(names)) < len(names):
        raise RaceError(f"a contender is named twice: {', '.join(names)}.")
    if not names:
        raise RaceError(f"no contenders. Known: {', '.join(CONTENDERS)}.")
    if not any(name in BASELINES for name in names) and not tune:
        raise RaceError(f"the baseline sets the target, so it must run: --contenders baseline,{','.join(names)}.")
    return [each if isinstance(each, str) else c.name for each, c in zip(asked, chosen, strict=True)], chosen, left_out


def as_applied_to(task: Task, contenders: list[Contender]) -> list[Contender]:
    """With the recipes that the training's optimizer can have, which are told under the results."""
    if not any(recipe.nesterov or recipe.only_weights for recipe in (contender.recipe for contender in contenders)):
        return contenders
    with torch.random.fork_rng(devices=[]):
        try:
            optimizer, _ = task.make_both(task.model(), task.steps)
        except Exception:  # said where it is trained, with the contender's name
            return contenders
    return [replace(contender, recipe=as_applied(contender.recipe, optimizer)) for contender in contenders]


def without_twins(contenders: list[Contender], rates: dict[str, float]) -> tuple[list[Contender], list[str]]:
    """Without those that would be the very run of one before: ``sgd``, where it is not tuned, of another optimizer."""
    first: dict[str, Contender] = {}
    twins = []
    for contender in contenders:
        recipe = replace(contender.recipe, name="")
        key = repr((contender.change, recipe, contender.network, contender.recalibrate, rates[contender.name]))
        if first.setdefault(key, contender) is not contender:
            twins.append(f"{contender.name} (here the same as {first[key].name})")
    return [*first.values()], twins


def has_batch_norm_of(task: Task) -> bool:
    """Whether the network of the task has batch normalization already."""
    with torch.random.fork_rng(devices=[]):
        try:
            return has_batch_norm(task.model())
        except Exception:  # said where it is trained, with the contender's name
            return False

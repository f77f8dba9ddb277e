"""Tasks and contenders by name: the built-in ones, or a user's as ``package.module:name``."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from batchnorm.common.errors import one_line
from batchnorm.common.names import NoSuchName, is_path, named
from batchnorm.racing.contenders import CONTENDERS, Contender
from batchnorm.racing.errors import RaceError
from batchnorm.racing.task import Task
from batchnorm.recipe.recipe import Recipe


def load_task(spec: str, data: str | None = None) -> Task:
    """A built-in task by name, or a user's as ``package.module:function``; the function returns a ``Task``."""
    from batchnorm.racing.tasks import TASKS

    if spec in TASKS:
        return TASKS[spec](data)
    if not is_path(spec):
        raise RaceError(
            f"unknown task {spec!r}. Known: {', '.join(TASKS)}; or a function of yours: package.module:function."
        )
    if data is not None:
        raise RaceError(f"--data is for the built-in tasks; {spec} brings its own data.")
    task = _imported("task", spec)
    if not isinstance(task, Task):
        if not callable(task):
            raise RaceError(
                f"task {spec}: {spec.partition(':')[2]} must be a batchnorm.Task, or a function that returns one (got "
                f"{type(task).__name__})."
            )
        task = _called(f"task {spec}", task)
    if not isinstance(task, Task):
        raise RaceError(f"task {spec}: the function must return a batchnorm.Task (got {type(task).__name__}).")
    return task


def load_contender(given: str | Recipe | Contender) -> Contender:
    """A contender by its name, a recipe as one (with batch normalization), or the value itself.

    ``"name@4"``: in a quarter of the baseline's steps.
    """
    if isinstance(given, Contender):
        return given
    if isinstance(given, Recipe):
        return Contender(given.name, "with-bn", recipe=given, recalibrate=2_000)
    if not isinstance(given, str):
        raise RaceError(f"a contender is a name, a batchnorm.Recipe or a batchnorm.Contender (got {given!r}).")
    if "@" in given:
        name, _, speed = given.rpartition("@")
        try:
            return replace(load_contender(name).at_speed(float(speed)), name=given, speeds={})
        except ValueError as error:
            if isinstance(error, RaceError):
                raise
            raise RaceError(f"contender {given!r}: {name}@4 is {name} in a quarter of the baseline's steps.") from None
    if given in CONTENDERS:
        return CONTENDERS[given]
    if not is_path(given):
        raise RaceError(f"unknown contender {given!r}. Known: {', '.join(CONTENDERS)}; or one of yours: module:name.")
    found = _imported("contender", given)
    if callable(found) and not isinstance(found, Contender | Recipe):
        found = _called(f"contender {given}", found)
    if not isinstance(found, Contender | Recipe):
        raise RaceError(
            f"contender {given}: {given.partition(':')[2]} must be a batchnorm.Contender or Recipe, or a function that "
            f"returns one (got {type(found).__name__})."
        )
    return load_contender(found)


def _imported(what: str, spec: str) -> Any:
    try:
        return named(spec)
    except NoSuchName as error:
        raise RaceError(f"{what} {spec}: {error}") from None
    except Exception as error:
        module = spec.partition(":")[0]
        raise RaceError(
            f"{what} {spec}: importing {module} from {os.getcwd()} or the environment failed: {one_line(error)}"
        ) from error


def _called(what: str, function: Callable[[], Any]) -> Any:
    """Every process of a race calls the function for itself: what it draws must be the same each time."""
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    try:
        return function()
    except RaceError:
        raise
    except Exception as error:
        raise RaceError(f"{what}: the function raised {one_line(error)}") from error

"""The plan of a race, decided before it starts: contenders, seeds, budgets, learning rates.

It is stored in the output directory, so that ``--resume`` continues the same race or refuses.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from batchnorm.racing import tabular, zoo
from batchnorm.racing.choice import Asked, Mode, as_applied_to, choose, has_batch_norm_of, without_twins
from batchnorm.racing.contenders import BASELINES, Contender, name_of_function
from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Run
from batchnorm.racing.loading import load_contender, load_task
from batchnorm.racing.rates import TUNED_FILE, read_tuned, stored_speeds
from batchnorm.racing.task import Task

SEEDS: dict[str, int] = {"quick": 2, "default": 8, "full": 8}
EVALUATIONS: dict[str, int] = {"quick": 10, "default": 24, "full": 24}  # of each run, ever more often towards its end
RATE_GRID = (1 / 4, 1 / 2, 1, 2, 4)  # times the task's rate: what --tune tries
TUNED_GRID = (1 / 2, 1, 2)  # times a rate that a sweep at another budget has found

CONFIG = "config.json"
IN_PROCESS = "bn.race(...)"  # the command of a race that no command can repeat
SCORED: dict[str, int | None] = {"quick": 2_500, "default": None, "full": None}  # of the test examples
LEAST = 400  # steps of a small training under --quick
DECIDED = ("decay_speed", "nesterov", "weight_decay", "only_weights")  # of a contender's recipe: by mode and task
FORMAT = 4  # of what a race leaves in its directory
BUILT_IN = (zoo.inception, zoo.mlp, tabular.deep_mlp)


@dataclass(frozen=True)
class Plan:
    """The whole race as plain values; equal plans give equal scores."""

    format: int
    task: str
    name: str
    data: str | None
    mode: Mode
    tune: bool
    rates: str | None
    seeds: int
    first_seed: int
    steps: int
    evaluations: int
    scored: int | None
    batch_size: int
    examples: int
    facts: dict[str, Any]
    sources: tuple[str, ...]
    processes: int
    torch: str
    device: str
    mixed_precision: str
    metric: str
    percent: bool
    score_falls: bool
    command: str
    learning_rates: dict[str, float]
    tuned: tuple[str, ...]
    tuned_at: dict[str, int]
    normalized: bool
    left_out: tuple[str, ...]
    specs: tuple[str, ...]
    contenders: tuple[Contender, ...]

    @property
    def baseline(self) -> str:
        """Who sets the target."""
        return next((c.name for c in self.contenders if c.name in BASELINES), self.contenders[0].name)

    def runs(self) -> list[Run]:
        """Every run, longest first, which packs best on several cores."""
        runs = [run for c in self.contenders for rate in self.rates_of(c) for run in self.runs_at(c, rate)]
        return sorted(runs, key=lambda run: (-run.steps, run.seed))

    def runs_at(self, contender: Contender, rate: float) -> list[Run]:
        """A contender's at a learning rate, one a seed."""
        steps, seeds = self.steps_of(contender), range(self.first_seed, self.first_seed + self.seeds)
        return [Run(contender, seed, rate, steps, self.evaluations, self.scored) for seed in seeds]

    def steps_of(self, contender: Contender) -> int:
        """Its budget."""
        return max(1, round(contender.budget * self.steps))

    def rates_of(self, contender: Contender) -> list[float]:
        rate = self.learning_rates[contender.name]
        grid = TUNED_GRID if contender.name in self.tuned else RATE_GRID
        return [float(f"{rate * factor:.3g}") for factor in grid] if self.tune else [rate]

    def options(self) -> dict[str, Any]:
        """The plan as the command line's options would say it."""
        same = ("task", "data", "mode", "tune", "rates", "seeds", "first_seed", "steps", "batch_size")
        return {name: getattr(self, name) for name in same} | {"contenders": [*self.specs]}

    def values(self) -> dict[str, Any]:
        """Itself as JSON has it."""
        found = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "contenders": [c.values() for c in self.contenders]
        }
        return dict(json.loads(json.dumps(found, default=name_of_function)))

    def shown(self, score: float) -> str:
        """A score as people write it."""
        return f"{score:.2%}" if self.percent else f"{score:.4g}"


def make_plan(
    task: Task,
    *,
    spec: str,
    data: str | None = None,
    contenders: Sequence[Asked] | None = None,
    mode: Mode = "default",
    seeds: int | None = None,
    first_seed: int = 0,
    steps: int | None = None,
    tune: bool = False,
    rates: str | os.PathLike[str] | None = None,
    processes: int = 1,
    command: str = "",
) -> Plan:
    """Decide everything; raises ``RaceError`` where it cannot be done as asked."""
    if mode not in SEEDS:
        raise RaceError(f"unknown mode {mode!r}. Known: {', '.join(SEEDS)}.")
    normalized = has_batch_norm_of(task)
    specs, chosen, left_out = choose(task, contenders, mode, tune, normalized)
    for name, value in (("seeds", seeds), ("steps", steps)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise RaceError(f"--{name} must be a whole number of at least 1 (got {value!r}).")
    if not (isinstance(first_seed, int) and 0 <= first_seed < 2**31):
        raise RaceError(f"--first-seed must be a whole number of at least 0 (got {first_seed!r}).")
    if task.batch_size % processes:
        raise RaceError(f"a batch of {task.batch_size} does not divide among {processes} processes.")
    budget = (
        steps
        or {
            "quick": task.quick_steps or max(min(task.steps, LEAST), task.steps // 8),
            "default": task.steps,
            "full": task.full_steps or task.steps,
        }[mode]
    )
    built_in = task.model in BUILT_IN
    stored = TUNED_FILE if built_in and (mode == "full" or not tune) else None  # a long sweep starts from a short one's
    file = Path(rates) if rates is not None else stored
    tuned, tuned_at = read_tuned(task.name, mode, file, task.batch_size) if file else ({}, {})
    if rates is not None and not tuned:
        raise RaceError(
            f"{rates} holds no learning rates for task {task.name!r} at the {mode} (or default) budget, in batches of "
            f"{task.batch_size}."
        )
    baseline = tuned.get("baseline", task.asked_rate)
    speeds = stored_speeds(task.name, mode) if built_in else {}
    chosen = [c if "@" in c.name else c.at_speed(speeds.get(c.name, c.speeds.get(mode))) for c in chosen]
    chosen = as_applied_to(task, chosen)
    learning_rates = {
        c.name: tuned[c.name] if c.tuned and c.name in tuned else float(f"{_untuned(c, baseline):.6g}") for c in chosen
    }
    if contenders is None and not tune:
        chosen, twice = without_twins(chosen, learning_rates)
        left_out += twice
        specs = [c.name for c in chosen]
    scored = SCORED[mode]
    return Plan(
        format=FORMAT,
        task=spec,
        name=task.name,
        data=data,
        mode=mode,
        tune=tune,
        rates=None if rates is None else str(rates),
        seeds=seeds or (1 if tune else SEEDS[mode]),
        first_seed=first_seed,
        steps=budget,
        evaluations=EVALUATIONS[mode],
        scored=scored if scored is not None and scored < len(task.testing) else None,
        batch_size=task.examples_per_step,
        examples=len(task.training),
        learning_rates={c.name: learning_rates[c.name] for c in chosen},
        facts=task.facts(),
        sources=(source_of(task, spec),),
        processes=processes,
        torch=version("torch"),
        device=task.device,
        mixed_precision=str(task.mixed_precision),
        metric=task.score_name,
        percent=task.scores_percent,
        score_falls=task.score_falls,
        command=command,
        tuned=tuple(c.name for c in chosen if c.tuned and c.name in tuned),
        tuned_at={c.name: tuned_at[c.name] for c in chosen if c.tuned and c.name in tuned_at},
        normalized=normalized,
        left_out=tuple(left_out),
        specs=tuple(specs),
        contenders=tuple(chosen),
    )


def _untuned(contender: Contender, baseline: float) -> float:
    """The rate of the recipe's own optimizer, or the baseline's times the recipe's factor."""
    recipe = contender.recipe
    return (recipe.muon_lr or baseline) * recipe.learning_rate


def source_of(task: Task, spec: str) -> str:
    """A digest of the files in which the task and its network are written."""
    files = {getattr(sys.modules.get(spec.partition(":")[0]), "__file__", None)} if ":" in spec else set()
    with suppress(TypeError, OSError):  # an object that is called; a class of an interactive session
        files.add(inspect.getsourcefile(getattr(task.model, "func", task.model)))
    written = [Path(file).read_bytes() for file in sorted(filter(None, files)) if Path(file).exists()]
    return hashlib.sha256(b"".join(written)).hexdigest()[:16]


def task_of(plan: Plan) -> Task:
    """The plan's task, as every process of the race loads it."""
    return as_planned(load_task(plan.task, plan.data), plan.batch_size, plan.tune)


def as_planned(task: Task, batch_size: int | None, tune: bool) -> Task:
    """A loaded task in steps of so many examples, where a number is given; for a sweep without its test examples."""
    if batch_size is not None and batch_size != task.examples_per_step:
        if batch_size > 0 and batch_size % task.accumulate:
            raise RaceError(
                f"--batch-size {batch_size} does not divide among the {task.accumulate} batches that a step "
                "accumulates."
            )
        task = task.with_batch_size(batch_size // task.accumulate)
    return task.for_tuning() if tune else task


def read_plan(directory: Path) -> Plan:
    """The plan of the race that was started in this directory."""
    stored = stored_in(directory)
    if stored.get("command") == IN_PROCESS:
        raise RaceError(
            f"{directory} holds a race of bn.race, which alone has its task: go on with the same call and "
            f"out={str(directory)!r}, resume=True."
        )
    try:
        loaded = [load_contender(spec) for spec in stored["specs"]]
        decided = [{name: row["recipe"][name] for name in DECIDED} for row in stored["contenders"]]
        lists = {name: tuple(stored[name]) for name in ("tuned", "left_out", "specs", "sources")}
        now = tuple(replace(c, recipe=replace(c.recipe, **own)) for c, own in zip(loaded, decided, strict=True))
        plan = Plan(**{**stored, **lists, "contenders": now})
    except (KeyError, TypeError):
        raise RaceError(f"{directory} holds no race of this version to resume (no readable {CONFIG}).") from None
    changed = [
        row["name"] for row, now in zip(stored["contenders"], plan.values()["contenders"], strict=True) if row != now
    ]
    if changed:
        raise RaceError(f"{directory} holds a race of another version: {', '.join(changed)} meant something else.")
    return plan


def stored_in(directory: Path) -> dict[str, Any]:
    """The values of the plan in this directory."""
    try:
        stored: dict[str, Any] = json.loads((directory / CONFIG).read_text())
        own = stored.get("format", 1)
    except (OSError, ValueError, AttributeError):
        raise RaceError(f"{directory} holds no race of this version to resume (no readable {CONFIG}).") from None
    if own != FORMAT:
        raise RaceError(
            f"{directory} holds a race of another version of batchnorm (format {own}, this is {FORMAT}), whose rules "
            "were others: race again."
        )
    return stored


def check_same(plan: Plan, task: Task, processes: int) -> None:
    """Refuse to go on with a race on another task, or in a way that gives other numbers."""
    now = task.facts()
    different = [name for name, value in plan.facts.items() if now.get(name) != value]
    if different:
        changed = "; ".join(
            f"other {name}" if name.endswith(" data") else f"{name} was {plan.facts[name]}, is {now.get(name)}"
            for name in different
        )
        seed = " A task function must give the same data each time it is called: seed what it draws."
        raise RaceError(
            f"task {plan.task} is not what it was when the race was planned: {changed}."
            + (seed if any(name.endswith(" data") for name in different) else "")
        )
    same = {"device": task.device, "mixed_precision": str(task.mixed_precision), "processes": processes}
    for name, value in (same | {"torch": version("torch")}).items():
        if getattr(plan, name) != value:
            raise RaceError(f"the race was started with {name} = {getattr(plan, name)}, and this is {value}.")

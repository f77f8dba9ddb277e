"""One run from its beginning, or its checkpoint, to its end, as a stream of events."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from batchnorm.common.errors import one_line
from batchnorm.common.files import replacing
from batchnorm.population.estimate import NoStatistics
from batchnorm.racing.contenders import BASELINES
from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Diverged, Evaluation, Event, Progress, Resumed, Run, Stopped
from batchnorm.racing.task import Task
from batchnorm.racing.trainer import Trainer

REPORTS = 10  # of a run's progress, between two evaluations at most


def train(task: Task, run: Run, checkpoint: Path | None = None) -> Iterator[Event]:
    """Train to the end of the budget, from the checkpoint if there is one.

    The checkpoint is replaced as a whole after each evaluation, so a killed run loses less than one interval,
    and goes on to the very same numbers.
    """
    with closing(Trainer(task, run)) as trainer:
        yield from _events(trainer, checkpoint)


def _events(trainer: Trainer, checkpoint: Path | None) -> Iterator[Event]:
    task, run = trainer.task, trainer.run
    curve: list[Evaluation] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=False)  # ours; optimizers keep what they like
        try:
            trainer.load_state_dict(state["trainer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise RaceError(
                f"the run in {checkpoint} is of another network, optimizer or schedule than the task has now "
                f"({one_line(error)}): bring that back, or race again in a new directory."
            ) from error
        curve = [Evaluation(**row) for row in state["curve"]]
        yield Resumed(trainer.step_count, tuple(curve))
        if _out_of_patience(run, task, curve):  # ended before it could be said
            yield Stopped(trainer.step_count)
            return
    report_every = max(1, run.steps // run.evaluations // REPORTS)
    for start, end in pairwise((0, *run.points)):
        if curve and end <= trainer.step_count:
            continue
        trainer.seed_noise()
        losses: list[float] = []
        started = time.perf_counter()
        for _ in range(end - start):
            losses.append(trainer.step())
            if not math.isfinite(losses[-1]):
                yield Diverged(trainer.step_count)
                return
            if trainer.step_count % report_every == 0:
                recent = losses[-report_every:]
                yield Progress(trainer.step_count, sum(recent) / len(recent))
        trained = time.perf_counter()
        try:
            score = trainer.evaluate(run.scored)
        except NoStatistics:  # of the layers' inputs, before the loss shows it; all ranks find the same
            yield Diverged(trainer.step_count)
            return
        if not math.isfinite(score):
            yield Diverged(trainer.step_count, task.score_name)
            return
        if trainer.step_count:  # of what has been trained
            trainer.schedule.after_evaluation(score)
        before = (curve[-1].training_seconds, curve[-1].evaluation_seconds) if curve else (0.0, 0.0)
        curve.append(
            Evaluation(
                trainer.step_count,
                trainer.epochs,
                sum(losses) / len(losses) if losses else None,
                score,
                trainer.last_rate / trainer.highest_rate if trainer.highest_rate else 0.0,
                before[0] + trained - started,
                before[1] + time.perf_counter() - trained,
            )
        )
        if checkpoint is not None and trainer.rank == 0:
            save(checkpoint, {"trainer": trainer.state_dict(), "curve": [asdict(row) for row in curve]})
        yield curve[-1]
        if _out_of_patience(run, task, curve):
            yield Stopped(trainer.step_count)
            return


def _out_of_patience(run: Run, task: Task, curve: list[Evaluation]) -> bool:
    """Whether the baseline has not become better for as many evaluations as its task waits."""
    if run.contender.name not in BASELINES or task.patience is None or len(curve) <= task.patience:
        return False
    scores = [-point.score if task.score_falls else point.score for point in curve]
    return max(scores[-task.patience :]) <= max(scores[: -task.patience])


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    with replacing(path) as part:
        torch.save(state, part)

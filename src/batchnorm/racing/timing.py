"""Seconds per step: contenders take turns, alone on the machine, so that all meet the same noise."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from statistics import median, quantiles

from batchnorm.population.estimate import NoStatistics
from batchnorm.racing.events import Run
from batchnorm.racing.task import Task
from batchnorm.racing.trainer import Trainer

WARM_UP = 10


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step (median and quartiles), and of preparing the network for inference once."""

    median: float
    quartiles: Sequence[float]
    preparation: float
    steps: int


def time_steps(task: Task, runs: Sequence[Run], *, rounds: int, steps: int) -> dict[str, StepTime]:
    """Time ``rounds`` turns of ``steps`` steps per contender, interleaved; one run per contender is given.

    There are fewer where the runs themselves are short, so that timing does not take longer than training.
    """
    share = sum(run.steps for run in runs) // len(runs)
    warm_up, steps = min(WARM_UP, share // 8), max(1, min(steps, share // 8))
    rounds = max(2, min(rounds, (share - warm_up) // steps))  # quartiles need two
    trainers = {run.contender.name: Trainer(task, run) for run in runs}
    first = next(iter(trainers.values()))
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    with closing(first):
        for trainer in trainers.values():
            trainer.stream = first.stream  # the others' reading processes would run beside what is timed
            for _ in range(warm_up):
                trainer.step()
        for _ in range(rounds):
            for name, trainer in trainers.items():
                for _ in range(steps):
                    started = time.perf_counter()
                    trainer.step()
                    seconds[name].append(time.perf_counter() - started)
    return {name: _summary(seconds[name], trainer) for name, trainer in trainers.items()}


def _summary(seconds: list[float], trainer: Trainer) -> StepTime:
    preparations = []
    for _ in range(4):  # a run has done it as often
        started = time.perf_counter()
        with suppress(NoStatistics), warnings.catch_warnings():  # a contender that diverged takes as long
            warnings.simplefilter("ignore")
            trainer.prepare()
        preparations.append(time.perf_counter() - started)
    low, mid, high = quantiles(seconds, n=4)
    return StepTime(mid, (low, high), median(preparations[1:] or preparations), len(seconds))  # the first one warms up

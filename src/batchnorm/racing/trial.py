"""A step and a checkpoint of every contender before any long work: mistakes in a task show here, in one line."""

from __future__ import annotations

import io
import math
import warnings
from contextlib import closing, suppress
from dataclasses import replace

import torch

from batchnorm.common.errors import one_line
from batchnorm.population.batches import placed
from batchnorm.racing.errors import RaceError, UnreadableFile
from batchnorm.racing.events import Run
from batchnorm.racing.examples import Loader, reads_the_same
from batchnorm.racing.plan import Plan
from batchnorm.racing.task import Task
from batchnorm.racing.trainer import Trainer


def try_contenders(task: Task, plan: Plan) -> None:
    """A step, two scored examples and a checkpoint of each contender, before any long work: mistakes show here."""
    for contender in plan.contenders:
        brief = replace(contender, recalibrate=min(contender.recalibrate, task.batch_size))
        run = Run(brief, 0, plan.rates_of(contender)[0], plan.steps_of(contender), plan.evaluations)
        try:
            with closing(Trainer(task, run)) as trainer:
                untrained = _score(trainer)
                trainer.step()
                _check_last_batch(trainer)
                if _score(trainer) is None:
                    trainer.evaluate(run.scored)  # raises, with the metric's own words
                if untrained is not None and not math.isfinite(untrained):
                    raise RaceError(f"its {plan.metric} is {untrained} of the untrained network: it must be finite.")
                _check_checkpoint(trainer)
        except UnreadableFile:
            raise
        except Exception as error:
            said = str(error) if isinstance(error, RaceError) else one_line(error)
            raise RaceError(f"task {task.name!r} does not run as contender {contender.name!r}: {said}") from error
    if not reads_the_same(task.training):
        warnings.warn(
            f"task {task.name!r}: its training examples, read again from the same seed, are others, so that contenders "
            "do not see the same ones: they, or their sampler, draw from a generator of their own. Draw from torch's, "
            "Python's or NumPy's global ones, which the race seeds.",
            stacklevel=2,
        )
    with torch.random.fork_rng(devices=[]):  # after the ones above, whose words are better where it cannot be made
        one, other = (task.model(**plan.contenders[0].network) for _ in range(2))
    trained = {id(p) for p in one.parameters() if p.requires_grad}
    if any(id(p) in trained for p in other.parameters()):  # one run would go on where another ended
        raise RaceError(f"task {task.name!r}: model must return a new network each time, and returned the same twice.")


def _score(trainer: Trainer) -> float | None:
    """Of two test examples, or where a metric is none of them (it wants all classes, say) of all; None: it raises."""
    for most in (2, trainer.run.scored):
        with suppress(Exception):
            score = trainer.evaluate(most)
            if math.isfinite(score) or most != 2:
                return score
    return None


def _check_last_batch(trainer: Trainer) -> None:
    """Of one example there are no batch statistics, which some layers need: now, and not at the end of an epoch."""
    batch = trainer.examples.last_of_one() if isinstance(trainer.examples, Loader) else None
    if batch is None:
        return
    try:
        trainer.network(placed(batch, trainer.device))
    except ValueError as error:
        raise RaceError(
            f"the last batch of each epoch has one example: {one_line(error)}. Give the DataLoader drop_last=True, or "
            "another batch_size."
        ) from error


def _check_checkpoint(trainer: Trainer) -> None:
    """Save and load the state, as after each evaluation and when a run resumes."""
    file = io.BytesIO()
    try:
        torch.save(trainer.state_dict(), file)
        file.seek(0)
        trainer.load_state_dict(torch.load(file, weights_only=False))
    except Exception as error:
        raise RaceError(
            f"its state cannot be saved and read again, as a race does after each evaluation ({one_line(error)}): what "
            "model, optimizer and scheduler give as state_dict() must be picklable, and load_state_dict() take it."
        ) from error

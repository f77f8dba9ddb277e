"""One contender trained once: steps, evaluations, checkpoints. Runs alone or as one rank of a torchrun group.

Comes from: a ``Task`` and a ``Contender``. Goes to: ``pool.py`` and ``runner.py``, as a stream of events.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchnorm.population import recalibrate
from batchnorm.population.estimate import NotFinite
from batchnorm.racing.contenders import Contender
from batchnorm.racing.task import Task
from batchnorm.recipe.accelerate import accelerate, reduce_dropout

EVALUATION_BATCH = 250  # examples; small enough for a core's cache, so faster than large ones on a CPU
MOMENTUM = 0.9
WARM_UP = 0.3  # of a run's budget: where its learning rate has risen linearly to the initial one

# What follows the warm-up: learning rate over initial rate, from the share of the run's budget that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: (1 - done) / (1 - WARM_UP),
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "exponential": lambda done: 0.03**done,
    "constant": lambda done: 1.0,
}


@dataclass(frozen=True)
class Run:
    """One training run: who, from which seed, at which rate and for how long (in steps)."""

    contender: Contender
    seed: int
    learning_rate: float
    baseline_steps: int
    interval: int

    @property
    def steps(self) -> int:
        """The contender's budget, in whole evaluation intervals."""
        return max(1, round(self.contender.budget * self.baseline_steps / self.interval)) * self.interval

    @property
    def name(self) -> str:
        return f"{self.contender.name}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``loss`` is the mean since the last event."""

    step: int
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """One point of a run's curve; seconds are wall-clock, training and evaluation apart."""

    step: int
    epochs: float
    loss: float
    score: float
    training_seconds: float
    evaluation_seconds: float


@dataclass(frozen=True)
class Diverged:
    """The loss stopped being finite at this step; the run ends."""

    step: int


@dataclass(frozen=True)
class Resumed:
    """The run goes on from a checkpoint, with the evaluations made before."""

    step: int
    curve: tuple[Evaluation, ...]


Event = Progress | Evaluation | Diverged | Resumed


class Trainer:
    """The network of one run, its optimizer and its average; knows the next step, not where the run ends."""

    def __init__(self, task: Task, run: Run) -> None:
        self.task, self.run, self.step_count = task, run, 0
        contender = run.contender
        torch.manual_seed(run.seed)
        self.model = network_of(task, contender)
        self.network = (
            DistributedDataParallel(self.model, broadcast_buffers=False) if dist.is_initialized() else self.model
        )
        recipe = replace(contender.recipe, only_weights=True)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), run.learning_rate / recipe.learning_rate, MOMENTUM, weight_decay=task.weight_decay,
            fused=True,
        )  # fmt: skip
        recipe.apply(self.optimizer, model=self.model if contender.batch_norm else None)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(contender.average))
            if contender.average
            else None
        )
        self._order = (-1, torch.empty(0, dtype=torch.int64))
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def step(self) -> float:
        """One step of SGD on this rank's share of the next batch; the loss over the whole batch."""
        run = self.run
        done = min(1.0, self.step_count / run.steps)  # timing goes past a short budget
        warm_up = min(1.0, (self.step_count + 1) / (WARM_UP * run.steps))
        share = min(warm_up, SCHEDULES[run.contender.schedule](done))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        inputs, targets = self.task.train[self._batch()[self.rank :: self.ranks]]
        self.network.train()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.network(inputs), targets)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step_count += 1
        loss = loss.detach()
        if self.ranks > 1:
            dist.all_reduce(loss)
        return loss.item() / self.ranks

    def evaluate(self) -> float:
        """The task's metric over all test examples, of the averaged network where there is one."""
        network: nn.Module = self.model if self.average is None else self.average.module
        self.prepare(network)
        network.eval()
        total, test = 0.0, self.task.test
        with torch.no_grad():
            for indices in torch.arange(len(test)).split(EVALUATION_BATCH):
                inputs, targets = test[indices]
                total += float(self.task.metric(network(inputs), targets)) * len(indices)
        return round(total / len(test), 6)  # sums of float32 means: equal counts must give equal scores

    def prepare(self, network: nn.Module) -> None:
        """Population statistics, where the contender asks for them: what a user would do once, at the end."""
        if self.run.contender.recalibrate:
            examples = self._epoch(0)[: self.run.contender.recalibrate]
            batches = examples.chunk(math.ceil(len(examples) / EVALUATION_BATCH))  # no small last one
            recalibrate(network, (self.task.train[indices][0] for indices in batches))

    def _batch(self) -> Tensor:
        """Indices of the next batch: the same for every contender with this seed, reshuffled each epoch."""
        per_epoch = len(self.task.train) // self.task.batch_size
        epoch, position = divmod(self.step_count, per_epoch)
        return self._epoch(epoch)[position * self.task.batch_size :][: self.task.batch_size]

    def _epoch(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_seed(self.run.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.task.train), generator=generator))
        return self._order[1]

    def seed_noise(self) -> None:
        """Dropout's random numbers depend on seed, rank and step alone, so a resumed run draws the same ones."""
        torch.manual_seed(_seed(self.run.seed * self.ranks + self.rank, self.step_count))

    def state_dict(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return {
            "step": self.step_count,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_count = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def network_of(task: Task, contender: Contender) -> nn.Module:
    """The task's network, from torch's random numbers, with what the contender changes of it."""
    model = task.model(**contender.network)
    example = (task.train[torch.arange(2)][0],)
    if contender.batch_norm:
        return accelerate(model, example, contender.recipe)
    reduce_dropout(model, contender.recipe.dropout, example)
    return model


def _seed(stream: int, position: int) -> int:
    """A seed of its own for each pair; torch's generator on the CPU looks at the low 32 bits alone."""
    return (stream * 1_000_003 + position) % 2**32


def train(task: Task, run: Run, checkpoint: Path | None = None) -> Iterator[Event]:
    """Train to the end of the budget, from the checkpoint if there is one.

    The checkpoint is replaced as a whole after each evaluation, so a killed run loses less than one interval,
    and goes on to the very same numbers.
    """
    trainer = Trainer(task, run)
    curve: list[Evaluation] = []
    training_seconds = evaluation_seconds = 0.0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        trainer.load_state_dict(state["trainer"])
        curve = [Evaluation(**row) for row in state["curve"]]
        training_seconds, evaluation_seconds = curve[-1].training_seconds, curve[-1].evaluation_seconds
        yield Resumed(trainer.step_count, tuple(curve))
    report_every = max(1, run.interval // 10)
    while trainer.step_count < run.steps:
        trainer.seed_noise()
        losses: list[float] = []
        started = time.perf_counter()
        for _ in range(run.interval):
            losses.append(trainer.step())
            if not math.isfinite(losses[-1]):
                yield Diverged(trainer.step_count)
                return
            if trainer.step_count % report_every == 0:
                yield Progress(trainer.step_count, sum(losses[-report_every:]) / report_every)
        trained = time.perf_counter()
        try:
            score = trainer.evaluate() if trainer.rank == 0 else math.nan
        except NotFinite:  # of the layers' inputs, before the loss shows it
            if trainer.ranks > 1:  # the others know nothing of it and would wait
                raise
            yield Diverged(trainer.step_count)
            return
        training_seconds += trained - started
        evaluation_seconds += time.perf_counter() - trained
        epochs = trainer.step_count * task.batch_size / len(task.train)
        curve.append(
            Evaluation(
                trainer.step_count,
                epochs,
                sum(losses) / len(losses),
                score,
                training_seconds,
                evaluation_seconds,
            )
        )
        if checkpoint is not None and trainer.rank == 0:
            save(checkpoint, {"trainer": trainer.state_dict(), "curve": [asdict(row) for row in curve]})
        yield curve[-1]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    torch.save(state, part)
    part.replace(path)

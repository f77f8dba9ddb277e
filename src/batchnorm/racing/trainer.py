"""One contender trained once: steps, evaluations, checkpoints. Runs alone or as one rank of a torchrun group.

Comes from: a ``Task`` and a ``Contender``. Goes to: ``pool.py`` and ``runner.py``, as a stream of events.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree

from batchnorm.population import recalibrate
from batchnorm.population.estimate import NoStatistics
from batchnorm.racing.contenders import Contender
from batchnorm.racing.reading import Order, read, seed_of
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
        self.device = device_of(task)
        self.model = network_of(task, contender).to(self.device)
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
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.order = Order(run.seed, len(task.train), task.batch_size)
        self.stream = self._stream()

    def step(self) -> float:
        """One step of SGD on this rank's share of the next batch; the loss over the whole batch."""
        run = self.run
        done = min(1.0, self.step_count / run.steps)  # timing goes past a short budget
        warm_up = min(1.0, (self.step_count + 1) / (WARM_UP * run.steps))
        share = min(warm_up, SCHEDULES[run.contender.schedule](done))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        inputs, targets = self._placed(next(self.stream))
        self.network.train()
        self.optimizer.zero_grad()
        with self._precision():
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

    def evaluate(self, most: int | None = None) -> float:
        """The task's metric over the test examples (``most`` of them), of the averaged network where there is one.

        Each rank scores its share; all of them must call this, and get the same.
        """
        network: nn.Module = self.model if self.average is None else self.average.module
        if self.ranks > 1:  # what layers keep of their rank's examples: rank 0's, as checkpoints hold it
            for buffer in filter(Tensor.is_contiguous, network.buffers()):  # others (expanded) are constants
                dist.broadcast(buffer, 0)
        self.prepare(network)
        network.eval()
        indices = torch.arange(min(most or len(self.task.test), len(self.task.test)))
        total = 0.0
        batches = [part for part in self._share(indices).split(EVALUATION_BATCH) if len(part)]
        with torch.no_grad(), self._precision():
            for part, batch in zip(batches, self._read(self.task.test, batches), strict=True):
                inputs, targets = self._placed(batch)
                total += float(self.task.metric(network(inputs), targets)) * len(part)
        if self.ranks > 1:
            totals = torch.tensor(total, dtype=torch.float64, device=self.device)
            dist.all_reduce(totals)
            total = totals.item()
        return round(total / len(indices), 6)  # sums of float32 means: equal counts must give equal scores

    def prepare(self, network: nn.Module) -> None:
        """Population statistics, where the contender asks for them: what a user would do once, at the end."""
        if self.run.contender.recalibrate:
            examples = self._share(self.order.epoch(0)[: self.run.contender.recalibrate])
            batches = examples.chunk(math.ceil(len(examples) / EVALUATION_BATCH))  # no small last one
            everyone = dist.group.WORLD if self.ranks > 1 else None
            with self._precision():
                inputs = (self._placed(batch)[0] for batch in self._read(self.task.train, batches))
                recalibrate(network, inputs, process_group=everyone)

    def close(self) -> None:
        """End the processes that read ahead."""
        self.stream.close()

    def _stream(self) -> Generator[Any]:
        """This rank's share of every batch from the next one on."""
        return self._read(self.task.train, self.order.shares(self.step_count, self.rank, self.ranks))

    def _read(self, examples: Any, batches: Iterable[Tensor]) -> Generator[Any]:
        return read(examples, batches, readers=self.task.readers, pin=self.device.type == "cuda")

    def _share(self, indices: Tensor) -> Tensor:
        return indices[self.rank :: self.ranks]

    def _placed(self, batch: Any) -> Any:
        """Inputs and targets where the network is: tensors, or lists, tuples and dicts of them."""
        return _pytree.tree_map_only(Tensor, lambda t: t.to(self.device, non_blocking=True), batch)

    def _precision(self) -> AbstractContextManager[Any]:
        """Forward and loss in bfloat16, where the task asks for it and torch finds it harmless; nothing else."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.task.mixed_precision)

    def seed_noise(self) -> None:
        """Dropout's random numbers depend on seed, rank and step alone, so a resumed run draws the same ones."""
        torch.manual_seed(seed_of(self.run.seed * self.ranks + self.rank, self.step_count))

    def state_dict(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"step": self.step_count, "model": model, "optimizer": optimizer, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.step_count = state["step"]
        self.stream = self._stream()
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


def device_of(task: Task) -> torch.device:
    """Where this process trains; each process of a machine has a GPU of its own."""
    if task.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


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
    training_seconds = evaluation_seconds = 0.0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
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
            score = trainer.evaluate()
        except NoStatistics:  # of the layers' inputs, before the loss shows it; all ranks find the same
            yield Diverged(trainer.step_count)
            return
        training_seconds += trained - started
        evaluation_seconds += time.perf_counter() - trained
        epochs = trainer.step_count * task.batch_size / len(task.train)
        loss = sum(losses) / len(losses)
        curve.append(Evaluation(trainer.step_count, epochs, loss, score, training_seconds, evaluation_seconds))
        if checkpoint is not None and trainer.rank == 0:
            save(checkpoint, {"trainer": trainer.state_dict(), "curve": [asdict(row) for row in curve]})
        yield curve[-1]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    torch.save(state, part)
    part.replace(path)

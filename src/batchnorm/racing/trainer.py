"""One contender trained once: steps, evaluations, checkpoints. Runs alone or as one rank of a torchrun group."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from batchnorm.population import recalibrate
from batchnorm.population.batches import placed
from batchnorm.population.estimate import NoStatistics
from batchnorm.racing.changes import CHANGES
from batchnorm.racing.contenders import Contender
from batchnorm.racing.errors import RaceError
from batchnorm.racing.events import Run
from batchnorm.racing.examples import Examples, Loader
from batchnorm.racing.metrics import count_of
from batchnorm.racing.optimization import prepared
from batchnorm.racing.reading import Order, Wanted, read, stream
from batchnorm.racing.seeds import seed_all, seed_of
from batchnorm.racing.task import Task
from batchnorm.recipe.accelerate import reduce_dropout

EVALUATION_BATCH = 250  # examples; small enough for a core's cache, so faster than large ones on a CPU

STATEFUL = ("loop", "model", "optimizer", "schedule", "scaler")


class Trainer:
    """The network of one run, its optimizer and schedule; knows the next step, not where the run ends."""

    def __init__(self, task: Task, run: Run) -> None:
        self.task, self.run, self.step_count = task, run, 0
        seed_all(run.seed)
        self.device = device_of(task)
        self.model = network_of(task, run.contender).to(self.device)
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        step = _Step(self.model, task)
        self.network: nn.Module = DistributedDataParallel(step, broadcast_buffers=False) if self.ranks > 1 else step
        self.optimizer, self.schedule = prepared(task, run.contender, self.model, run.steps, run.learning_rate)
        self.loop = task.loop(self.model, self.optimizer, self.schedule, run.steps)
        half = task.mixed_precision is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.examples = task.training
        if not isinstance(self.examples, Loader):
            self.order = Order(run.seed, len(self.examples), task.batch_size)
        elif self.ranks > 1:
            raise RaceError(f"task {task.name!r}: under torchrun train must be a dataset, which ranks share out.")
        self.batches_per_epoch = task.batches_per_epoch
        self.stream = self._stream()
        self.highest_rate = 0.0
        self.last_rate = 0.0

    def step(self) -> float:
        """One step of the optimizer on this rank's share of the next batch (or batches); the loss over all of it.

        NaN where the network is no longer finite.
        """
        return self._or_nan(self._step)

    def _or_nan(self, act: Callable[..., float], *given: Any) -> float:
        """What ``act`` gives; some networks, losses and optimizers raise once their values are not finite."""
        try:
            return act(*given)
        except NoStatistics:  # which tells the same already, on all ranks
            raise
        except Exception:
            if self._is_finite():
                raise
            return math.nan

    def _is_finite(self) -> bool:
        """Weights, gradients, buffers, and what it makes of two examples; what torch cannot tell counts as finite."""
        held: list[Any] = [*self.model.parameters(), *self.model.buffers()]
        held += [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.ranks == 1:  # of several, layers may wait for each other
            with suppress(Exception), torch.no_grad():
                batch = placed(self.task.first_batch(), self.device)
                held += _pytree.tree_leaves(self.task.output(self.model, batch))
        for value in held:
            with suppress(Exception):  # of sparse gradients and lazy parameters; the first error is the one to show
                if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                    return False
        return True

    def _step(self) -> float:
        task, loop = self.task, self.loop
        first, end = task.batches_until(self.step_count), task.batches_until(self.step_count + 1)
        self.last_rate = max(float(group["lr"]) for group in self.optimizer.param_groups)  # of tensors too
        self.highest_rate = max(self.highest_rate, self.last_rate)
        loop.to_train()
        loop.before_forward(self.optimizer)
        total = torch.zeros((), device=self.device)
        for number in range(first, end):
            if number > first:
                loop.after_batch()
            batch = loop.before_batch(placed(next(self.stream), self.device), number)
            with self._precision():
                loss = self.network(batch)
            if number == first:
                loop.before_backward(self.optimizer)
            self.scaler.scale(loss / task.accumulate if task.accumulate > 1 else loss).backward()
            loop.after_backward()
            total += loss.detach() / (end - first)
        self.scaler.unscale_(self.optimizer)
        loop.before_step(self.optimizer)
        if task.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(loop.to_clip(self.optimizer), task.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step_count += 1
        if self.step_count <= self.run.steps:  # timed beyond its end, where some schedulers refuse
            self.schedule.after_step(self.step_count)
        loop.after_batch()
        if self.ranks > 1:
            dist.all_reduce(total)
        return total.item() / self.ranks

    @property
    def epochs(self) -> float:
        """Of the training's batches, until now."""
        return self.task.batches_until(self.step_count) / self.batches_per_epoch

    def evaluate(self, most: int | None = None) -> float:
        """The task's metric over the test examples (``most`` of them).

        Each rank scores its share; all of them must call this, and get the same. NaN where the network is no longer
        finite.
        """
        return self._or_nan(self._evaluate, most)

    def _evaluate(self, most: int | None) -> float:
        if self.ranks > 1:  # what layers keep of their rank's examples: rank 0's, as checkpoints hold it
            for buffer in filter(Tensor.is_contiguous, self.model.buffers()):  # others (expanded) are constants
                dist.broadcast(buffer, 0)
        self.prepare()
        return self.score(most)

    def score(self, most: int | None = None) -> float:
        """The metric with the statistics that there are."""
        self.loop.to_eval()
        with torch.no_grad(), self._precision():
            batches = (placed(batch, self.device) for batch in self._test_batches(most))
            metric = self.task.measured(self.model, batches)
        value = metric.compute()
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise RaceError(
                f"task {self.task.name!r}: its metric must give one number (got {type(value).__name__})."
            ) from None

    def prepare(self) -> None:
        """Population statistics, where the contender asks for them: what a user would do once, at the end."""
        count = self.run.contender.recalibrate
        if not count:
            return
        everyone = dist.group.WORLD if self.ranks > 1 else None
        with self._precision():
            batches = (placed(batch, self.device) for batch in self._population(count))
            recalibrate(self.model, batches, forward=self.task.output, process_group=everyone)

    def _population(self, count: int) -> Iterator[Any]:
        """Training batches for the population statistics."""
        if isinstance(self.examples, Loader):
            yield from _until(self.examples.epoch(self.run.seed, 0), count)
            return
        indices = self._share(self.order.epoch(0)[:count])
        parts = indices.chunk(math.ceil(len(indices) / EVALUATION_BATCH))  # no small last one
        yield from self._read(self.examples, [((self.run.seed, 0), part) for part in parts])

    def _test_batches(self, most: int | None) -> Iterator[Any]:
        examples = self.task.testing
        if isinstance(examples, Loader):
            yield from _until(examples.epoch(0, 0, most), most)
            return
        count = min(most or len(examples), len(examples))
        indices = self._share(torch.arange(count) * len(examples) // count)  # all over: they may be sorted by class
        yield from self._read(examples, [((0, 0), part) for part in indices.split(EVALUATION_BATCH) if len(part)])

    def close(self) -> None:
        """End the processes that read ahead."""
        self.stream.close()

    def _stream(self) -> Generator[Any]:
        """This rank's share of every batch from the next one on."""
        number = self.task.batches_until(self.step_count)
        if isinstance(self.examples, Loader):
            return stream(self.examples, self.run.seed, number)
        return self._read(self.examples, self.order.shares(number, self.rank, self.ranks))

    def _read(self, examples: Examples, batches: Iterable[Wanted]) -> Generator[Any]:
        return read(examples, batches, readers=self.task.readers, pin=self.device.type == "cuda")

    def _share(self, indices: Tensor) -> Tensor:
        return indices[self.rank :: self.ranks]

    def _precision(self) -> AbstractContextManager[Any]:
        """Forward and loss in 16 bits, where the task asks for it and torch finds it harmless; nothing else."""
        asked = self.task.mixed_precision
        dtype = asked if isinstance(asked, torch.dtype) else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=bool(asked))

    def seed_noise(self) -> None:
        """Dropout's random numbers depend on seed, rank and step alone, so a resumed run draws the same ones."""
        seed_all(seed_of(self.run.seed * self.ranks + self.rank, self.step_count))

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in STATEFUL}
        return {"step": self.step_count, "highest_rate": self.highest_rate, **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.step_count, self.highest_rate = state["step"], state["highest_rate"]
        self.stream = self._stream()
        for name in STATEFUL:
            if name in state:  # checkpoints of former versions have no loop
                getattr(self, name).load_state_dict(state[name])


def _until(batches: Iterator[Any], count: int | None) -> Iterator[Any]:
    """The first batches that hold so many examples, all where there are fewer; None: all."""
    seen = 0
    for batch in batches:
        yield batch
        seen += count_of(batch)
        if count is not None and seen >= count:
            return


class _Step(nn.Module):
    """Forward and loss as one module, so that data-parallel training sees the network run whoever calls it."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Any) -> Tensor:
        return self.task.training_loss(self.model, batch)


def network_of(task: Task, contender: Contender) -> nn.Module:
    """The task's network, from torch's random numbers, with what the contender changes of it."""
    model = task.model(**contender.network)
    example = task.example(model)
    reduce_dropout(model, contender.recipe.dropout, example)
    change = CHANGES[contender.change].make if isinstance(contender.change, str) else contender.change
    return change(model, example)


def device_of(task: Task) -> torch.device:
    """The device of this process; each process of a machine has a GPU of its own."""
    if task.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device

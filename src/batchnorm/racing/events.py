"""A training run, and what happens in it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from batchnorm.racing.contenders import Contender


@dataclass(frozen=True)
class Run:
    """One training run: who, from which seed, at which rate and for how long (in steps), and how it is scored.

    ``scored``: so many of the test examples, all over them; None: all.
    """

    contender: Contender
    seed: int
    learning_rate: float
    steps: int
    evaluations: int
    scored: int | None = None

    @property
    def name(self) -> str:
        """Of its files: what a file's name cannot have is written as in a URL."""
        return f"{quote(self.contender.name, safe='@ ')}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def points(self) -> list[int]:
        """The steps after which it is evaluated: before the first, and ever more often towards the end."""
        n = self.evaluations
        return sorted({0, *(max(1, round(self.steps * (1 - (1 - k / n) ** 1.5))) for k in range(1, n + 1))})


@dataclass(frozen=True)
class Progress:
    """The progress of a run: ``loss`` is the mean since the last event."""

    step: int
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """One point of a run's curve; seconds are wall-clock, training and evaluation apart.

    ``loss``: the mean since the last one, None before the first step; ``rate``: the last step's learning rate, over the
    highest so far.
    """

    step: int
    epochs: float
    loss: float | None
    score: float
    rate: float
    training_seconds: float
    evaluation_seconds: float


@dataclass(frozen=True)
class Diverged:
    """The loss, or what is scored, was not finite at this step; the run ends."""

    step: int
    what: str = "loss"


@dataclass(frozen=True)
class Stopped:
    """The baseline did not get better for as many evaluations as its task has patience; the run ends."""

    step: int


@dataclass(frozen=True)
class Resumed:
    """The run goes on from a checkpoint, with the evaluations made before."""

    step: int
    curve: tuple[Evaluation, ...]


Event = Progress | Evaluation | Diverged | Stopped | Resumed

"""Recipes: what to change in training once the network has batch normalization. A new recipe is one row.

Goes to: ``accelerate.py``, which changes the network; ``apply.py``, which changes optimizer and scheduler; the race.
Source of "paper": Ioffe & Szegedy 2015, Section 4.2.1, but for what its images and its network alone have (photometric
distortions, local response normalization); that gamma, beta and biases do not decay is today's practice. Source of
"fast": the race (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from batchnorm.recipe.apply import apply

Scheduler = LRScheduler | ReduceLROnPlateau


@dataclass(frozen=True)
class Recipe:
    """Changes to training, as factors on what there is. Its defaults change nothing; ``print`` it to read it.

    To edit one: ``dataclasses.replace(bn.RECIPES["paper"], learning_rate=30)``.

    Args:
        name: for prints.
        learning_rate: times the optimizer's learning rates; see ``apply``.
        weight_decay: times the optimizer's weight decay.
        only_weights: no weight decay on gamma, beta and biases (parameters of one dimension or none).
        decay_speed: the scheduler's time runs so many times faster; train for as many times fewer steps.
        nesterov: Nesterov's momentum; of SGD with momentum.
        dropout: times the model's dropout probabilities; 0 removes dropout.
        shuffle: the training examples are to be reshuffled each epoch. For you to do.

    Raises:
        ValueError: a factor that is not positive and finite; dropout that is not between 0 and 1.

    Example:
        >>> print(RECIPES["paper"])
        recipe paper
        learning rate x5                                            apply(optimizer)
        weight decay x0.2, none on gamma, beta and biases           apply(optimizer)
        learning-rate decay 6 times faster, for 1/6 of the steps    apply(optimizer, scheduler)
        no dropout                                                  accelerate
        training examples reshuffled each epoch                     you: DataLoader(..., shuffle=True)

    Source: Ioffe & Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167, Section 4.2.1.
    """

    name: str = "mine"
    learning_rate: float = 1.0
    weight_decay: float = 1.0
    only_weights: bool = False
    decay_speed: float = 1.0
    nesterov: bool = False
    dropout: float = 1.0
    shuffle: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                raise ValueError(f"Recipe: {field.name} is a factor, so a finite number of at least 0 (got {value!r}).")
        for name in ("learning_rate", "decay_speed"):
            if not getattr(self, name):
                raise ValueError(f"Recipe: {name} must be above 0.")
        if self.dropout > 1:
            raise ValueError(f"Recipe: dropout multiplies probabilities, so it is at most 1 (got {self.dropout}).")

    def changes(self) -> list[tuple[str, str]]:
        """What it changes, in words, and what does it."""
        decay = [f"weight decay x{self.weight_decay:g}"] if self.weight_decay != 1 else []
        decay += ["none on gamma, beta and biases"] if self.only_weights else []
        if len(decay) == 1 and self.only_weights:
            decay = ["no weight decay on gamma, beta and biases"]
        speed = f"{self.decay_speed:.3g} times faster, for 1/{self.decay_speed:.3g}"
        if self.decay_speed < 1:
            speed = f"{1 / self.decay_speed:.3g} times slower, for {1 / self.decay_speed:.3g} times"
        rows = [
            (f"learning rate x{self.learning_rate:g}" * (self.learning_rate != 1), "apply(optimizer)"),
            (", ".join(decay), "apply(optimizer)"),
            ("Nesterov momentum" * self.nesterov, "apply(optimizer)"),
            (
                f"learning-rate decay {speed} of the steps".replace("times of", "times") * (self.decay_speed != 1),
                "apply(optimizer, scheduler)",
            ),
            (f"dropout x{self.dropout:g}" * (self.dropout != 1) if self.dropout else "no dropout", "accelerate"),
            ("training examples reshuffled each epoch" * self.shuffle, "you: DataLoader(..., shuffle=True)"),
        ]
        return [(what, who) for what, who in rows if what]

    def __str__(self) -> str:
        width = max((len(what) for what, _ in self.changes()), default=0)
        return "\n".join([f"recipe {self.name}", *(f"{what:{width}}    {who}" for what, who in self.changes())])

    def apply(
        self,
        optimizer: Optimizer,
        scheduler: Scheduler | Sequence[Scheduler] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """Change an optimizer, and the scheduler (or schedulers) that stand on it, in place, before training.

        The optimizer must hold the accelerated model's parameters: ``torch.optim.SGD(accelerated.parameters(), ...)``.
        Learning rates, the floors of schedules too, and weight decay are multiplied in every group; a group with both
        weights and parameters of one dimension is cut in two where ``only_weights``. What the scheduler counts in steps
        (``step_size``, ``milestones``, ``T_max``, ``total_steps``, ``patience``, ...) is divided by ``decay_speed``.

        With the accelerated ``model``, layers that got no batch normalization, the classifier say, keep their learning
        rate and its floor: what makes a higher one stable (Section 3.3 of the paper) does not hold for them. The model
        may be wrapped (DistributedDataParallel, torch.compile). A cosine schedule with a floor gets one for each group
        then, ``eta_mins``: it becomes a subclass of its class.

        Raises:
            ValueError: a recipe has been applied already; the scheduler has stepped, stands on another optimizer, or
                was not passed; nesterov with another optimizer than SGD with momentum; another model than the
                optimizer's, or one whose report does not tell which layers have batch normalization; a learning rate
                that is not a number (``Adafactor(lr=None)``); groups to cut of an optimizer that takes one (LBFGS).
            TypeError: a scheduler whose time cannot be changed; something else in the place of optimizer, scheduler or
                model. Nothing has been changed then, in either case.

        Example:
            >>> import torch
            >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.01)
            >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30)
            >>> RECIPES["paper"].apply(optimizer, scheduler)
            >>> scheduler.step_size, [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
            (5, [(0.5, 0.002), (0.5, 0.0)])
        """
        apply(self, optimizer, scheduler, model)


PAPER = Recipe(
    "paper", learning_rate=5, weight_decay=1 / 5, only_weights=True, decay_speed=6, dropout=0, shuffle=True
)  # fmt: skip
FAST = replace(PAPER, name="fast", nesterov=True)
RECIPES = {recipe.name: recipe for recipe in (PAPER, FAST)}

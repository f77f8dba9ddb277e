"""Recipes: what to change in training once the network has batch normalization. A new recipe is one row.

Source of "paper": Ioffe & Szegedy 2015, Section 4.2.1, but for what its images and its network alone have (photometric
distortions, local response normalization); that gamma, beta and biases do not decay is today's practice. Source of
"sgd" and "fast": the race (docs/results.md); of Muon: Jordan et al. 2024; of ``clip``: Brock et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from batchnorm.recipe.apply import apply
from batchnorm.recipe.followers import normalized, parameter_groups
from batchnorm.recipe.muon import Muon
from batchnorm.recipe.warm_up import UpAndDown

Scheduler = LRScheduler | ReduceLROnPlateau
MOMENTUM = 0.9  # Nesterov's, of an optimizer that a recipe brings


@dataclass(frozen=True)
class Recipe:
    """Changes to training, as factors on what there is. Its defaults change nothing; ``print`` it to read it.

    With ``muon_lr`` it brings its optimizer and scheduler (``optimizer``, ``scheduler``) instead of changing the
    user's (``apply``). To edit one: ``dataclasses.replace(bn.RECIPES["paper"], learning_rate=30)``.

    Args:
        name: for prints.
        learning_rate: times the optimizer's learning rates; see ``apply``, ``optimizer``.
        weight_decay: times the optimizer's weight decay.
        only_weights: no weight decay on gamma, beta and biases (parameters of one dimension or none).
        decay_speed: the scheduler's time runs so many times faster; train for as many times fewer steps.
        nesterov: Nesterov's momentum; of SGD with momentum.
        dropout: times the model's dropout probabilities; 0 removes dropout.
        shuffle: the training examples are to be reshuffled each epoch. For you to do.
        muon_lr: learning rate of ``Muon`` on the weights that batch normalization follows, as a share of their norms;
            0: the recipe brings no optimizer.
        sgd_lr: learning rate of SGD on all other parameters, in a recipe that brings its optimizer.
        clip: a gradient of those is at most this share of what it moves (``Muon``); 0: not clipped.
        warm_up: share of the steps over which both rates grow; from there they go to 0.

    Raises:
        ValueError: a number that is not positive and finite; dropout that is not between 0 and 1, ``warm_up`` that is
            not below 1; what changes the user's optimizer together with ``muon_lr``, or what goes with that without it.

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
    muon_lr: float = 0.0
    sgd_lr: float = 0.0
    clip: float = 0.0
    warm_up: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                share = field.name in ("clip", "warm_up")
                kind = "a rate" if field.name.endswith("_lr") else "a share" if share else "a factor"
                raise ValueError(f"Recipe: {field.name} is {kind}, so a finite number of at least 0 (got {value!r}).")
        for name in ("learning_rate", "decay_speed"):
            if not getattr(self, name):
                raise ValueError(f"Recipe: {name} must be above 0.")
        if self.dropout > 1:
            raise ValueError(f"Recipe: dropout multiplies probabilities, so it is at most 1 (got {self.dropout}).")
        if self.warm_up >= 1:
            raise ValueError(f"Recipe: warm_up is a share of the steps, so below 1 (got {self.warm_up}).")
        names = ("weight_decay", "only_weights", "nesterov") if self.muon_lr else ("sgd_lr", "clip", "warm_up")
        other = next((f for f in fields(self) if f.name in names and getattr(self, f.name) != f.default), None)
        if other is not None:
            changes = "changes an optimizer of the user's, and with muon_lr the recipe brings its own"
            goes_with = "is of a recipe that brings its optimizer: give muon_lr too"
            raise ValueError(f"Recipe: {other.name} {changes if self.muon_lr else goes_with}.")
        if self.muon_lr and not self.sgd_lr:
            raise ValueError("Recipe: muon_lr is for weights before batch normalization alone: give sgd_lr too.")

    def changes(self) -> list[tuple[str, str]]:
        """The changes in words, each with the call that makes it."""
        decay = [f"weight decay x{self.weight_decay:g}"] if self.weight_decay != 1 else []
        decay += ["none on gamma, beta and biases"] if self.only_weights else []
        if len(decay) == 1 and self.only_weights:
            decay = ["no weight decay on gamma, beta and biases"]
        speed = f"{self.decay_speed:.3g} times faster, for 1/{self.decay_speed:.3g}"
        if self.decay_speed < 1:
            speed = f"{1 / self.decay_speed:.3g} times slower, for {1 / self.decay_speed:.3g} times"
        faster = f"learning-rate decay {speed} of the steps".replace("times of", "times") * (self.decay_speed != 1)
        applied = [
            (f"learning rate x{self.learning_rate:g}" * (self.learning_rate != 1), "apply(optimizer)"),
            (", ".join(decay), "apply(optimizer)"),
            ("Nesterov momentum" * self.nesterov, "apply(optimizer)"),
            (faster, "apply(optimizer, scheduler)"),
        ]
        rows = [
            *(self._brought(faster) if self.muon_lr else applied),
            (f"dropout x{self.dropout:g}" * (self.dropout != 1) if self.dropout else "no dropout", "accelerate"),
            ("training examples reshuffled each epoch" * self.shuffle, "you: DataLoader(..., shuffle=True)"),
        ]
        return [(what, who) for what, who in rows if what]

    def _brought(self, faster: str) -> list[tuple[str, str]]:
        """The rows of an optimizer of its own."""
        muon, sgd = (f"{rate * self.learning_rate:g}" for rate in (self.muon_lr, self.sgd_lr))
        up = f"up over {100 * self.warm_up:g}% of the steps, then " * (self.warm_up > 0)
        return [
            (f"Muon, learning rate {muon}: weights before batch normalization", "optimizer(model)"),
            (f"SGD, learning rate {sgd}, Nesterov momentum: all others", "optimizer(model)"),
            (f"their gradients cut to {100 * self.clip:g}% of what they move" * (self.clip > 0), "optimizer(model)"),
            ("no weight decay", "optimizer(model)"),
            (f"learning rates {up}linearly to 0", "scheduler(optimizer, steps)"),
            (faster, "you: steps"),
        ]

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
            ValueError: the recipe brings its optimizer; a recipe has been applied already; the scheduler has stepped,
                stands on another optimizer, or was not passed; nesterov with another optimizer than SGD with momentum;
                another model than the optimizer's, or one whose report does not tell which layers have batch
                normalization; a learning rate that is not a number (``Adafactor(lr=None)``); groups to cut of an
                optimizer that takes one (LBFGS).
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

    def optimizer(self, model: nn.Module, example: Any = None) -> Muon:
        """The optimizer that the recipe brings, of a model's parameters; make it before training.

        Weights whose outputs batch normalization alone reads are orthogonalized at constant norm, all other parameters
        (gamma, beta, biases, the last layer) get SGD of clipped gradients, stable for any loss and any scale of the
        targets: two groups, ``orthogonalize`` True and False.

        Args:
            model: what ``accelerate`` returned, wrapped or not; with ``example``, any with batch normalization.
            example: an input: a tensor, a tuple of arguments or a dict of keyword arguments. A copy of the model is
                run on it to see which layers batch normalization follows; the report of ``accelerate`` or ``insert``
                tells that without.

        Raises:
            ValueError: the recipe brings no optimizer; no report tells which layers batch normalization follows, and
                there is no example; it follows none.
            TypeError: not a module.

        Example:
            >>> import torch, batchnorm as bn
            >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
            >>> optimizer = bn.RECIPES["fast"].optimizer(network, torch.randn(2, 1, 5, 5))
            >>> for group in optimizer.param_groups:
            ...     print(group["lr"], group["param_names"])
            0.03 ['0.weight']
            0.5 ['0.bias', '1.weight', '1.bias', '3.weight', '3.bias']

        Source: Jordan et al. 2024; Ioffe & Szegedy 2015, Section 3.3.
        """
        self._must_bring("optimizer")
        groups = parameter_groups(model, normalized(model, example))
        muon, sgd = self.muon_lr * self.learning_rate, self.sgd_lr * self.learning_rate
        return Muon(groups, lr=muon, sgd_lr=sgd, momentum=MOMENTUM, clip=self.clip)

    def scheduler(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """The scheduler that the recipe brings: ``scheduler.step()`` after each of so many steps of the optimizer.

            learning rate = the group's * min((step + 1) / (warm_up steps), (1 - step / steps) / (1 - warm_up))

        Args:
            optimizer: what ``optimizer`` returned.
            steps: of the whole training: epochs * len(loader).

        Raises:
            ValueError: the recipe brings none; ``steps`` is not a positive whole number.

        Example:
            >>> import torch, batchnorm as bn
            >>> model = bn.accelerate(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.randn(2, 4), "fast")
            >>> optimizer = model.batchnorm_recipe.optimizer(model)
            >>> scheduler = model.batchnorm_recipe.scheduler(optimizer, steps=20)
            >>> scheduler.get_last_lr()
            [0.015, 0.25]
        """
        self._must_bring("scheduler")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"scheduler takes the number of steps of the whole training, at least 1 (got {steps!r}).")
        return LambdaLR(optimizer, UpAndDown(steps, self.warm_up))

    def _must_bring(self, what: str) -> None:
        if not self.muon_lr:
            raise ValueError(
                f"recipe {self.name} brings no {what}, it changes yours: recipe.apply(optimizer, scheduler, model). "
                'One that does: batchnorm.RECIPES["fast"].'
            )


PAPER = Recipe(
    "paper", learning_rate=5, weight_decay=1 / 5, only_weights=True, decay_speed=6, dropout=0, shuffle=True
)  # fmt: skip
SGD = replace(PAPER, name="sgd", weight_decay=1, nesterov=True)
FAST = Recipe("fast", muon_lr=0.03, sgd_lr=0.5, clip=0.02, warm_up=0.1, dropout=0, shuffle=True)
RECIPES = {recipe.name: recipe for recipe in (PAPER, SGD, FAST)}

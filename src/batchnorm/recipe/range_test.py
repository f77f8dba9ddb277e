"""A learning-rate range test: one short run whose rate grows from batch to batch; where the loss falls fastest."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchnorm.common.errors import first_line
from batchnorm.population.batches import one_value_said, refuse_one_batch, run
from batchnorm.recipe.trained_copy import trained_copy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.2  # weight of a new loss in the moving average
DIVERGED = 3.0  # of the first or lowest smoothed loss, the larger, above the lowest one: the test ends
LEAST = 10  # steps that tell a slope
NOTHING = 1e-6  # of the first loss: no fall, but rounding
_GIVES_OUTPUTS = "return the loss of them, as lambda model, batch: loss(model(batch[0]), batch[1]) does"


@dataclass(frozen=True)
class RateTest:
    """The measurements of a range test, one entry per step.

    ``rates``: learning rates; ``losses``: of the batches; ``smoothed``: their moving average, without its bias to 0;
    ``rate``: the suggestion: where the smoothed loss falls fastest over the logarithm of the rate; ``highest``: the
    rate of the lowest smoothed loss, beyond which training is not stable.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    rate: float
    highest: float

    def plot(self, to: Axes | str | os.PathLike[str]) -> None:
        """Loss against learning rate, with the suggestion: on matplotlib axes, or into a file."""
        from batchnorm.recipe.rate_plot import draw, save

        draw(self, to) if hasattr(to, "plot") else save(self, to)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return (
            f"learning rate {self.rate:.2g}: the loss falls fastest there (tried: {self.rates[0]:.2g} to "
            f"{self.rates[-1]:.2g}; lowest loss at {self.highest:.2g})"
        )


def find_learning_rate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    *,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    lowest: float = 1e-5,
    highest: float = 10.0,
    steps: int = 100,
    progress: bool = False,
) -> RateTest:
    """Learning-rate range test: train a copy of the model while the learning rate grows exponentially.

        rate of step i = lowest * (highest / lowest) ** (i / (steps - 1))

    The rate where the loss falls fastest is a good one for a constant learning rate; with a warm-up, or as the maximum
    of a schedule, two to five times that is often stable (at most that of the lowest loss). The test ends early where
    the loss is not finite, or its moving average is above its lowest by three times the size of its first (or of its
    lowest, where that is larger). The model, its gradients, and torch's random numbers, are as before afterwards.

    Args:
        model: any module; a copy in train mode is trained.
        batches: ``(inputs, targets)``, as a DataLoader gives them; read again from the front where they are too few.
            Inputs in a tuple or list are arguments where the model's forward takes several, in a mapping keyword
            arguments where it takes all of them by name.
        loss: ``loss(model(inputs), targets)``, a scalar; it may be negative. For a model that returns more than a
            tensor: ``lambda output, targets: torch.nn.functional.cross_entropy(output.logits, targets)``, say.
        forward: ``forward(model, batch)`` runs the model on a batch of any kind, and returns the loss instead. The
            model that it is given is the copy: it must use that one.
        optimizer: ``optimizer(parameters, lr=...)``; default: SGD with momentum 0.9. With weight decay or other
            settings: ``functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)``.
        lowest, highest: first and last learning rate.
        steps: batches to train on.
        progress: show a progress bar (needs rich).

    Returns:
        ``.rate``, the suggestion; ``.rates``, ``.losses``, ``.smoothed``; ``.plot("rates.png")``.

    Raises:
        ValueError: ``batches`` yielded nothing, or less than ``steps`` and cannot be read again; rates that do not
            grow; fewer than 10 steps; the loss diverged or was not finite before the tenth step, or never fell; an
            optimizer whose step needs a closure, LBFGS, or of the model's own parameters; a forward or loss that uses
            the model itself instead of its copy; a loss per example, or one without a gradient; nothing to train; a
            lazy layer has no shape yet: run the model once before.
        TypeError: not a module; no functions; a batch that is not ``(inputs, targets)``, without ``forward``;
            ``batches`` is itself a batch (a tensor, a mapping); a loss that is no tensor, or does not take the model's
            output.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.randn(320, 4)
        >>> found = find_learning_rate(model, list(zip(x.split(32), (x[:, 0] > 0).long().split(32))))
        >>> 0.001 < found.rate < 10
        True

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", https://arxiv.org/abs/1506.01186.
    """
    if not 0 < lowest < highest < math.inf:
        raise ValueError(f"rates must grow from above 0: lowest < highest (got {lowest:g} and {highest:g}).")
    if not isinstance(steps, Integral):
        raise TypeError(f"steps is a whole number of batches, got {steps!r}: pass {LEAST} or more.")
    if steps < LEAST:
        raise ValueError(f"steps must be at least {LEAST} to tell a slope (got {steps}).")
    refuse_one_batch(batches, "batches")
    _check_functions(loss, forward)
    rates, losses = [], []
    with trained_copy(model) as trained:
        make = optimizer or (lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9))
        stepper = trained.optimizer(make, lowest)
        for i, batch in enumerate(_shown(_repeated(batches, steps), steps, progress)):
            rate = lowest * (highest / lowest) ** (i / (steps - 1))
            for group in stepper.param_groups:
                group["lr"] = rate
            stepper.zero_grad()
            with one_value_said(i + 1):
                value = _loss(trained.model, batch, loss, forward)
            value.backward()
            trained.check("loss" if forward is None else "forward")
            stepper.step()
            rates.append(rate)
            losses.append(value.item())
            smoothed = smooth(losses)
            low = min(smoothed)
            if not smoothed[-1] - low <= DIVERGED * max(abs(smoothed[0]), abs(low)):  # nor NaN
                break
    return _read(rates, losses)


def _check_functions(loss: Any, forward: Any) -> None:
    """Refuses what is no function: a loss by its name, or its class, of which none was made."""
    for name, value, of in (("loss", loss, "(outputs, targets)"), ("forward", forward, "(model, batch)")):
        if isinstance(value, type):
            raise TypeError(
                f"{name} is a function of {of}, got the class {value.__name__}: make one, {value.__name__}()."
            )
        if value is not None and not callable(value):
            example = "torch.nn.functional.cross_entropy" if name == "loss" else "lambda model, batch: loss(...)"
            raise TypeError(f"{name} is a function of {of}, got {value!r}: pass {example}, say.")


def _loss(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> Tensor:
    """Of one batch, a number that a step can be made on."""
    if forward is not None:
        return _scalar(forward(model, batch), "forward")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        of = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            f"a batch is (inputs, targets), got a {type(batch).__name__}{of}: for others pass forward, "
            "forward(model, batch), which returns the loss."
        )
    inputs, targets = batch
    output = run(model, inputs)
    try:
        value = loss(output, targets)
    except (TypeError, AttributeError) as error:
        if isinstance(output, Tensor):
            raise
        raise TypeError(
            f"the model returned a {type(output).__name__}, which the loss does not take ({first_line(error)}): pass "
            "loss=, a function of (output, targets), that reads output.logits, say, or output[0]."
        ) from error
    return _scalar(value, "loss")


def _scalar(value: Any, owner: str) -> Tensor:
    """What ``owner``, forward or loss, returned, if it is a loss that a step can be made on."""
    if not isinstance(value, Tensor):
        kind, advice = type(value).__name__, "return a tensor"
        if hasattr(value, "loss"):
            advice = "return its .loss"
        elif isinstance(value, Mapping) and "loss" in value:
            advice = 'return its ["loss"]'
        elif owner == "forward" and isinstance(value, Mapping | tuple | list):
            advice = _GIVES_OUTPUTS
        raise TypeError(f"the loss that {owner} returns is one number in a tensor, got a {kind}: {advice}.")
    if value.numel() != 1:
        advice = 'pass reduction="mean" to the loss, or take its .mean()'
        if owner == "forward":
            advice = f"of losses return the .mean(); of outputs, {_GIVES_OUTPUTS}"
        raise ValueError(
            f"the loss that {owner} returns is one number, got one of shape {tuple(value.shape)}: {advice}."
        )
    if not value.requires_grad:
        raise ValueError("no gradient flows from the loss to the model: is it detached, or from torch.no_grad()?")
    return value.squeeze()


def smooth(losses: list[float]) -> list[float]:
    """Moving average, divided by the weights that it has had so far."""
    average, smoothed = 0.0, []
    for i, value in enumerate(losses):
        average += SMOOTHING * (value - average)
        smoothed.append(average / (1 - (1 - SMOOTHING) ** (i + 1)))
    return smoothed


def _read(rates: list[float], losses: list[float]) -> RateTest:
    """The rate of the steepest fall before the lowest loss."""
    seen = next((i for i, value in enumerate(losses) if not math.isfinite(value)), len(losses))
    if seen < LEAST:
        what, step = ("diverged", seen) if seen == len(losses) else ("was not finite", seen + 1)
        raise ValueError(
            f"the loss {what} at step {step} of the range test, at a learning rate of {rates[step - 1]:.2g}: choose a "
            "smaller lowest, or look at the data."
        )
    smoothed = smooth(losses[:seen])
    low, reach = smoothed.index(min(smoothed)), max(1, seen // 20)
    slopes = {i: smoothed[i + reach] - smoothed[i - reach] for i in range(reach, min(low + 1, seen - reach))}
    if not slopes or min(slopes.values()) > -NOTHING * abs(smoothed[0]):
        raise ValueError(
            f"the loss did not fall at learning rates from {rates[0]:.2g} to {rates[seen - 1]:.2g}: choose others, or "
            "look at the loss."
        )
    best = min(slopes, key=lambda i: slopes[i])
    return RateTest(tuple(rates[:seen]), tuple(losses[:seen]), tuple(smoothed), rates[best], rates[low])


def _repeated(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """So many batches, from the front again where they end."""
    given = 0
    while given < steps:
        before = given
        for batch in itertools.islice(batches, steps - given):
            given += 1
            yield batch
        if given < steps and (given == before or isinstance(batches, Iterator)):
            raise ValueError(
                f"batches yielded {given or 'nothing'}, and the range test takes {steps}: pass a DataLoader or a list "
                "of (inputs, targets), which can be read again."
            )


def _shown(batches: Iterator[Any], steps: int, progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, "learning rates", total=steps)

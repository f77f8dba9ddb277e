"""Task: what the contenders of a race have in common: network, data, loss, metric, batch size and budget.

Comes from: ``zoo.py``, or a user's function named on the command line. Goes to: ``trainer.py``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from batchnorm.racing.errors import RaceError


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of examples whose largest output is their class: output (N, classes), target (N,) -> scalar."""
    return (output.argmax(1) == target).float().mean()


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and for how long; what a contender changes is its own affair.

    Args:
        name: for tables and plots.
        model: ``model()`` returns a new network without batch normalization; contenders put it in. Where it takes
            ``activation=``, the contenders with ``"sigmoid"`` can run too. Random weights come from torch's generator.
        train: training examples; ``train[indices]`` with a tensor of indices gives ``(inputs, targets)``, as a
            ``torch.utils.data.TensorDataset`` does.
        test: examples that only score, in the same form.
        loss: ``loss(output, target)``, the scalar that is minimized.
        metric: ``metric(output, target)``, the mean over the examples of a score between 0 and 1, higher is better.
        batch_size: examples per step, over all processes.
        steps: the baseline's budget.
        full_steps: the baseline's budget under ``--full``: up to its plateau. Default: ``steps``.
        quick_steps: the baseline's budget under ``--quick``. Default: an eighth of ``steps``.
        learning_rate: the baseline's initial rate, where none has been tuned for this task.
        weight_decay: the baseline's L2 penalty on weights (not on biases, gamma and beta).
        held_out: training examples that ``--tune`` sets apart to choose learning rates on. Default: one twelfth.
        device: ``"cpu"``, or ``"cuda"``: under torchrun, each process of a machine trains on a GPU of its own.
        mixed_precision: forward and loss under ``torch.autocast`` to bfloat16; weights, optimizer and statistics stay
            in float32.
        readers: processes per training process that read examples ahead of it. Default: none, examples in memory need
            none; nor are there any where the race itself trains several runs at a time.

    Examples that are files may have ``part(indices, test=)``, which gives some of them without reading them (``test``:
    to score, not to train on), and ``fingerprint()``, a string that tells them from others.

    Example:
        >>> def make():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x, y = torch.randn(120, 4), torch.randint(2, (120,))
        >>> task = Task("toy", make, TensorDataset(x[:100], y[:100]), TensorDataset(x[100:], y[100:]), steps=50)
        >>> len(task.for_tuning().train), len(task.for_tuning().test)
        (92, 8)
    """

    name: str
    model: Callable[..., nn.Module]
    train: Any
    test: Any
    loss: Callable[[Any, Any], Tensor] = field(default=nn.functional.cross_entropy)
    metric: Callable[[Any, Any], Tensor] = field(default=accuracy)
    batch_size: int = 32
    steps: int = 2000
    full_steps: int | None = None
    quick_steps: int | None = None
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    held_out: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    mixed_precision: bool = False
    readers: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "full_steps", "quick_steps", "held_out"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise RaceError(f"Task {self.name!r}: {name} must be a positive whole number (got {value!r}).")
        for name, lowest in (("learning_rate", 1e-30), ("weight_decay", 0.0)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and lowest <= value < math.inf):
                kind = "a positive number" if lowest else "0 or a positive number"
                raise RaceError(f"Task {self.name!r}: {name} must be {kind} (got {value!r}).")
        if not (isinstance(self.readers, int) and self.readers >= 0):
            raise RaceError(f"Task {self.name!r}: readers must be 0 or a positive whole number (got {self.readers!r}).")
        _check_device(f"Task {self.name!r}", self.device)
        if not callable(self.model):
            raise RaceError(
                f"Task {self.name!r}: model must be a function that returns a network (got {self.model!r})."
            )
        for name in ("train", "test"):
            _check_examples(f"Task {self.name!r}: {name}", getattr(self, name))
        if len(self.train) < self.batch_size:
            raise RaceError(
                f"Task {self.name!r}: {len(self.train)} training examples are less than one batch ({self.batch_size})."
            )

    def for_tuning(self) -> Task:
        """The same task scored on training examples that are held out; the test examples are not looked at."""
        held_out = self.held_out or max(1, len(self.train) // 12)
        if len(self.train) - held_out < self.batch_size:
            raise RaceError(f"Task {self.name!r}: {held_out} held-out examples leave less than one batch to train on.")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        part = getattr(self.train, "part", lambda indices, test: TensorDataset(*self.train[indices]))
        return replace(self, train=part(order[held_out:], test=False), test=part(order[:held_out], test=True))

    def with_batch_size(self, batch_size: int) -> Task:
        """The same task in other batches: as many examples in all, and learning rates in proportion to the batch.

        A batch k times as large takes one step where there were k, and goes as far in it: Goyal et al. 2017, "Accurate,
        Large Minibatch SGD", Section 2.1. It holds up to some batch size, which without batch normalization is smaller.
        """
        if not (isinstance(batch_size, int) and batch_size > 0):
            raise RaceError(f"--batch-size must be a whole number of at least 1 (got {batch_size!r}).")
        ratio = batch_size / self.batch_size
        steps = {
            name: max(1, round(value / ratio))
            for name in ("steps", "full_steps", "quick_steps")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, batch_size=batch_size, learning_rate=float(f"{self.learning_rate * ratio:.6g}"), **steps)


def _check_device(what: str, device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise RaceError(f'{what}: device must be "cpu" or "cuda" (got {device!r}): torchrun tells which GPU.')
    if device == "cuda":
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > gpus:
            raise RaceError(f"{what}: each process on this machine needs a GPU: {processes} do, and torch sees {gpus}.")


def _check_examples(what: str, examples: object) -> None:
    if not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")):
        raise RaceError(f"{what} must be a torch.utils.data.TensorDataset or the like (got {type(examples).__name__}).")
    if len(examples) == 0:
        raise RaceError(f"{what} is empty.")
    try:
        _inputs, _targets = examples[torch.arange(min(3, len(examples)))]
    except RaceError:
        raise
    except Exception as error:
        raise RaceError(
            f"{what}[tensor of indices] must give (inputs, targets), as torch.utils.data.TensorDataset does "
            f"({type(error).__name__}: {error})."
        ) from None


def load_task(spec: str, data: str | None = None) -> Task:
    """A built-in task by name, or a user's as ``package.module:function``; the function returns a ``Task``."""
    from batchnorm.racing.tasks import TASKS

    if spec in TASKS:
        return TASKS[spec](data)
    module_name, colon, function_name = spec.partition(":")
    if not (colon and module_name and function_name):
        raise RaceError(
            f"unknown task {spec!r}. Known: {', '.join(TASKS)}; or a function of yours: package.module:function."
        )
    if data is not None:
        raise RaceError(f"--data is for the built-in tasks; {spec} brings its own data.")
    task = _call(spec, _import(spec, module_name, function_name))
    if not isinstance(task, Task):
        raise RaceError(f"task {spec}: the function must return a batchnorm.Task (got {type(task).__name__}).")
    return task


def _import(spec: str, module_name: str, function_name: str) -> Callable[[], object]:
    if os.getcwd() not in sys.path:  # as `python -m` does: a user's module lies where the user stands
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RaceError(
            f"task {spec}: importing {module_name} from {os.getcwd()} or the environment failed: {one_line(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RaceError(f"task {spec}: {module_name} has no function {function_name}.")
    return function


def _call(spec: str, function: Callable[[], object]) -> object:
    """Every process of a race calls the function for itself: what it draws must be the same each time."""
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    try:
        return function()
    except RaceError:
        raise
    except Exception as error:
        raise RaceError(f"task {spec}: the function raised {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def fingerprint(task: Task) -> str:
    """Tells two tasks apart by what the numbers hang on: sizes, weight decay, and some of the data itself."""
    digest = hashlib.sha256(repr((len(task.train), len(task.test), task.batch_size, task.weight_decay)).encode())
    for examples in (task.train, task.test):
        if hasattr(examples, "fingerprint"):
            digest.update(examples.fingerprint().encode())
            continue
        for part in examples[torch.arange(0, len(examples), max(1, len(examples) // 100))]:
            digest.update(repr(part.tolist() if isinstance(part, Tensor) else part).encode())
    return digest.hexdigest()[:16]


def keywords_of(model: Callable[..., nn.Module]) -> set[str] | None:
    """The keywords that a model function takes; None if it takes any."""
    parameters = inspect.signature(model).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}

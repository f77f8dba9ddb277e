"""Whether batch normalization regularizes, so that dropout is not needed, and whether its noise is why.

3 hidden layers of 200 ReLU units on 5,000 standardized images of Fashion-MNIST, few enough to be learned by heart,
batches of 128, 6,000 steps of plain SGD at rate 0.1 (with --quick 1,500), weights normal with deviation sqrt(2 /
inputs). Dropout of 0 or 0.5 x with and without BN: accuracy on those images and on 5,000 test images. Then, without
dropout, BN whose statistics are taken over parts of the batch (ghost batches) of 4 to 128 images: smaller parts are
noisier. The noise is the deviation of the parts' means over that of the values, mean over layers and channels, on the
training images after training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.training import perceptron, recalibrated, share_right, train, vectors
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.sources import Ghost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES, BATCH, RATE, DROPOUT = 5_000, 128, 0.1, 0.5
PARTS = (4, 8, 16, 32, 64, BATCH)
CLAIM = Claim(
    "regularization",
    "Batch normalization regularizes the network, by the noise of its statistics, so that dropout is not needed.",
    "Sections 3.4 and 4.2.1",
    "without dropout BN raises the test accuracy; adding dropout to BN does not; and BN alone is at least as good as "
    "dropout alone (means over seeds)",
)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """(BN x dropout, and the parts' sizes) x seeds."""
    steps = 1_500 if quick else 6_000
    kinds = [(False, 0.0, BATCH), (False, DROPOUT, BATCH), (True, DROPOUT, BATCH), *((True, 0.0, m) for m in PARTS)]
    return [
        {"batch_norm": norm, "dropout": dropout, "part": part, "seed": seed, "steps": steps}
        for norm, dropout, part in kinds for seed in range(seeds)
    ]  # fmt: skip


def measure(batch_norm: bool, dropout: float, part: int, seed: int, steps: int) -> Record:
    """Accuracy on training and test images; the noise of the statistics."""
    images, test = vectors()
    training = TensorDataset(*images[:EXAMPLES])
    network = perceptron(
        3, 200, nn.ReLU, batch_norm=batch_norm, scale=math.sqrt(2), dropout=dropout, seed=seed
    )  # fmt: skip
    for layer in layers_of(network):
        layer.statistics = Ghost(part)
    torch.manual_seed(seed)  # dropout's
    train(network, training, steps=steps, rate=RATE, batch=BATCH, seed=seed)
    if not recalibrated(network, training.tensors[0]):
        return {"train": 0.1, "test": 0.1, "noise": 0.0}
    return {
        "train": share_right(network, training),
        "test": share_right(network, test),
        "noise": noise(network, training.tensors[0], part) if batch_norm else 0.0,
    }


def layers_of(network: nn.Module) -> list[Any]:
    """The BN layers."""
    return [m for m in network.modules() if isinstance(m, FusedBatchNorm)]


def noise(network: nn.Module, images: Tensor, part: int) -> float:
    """Deviation of the mean over ``part`` values, in deviations of the values; about 1 / sqrt(part)."""
    found: list[float] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_NC = inputs[0][: len(inputs[0]) // part * part]
        means = x_NC.unflatten(0, (-1, part)).mean(1)
        found.append((means.std(0) / x_NC.std(0).clamp_min(1e-12)).mean().item())

    hooks = [layer.register_forward_pre_hook(note) for layer in layers_of(network)]
    with torch.no_grad():
        network.eval()(images)
    for hook in hooks:
        hook.remove()
    return mean(found)


def conclude(records: list[Record]) -> Result:
    """The four combinations decide; the parts' sizes are a second table."""

    def runs(norm: bool, dropout: float, part: int = BATCH) -> list[Record]:
        return [r for r in records if (r["batch_norm"], r["dropout"], r["part"]) == (norm, dropout, part)]

    def test(some: Sequence[Record]) -> float:
        return mean(r["test"] for r in some)

    plain, dropped, both, normed = runs(False, 0), runs(False, DROPOUT), runs(True, DROPOUT), runs(True, 0)
    named = {
        "without BN": plain,
        f"without BN, dropout {DROPOUT:g}": dropped,
        f"BN, dropout {DROPOUT:g}": both,
        "BN": normed,
        **{f"BN over parts of {part}": runs(True, 0, part) for part in reversed(PARTS[:-1])},
    }
    rows = [
        {
            "network": name,
            "training accuracy": with_interval([r["train"] for r in some]),
            "test accuracy": with_interval([r["test"] for r in some]),
            "noise of the mean": with_interval([r["noise"] for r in some], "{:.3f}") if some[0]["noise"] else "-",
        }
        for name, some in named.items()
    ]
    holds = {
        "BN raises the test accuracy": test(normed) > test(plain),
        "dropout adds nothing to BN": test(both) <= test(normed),
        "BN is as good as dropout": test(normed) >= test(dropped),
    }
    best = max(PARTS, key=lambda part: test(runs(True, 0, part)))

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"Noise of the batch statistics and what it does: best over parts of {best} images",
            "images that the statistics are taken over", "accuracy on the test images",
        )  # fmt: skip
        axes.errorbar(
            PARTS, [test(runs(True, 0, part)) for part in PARTS], fmt="o-", color=style.WITH[0], label="BN, no dropout",
            yerr=[[abs(test(runs(True, 0, p)) - f(r["test"] for r in runs(True, 0, p))) for p in PARTS]
                  for f in (min, max)],
        )  # fmt: skip
        for some, words, (color, dash) in (
            (both, f"BN, dropout {DROPOUT:g}", style.OTHER),
            (dropped, f"no BN, dropout {DROPOUT:g}", style.THIRD),
            (plain, "no BN, no dropout", style.WITHOUT),
        ):
            axes.axhline(test(some), color=color, linestyle=dash, label=words)
        axes.set_xscale("log", base=2)
        axes.set_xticks(PARTS, [str(part) for part in PARTS])
        style.legend_beside(axes)

    return Result(
        all(holds.values()),
        f"Test accuracy {test(plain):.1%} without BN, {test(normed):.1%} with; with dropout {test(dropped):.1%} and "
        f"{test(both):.1%}.",
        rows,
        draw,
        [
            *(f"{words}: {'yes' if true else 'no'}." for words, true in holds.items()),
            f"Statistics over parts of {best} images do best: {test(runs(True, 0, best)):.2%}, over the whole batch "
            f"{test(normed):.2%}.",
        ],
    )

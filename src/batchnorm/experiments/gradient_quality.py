"""How well the gradient over a mini-batch estimates that over the training set, by the size of the batch.

3 hidden layers of 100 ReLU units on 20,000 standardized images of Fashion-MNIST (with --quick 5,000), weights normal
with deviation sqrt(2 / inputs), after 200 steps of plain SGD at rate 0.1, batches of 100. The gradient over all images
is beside those over batches of m = 1 ... 4,096 images drawn with replacement, 200 of each size (with --quick 40): the
error is the mean of |g_m - g|^2 / |g|^2. Theory without BN: tr(S) / |g|^2 / m, S the covariance of one example's
gradient; a line through log(error) over log(m) has the slope -1, and tr(S) / |g|^2, where error and gradient are
equally long, is the gradient noise scale of McCandlish et al. 2018. With BN an example's gradient depends on its batch:
no such law for small ones, m = 1 does not exist, and the line is fitted from m = 32 on.
"""

from __future__ import annotations

import math
from statistics import linear_regression, mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.training import perceptron, train, vectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = tuple(2**i for i in range(13))
SLOPE, WITH_BN_FROM = 0.05, 32  # with BN the smallest batches follow no law
CLAIM = Claim(
    "gradient-quality",
    "The gradient of the loss over a mini-batch estimates that over the training set; its quality improves with the "
    "batch size.",
    "Section 1",
    f"without BN the error falls as 1/m (exponent -1, to {SLOPE:g}), and with and without BN it falls with each "
    "doubling of the batch (means over seeds)",
)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """With and without BN x seeds."""
    examples, draws = (5_000, 40) if quick else (20_000, 200)
    return [
        {"batch_norm": norm, "seed": seed, "examples": examples, "draws": draws, "steps": 200}
        for norm in (False, True) for seed in range(seeds)
    ]  # fmt: skip


def measure(batch_norm: bool, seed: int, examples: int, draws: int, steps: int) -> Record:
    """The error for each size."""
    training, _ = vectors()
    network = perceptron(3, 100, nn.ReLU, batch_norm=batch_norm, scale=math.sqrt(2), seed=seed)
    train(network, training, steps=steps, rate=0.1, batch=100, seed=seed)
    images, labels = training[:examples]
    full = gradient(network, images, labels)
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    for size in SIZES[batch_norm:]:
        found = []
        for _ in range(draws):
            chosen = torch.randint(examples, (size,), generator=generator)
            found.append(((gradient(network, images[chosen], labels[chosen]) - full).norm() / full.norm()).item() ** 2)
        errors[str(size)] = mean(found)
    return {"errors": errors}


def gradient(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of the mean loss, to all parameters as one vector."""
    loss = nn.functional.cross_entropy(network.train()(images), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def law(errors: dict[int, float]) -> tuple[float, float]:
    """Exponent p and factor b of error = b * m^p, least squares in the logarithms."""
    line = linear_regression([math.log(m) for m in errors], [math.log(e) for e in errors.values()])
    return line.slope, math.exp(line.intercept)


def conclude(records: list[Record]) -> Result:
    """The fitted law, and whether errors fall throughout."""
    errors = {
        norm: {m: mean(r["errors"][str(m)] for r in records if r["batch_norm"] is norm) for m in SIZES[norm:]}
        for norm in (False, True)
    }
    slope, factor = law(errors[False])
    noise_scale = factor ** (-1 / slope)  # where the error is 1
    laws = [law({int(m): e for m, e in r["errors"].items()}) for r in records if not r["batch_norm"]]
    scales = [b ** (-1 / p) for p, b in laws]
    with_bn, _ = law({m: e for m, e in errors[True].items() if m >= WITH_BN_FROM})
    spread = f" ({min(scales):.0f} to {max(scales):.0f} from seed to seed)" if len(scales) > 1 else ""
    falls = {norm: list(e.values()) == sorted(e.values(), reverse=True) for norm, e in errors.items()}
    rows = [
        {
            "m": f"{m:,}",
            **{
                words: with_interval([r["errors"][str(m)] for r in records if r["batch_norm"] is norm], "{:.3g}")
                if m in errors[norm] else "-"
                for norm, words in ((False, "error without BN"), (True, "error with BN"))
            },
        }
        for m in SIZES
    ]  # fmt: skip

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"The error of a mini-batch's gradient falls as m to the {slope:.2f}",
            "images in the batch, m", "error, relative to the full gradient's square",
        )  # fmt: skip
        for norm, (color, dash) in ((False, style.WITHOUT), (True, style.WITH)):
            axes.plot(
                list(errors[norm]), list(errors[norm].values()), dash, marker="o", color=color,
                label="with BN" if norm else "without",
            )  # fmt: skip
        axes.plot(SIZES, [factor * m**slope for m in SIZES], ":", color="black", label="fitted, without BN")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.annotate(
            f"as long as the gradient itself: m = {noise_scale:.0f}, the noise scale", (1, 1), va="top", fontsize=9
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(frameon=False)

    return Result(
        abs(slope + 1) <= SLOPE and all(falls.values()),
        f"Without BN the error is {factor:.0f} * m^{slope:.3f}: the gradient noise scale is {noise_scale:.0f} "
        f"images{spread}. From m = {WITH_BN_FROM} on the exponent with BN is {with_bn:.2f}"
        + ("." if all(falls.values()) else ", and the error does not fall throughout."),
        rows,
        draw,
    )

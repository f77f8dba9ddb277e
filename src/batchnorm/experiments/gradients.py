"""Whether gradients neither vanish nor explode with depth.

Networks of 10 to 50 hidden layers of 100 ReLU units on standardized images of Fashion-MNIST, with and without skip
connections (h + f(h) in place of f(h), from the second layer on), weights normal with deviation a * sqrt(2 / inputs)
for a of 0.5, 1 and 2. The norm of the loss's gradient to each hidden layer's outputs on a batch of 1,000 images, at
initialization and after 300 steps of plain SGD at rate 0.01 (with --quick 100), batches of 100. Growth is that from the
last hidden layer down to the first, in powers of ten: positive where gradients explode on their way, negative where
they vanish. A norm below float32's range counts as its smallest number.
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.experiments.training import perceptron, train, vectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS, QUICK_DEPTHS, SCALES = (10, 20, 30, 40, 50), (10, 30, 50), (0.5, 1.0, 2.0)
RATE, LIMIT = 0.01, 1.0
CLAIM = Claim(
    "gradients",
    "Batch normalization prevents vanishing and exploding gradients.",
    "Sections 1 and 3.3; limited by Yang et al. 2019",
    f"with BN the gradient's norm grows or falls by at most a factor of {10**LIMIT:g} between the last hidden layer "
    "and the first, at every depth and initial scale, with and without skip connections, at initialization and in "
    "training",
)
WHEN = ("at initialization", "in training")


class Skip(nn.Module):
    """h + f(h)."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, h: Tensor) -> Tensor:
        return h + self.f(h)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """With and without BN x skips x depths x initial scales x seeds."""
    steps, depths = (100, QUICK_DEPTHS) if quick else (300, DEPTHS)
    return [
        {"batch_norm": norm, "skip": skip, "depth": depth, "scale": scale, "seed": seed, "steps": steps}
        for norm in (False, True) for skip in (False, True) for depth in depths for scale in SCALES
        for seed in range(seeds)
    ]  # fmt: skip


def measure(batch_norm: bool, skip: bool, depth: int, scale: float, seed: int, steps: int) -> Record:
    """Log10 of the norms, first layer first, at initialization and after training; None where one is not finite."""
    training, _ = vectors()
    plain = perceptron(depth, 100, nn.ReLU, batch_norm=batch_norm, scale=scale * math.sqrt(2), seed=seed)
    layers = [plain[i : i + 2] for i in range(0, len(plain), 2)]  # affine (with BN) and ReLU; the last one affine alone
    if skip:
        layers[1:-1] = map(Skip, layers[1:-1])  # the first one changes the width
    network = nn.Sequential(*layers)
    images, labels = training[:1_000]
    first = log_norms(network, images, labels)
    stable = train(network, training, steps=steps, rate=RATE, batch=100, seed=seed)
    return {"norms": [first, log_norms(network, images, labels) if stable else None]}


def log_norms(network: nn.Sequential, images: Tensor, labels: Tensor) -> list[float] | None:
    """Log10 of the norms of the gradients to the hidden layers' outputs."""
    outputs, h = [], images
    for layer in network.train():
        h = layer(h)
        outputs.append(h)
    gradients = torch.autograd.grad(nn.functional.cross_entropy(h, labels), outputs[:-1])
    norms = [gradient.norm().item() for gradient in gradients]
    if not all(map(math.isfinite, norms)):
        return None
    return [math.log10(max(norm, torch.finfo(torch.float32).tiny)) for norm in norms]


def conclude(records: list[Record]) -> Result:
    """The largest growth, over depths, scales and seeds."""
    worst: dict[tuple[bool, bool, int], float] = {}
    for norm, skip, when in product((False, True), (False, True), range(len(WHEN))):
        found = [r["norms"][when] for r in records if (r["batch_norm"], r["skip"]) == (norm, skip)]
        worst[norm, skip, when] = max((math.inf if n is None else n[0] - n[-1] for n in found), key=abs)
    rows = [
        {"network": _words(norm, skip)}
        | {f"growth {words}, powers of ten": _number(worst[norm, skip, i]) for i, words in enumerate(WHEN)}
        for norm, skip in product((False, True), (False, True))
    ]
    confirmed = all(abs(value) <= LIMIT for (norm, _, _), value in worst.items() if norm)
    deepest = max(r["depth"] for r in records)

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, f"Gradients at initialization, {deepest} layers: with BN the initial scale a does not matter, but "
            "skips do", "layer (1: the first)", "norm of the gradient to its outputs",
        )  # fmt: skip
        looks = {(False, False): style.WITHOUT, (False, True): style.THIRD, (True, False): style.WITH,
                 (True, True): style.OTHER}  # fmt: skip
        for r in records:
            if (r["depth"], r["seed"]) == (deepest, 0) and r["norms"][0] is not None:
                color, dash = looks[r["batch_norm"], r["skip"]]
                label = _words(r["batch_norm"], r["skip"]) if r["scale"] == 1 else None
                norms = [10.0**n for n in r["norms"][0]]
                axes.plot(range(1, deepest + 1), norms, dash, color=color, label=label)
                axes.annotate(f"{r['scale']:g}  ", (1, norms[0]), color=color, ha="right", va="center", fontsize=8)
        axes.set_yscale("log")
        axes.set_xlim(left=-3)
        axes.legend(frameon=False, title="at the left: a")

    return Result(
        confirmed,
        f"Growth of the gradient down through up to {deepest} layers at initialization, in powers of ten: with BN "
        f"{_number(worst[True, False, 0])}, with skip connections too {_number(worst[True, True, 0])}; without BN "
        f"{_number(worst[False, False, 0])} and {_number(worst[False, True, 0])}.",
        rows,
        draw,
        ["The largest over depths, initial scales and seeds; \"not finite\": some network's gradient overflowed or its "
         "training diverged."],
    )  # fmt: skip


def _words(norm: bool, skip: bool) -> str:
    return f"{'with BN' if norm else 'without'}{', skips' if skip else ''}"


def _number(value: float) -> str:
    return f"{value:+.1f}" if math.isfinite(value) else "not finite"

"""Whether one feature map is normalized alike at all places, and what that keeps.

A batch of 32 images of Fashion-MNIST through a random 5 x 5 convolution to 8 maps, in float64. BN per map beside BN of
the same values as (N p q, C), outputs and gradients. Then, as in inference, with the batch's statistics held: images
shifted by 3 places (circular, so that no values are lost) beside shifted outputs; and the same for BN per activation
(a mean and a variance for each place of each map), as it would be without Section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.functional import batch_norm
from batchnorm.racing.data import load_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT, LOST = 1e-9, 0.1
CLAIM = Claim(
    "convolution",
    "All values of a feature map, over examples and places, are normalized together (m' = m p q), so that the "
    "convolutional property is kept: what is shifted in is shifted out.",
    "Section 3.2",
    f"BN per map is BN of the (N p q, C) values, and commutes with a shift, to {LIMIT:g} (float64); BN per activation "
    f"does not commute, by more than {LOST:g} of the largest value",
)
WHAT = {
    "as_values": "BN per map beside BN of (N p q, C)",
    "gradient": "its gradient",
    "per_map": "shifted in, shifted out: BN per map",
    "per_activation": "shifted in, shifted out: BN per activation",
}


def cells(quick: bool, seeds: int) -> list[Cell]:
    """One per seed."""
    return [{"seed": seed} for seed in range(seeds)]


def measure(seed: int) -> Record:
    """Errors relative to the largest value."""
    generator = torch.Generator().manual_seed(seed)
    images = load_images().train_images
    x = images[torch.randperm(len(images), generator=generator)[:32], None].double() / 255
    weight = torch.randn(8, 1, 5, 5, generator=generator, dtype=torch.float64)
    maps = _convolved(x, weight)
    towards = torch.randn(maps.shape, generator=generator, dtype=torch.float64)
    as_maps, as_values = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    y = batch_norm(as_maps, training=True)
    z = batch_norm(as_values.movedim(1, -1).flatten(0, 2), training=True).unflatten(0, (32, 28, 28)).movedim(-1, 1)
    gradients = [torch.autograd.grad((out * towards).sum(), at)[0] for out, at in ((y, as_maps), (z, as_values))]
    shifted = _convolved(x.roll(3, -1), weight)
    per_map, per_activation = (lambda v: v), (lambda v: v.flatten(1))  # what a channel is: (N, C, p, q), (N, C p q)
    return {
        "as_values": _off(z, y),
        "gradient": _off(gradients[1], gradients[0]),
        "per_map": _shift_error(maps, shifted, per_map),
        "per_activation": _shift_error(maps, shifted, per_activation),
    }


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (2, 2, 2, 2), mode="circular"), weight)


def _shift_error(maps: Tensor, shifted: Tensor, channels: Callable[[Tensor], Tensor]) -> float:
    """Of the output for shifted images beside the shifted output, both with the statistics of the first."""
    mean, var = (torch.zeros(channels(maps).shape[1], dtype=maps.dtype) for _ in range(2))
    batch_norm(channels(maps), mean, var, training=True, momentum=1.0)
    y, y_shifted = (batch_norm(channels(v), mean, var).view_as(v) for v in (maps, shifted))
    return _off(y_shifted, y.roll(3, -1))


def _off(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def conclude(records: list[Record]) -> Result:
    """The largest errors over seeds; the smallest where there should be one."""
    worst = {key: max(record[key] for record in records) for key in WHAT}
    lost = min(record["per_activation"] for record in records)
    exact = max(worst[key] for key in WHAT if key != "per_activation")

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, "One mean and variance per map keep the shift, one per place does not",
            "largest error, relative to the largest value", "",
        )  # fmt: skip
        colors = [style.OTHER[0] if key == "per_activation" else style.WITH[0] for key in WHAT]
        axes.barh(list(WHAT.values()), [worst[key] for key in WHAT], color=colors, left=1e-18, height=0.5)
        axes.set_xscale("log")
        axes.set_xlim(1e-18, 10 * max(worst.values()))
        axes.axvline(LIMIT, color="black", linewidth=0.8)
        axes.annotate(f" limit {LIMIT:g}", (LIMIT, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9)
        axes.invert_yaxis()

    return Result(
        exact <= LIMIT and lost > LOST,
        f"Per map the errors are at most {exact:.1e}; per activation a shifted image comes out "
        f"{lost:.3g} times the largest value off, or more.",
        [{"what": words, "largest error": f"{worst[key]:.1e}"} for key, words in WHAT.items()],
        draw,
    )

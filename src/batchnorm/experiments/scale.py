"""Whether the scale of the weights matters to a normalized layer, and what it does to its gradient.

For u in a batch of 64 examples of 50 features and W of 30 x 50, both normal, a random loss behind BN, in float64:
BN((aW)u), its gradient to u and its gradient to aW beside those at a = 1, for a from 1e-3 to 1e3. The claim is exact
for eps = 0, which decides; with the default eps the layer knows the scale again where a is small.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.ops.reference import normalize, statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT = 1e-9
CLAIM = Claim(
    "scale",
    "BN(Wu) = BN((aW)u); the scale of the weights changes neither the output nor the gradient to u, and larger weights "
    "get smaller gradients, by 1/a.",
    "Section 3.3",
    f"with eps = 0 all three hold for a from 1e-3 to 1e3, relative errors at most {LIMIT:g} (float64)",
)
WHAT = {"output": "output", "to_u": "gradient to u", "to_w": "gradient to aW, times a"}


def cells(quick: bool, seeds: int) -> list[Cell]:
    """One per seed."""
    return [{"seed": seed} for seed in range(seeds)]


def measure(seed: int) -> Record:
    """Errors, relative to the largest value at a = 1, over the scales."""
    torch.manual_seed(seed)
    u, w, towards = (torch.randn(*shape, dtype=torch.float64) for shape in ((64, 50), (30, 50), (64, 30)))
    scales = torch.logspace(-3, 3, 25, dtype=torch.float64).tolist()
    curves: Record = {"scales": scales}
    for eps in (0.0, 1e-5):
        at_one = _results(u, w, towards, 1.0, eps)
        rows = [_results(u, w, towards, a, eps) for a in scales]
        for i, name in enumerate(WHAT):
            errors = [((row[i] - at_one[i]).abs().max() / at_one[i].abs().max()).item() for row in rows]
            curves[f"{name}, eps={eps:g}"] = errors
    return curves


def _results(u: Any, w: Any, towards: Any, a: float, eps: float) -> tuple[Any, Any, Any]:
    u, scaled = u.clone().requires_grad_(), (a * w).requires_grad_()
    z = u @ scaled.T
    y = normalize(z, *statistics(z), None, None, eps)  # torch and our layers refuse eps = 0
    to_u, to_w = torch.autograd.grad((y * towards).sum(), (u, scaled))
    return y.detach(), to_u, a * to_w


def conclude(records: list[Record]) -> Result:
    """The largest errors over seeds."""
    scales = records[0]["scales"]
    worst = {
        key: [max(record[key][i] for record in records) for i in range(len(scales))]
        for key in records[0] if key.endswith(("eps=0", "eps=1e-05"))
    }  # fmt: skip
    exact = max(max(worst[f"{name}, eps=0"]) for name in WHAT)
    rows = [
        {
            "what": words,
            "eps = 0": f"{max(worst[f'{name}, eps=0']):.1e}",
            "eps = 1e-5, a = 1e-3": f"{worst[f'{name}, eps=1e-05'][0]:.1e}",
            "eps = 1e-5, a = 1e3": f"{worst[f'{name}, eps=1e-05'][-1]:.1e}",
        }
        for name, words in WHAT.items()
    ]

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, "With eps = 0 the scale of the weights does not matter; the default eps knows small ones",
            "scale a of the weights", "error relative to a = 1",
        )  # fmt: skip
        for (name, words), (color, dash) in zip(WHAT.items(), (style.WITH, style.OTHER, style.THIRD), strict=True):
            for eps, look in (("1e-05", {"label": f"{words}, eps = 1e-5"}), ("0", {"linewidth": 0.8})):
                errors = [e or math.nan for e in worst[f"{name}, eps={eps}"]]  # a = 1 is what it is compared with
                axes.plot(scales, errors, dash, color=color, **look)
        axes.axhline(LIMIT, color="black", linewidth=0.8)
        axes.annotate(f"limit {LIMIT:g}; below: eps = 0", (1e3, LIMIT), ha="right", va="bottom", fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(frameon=False)

    return Result(
        exact <= LIMIT,
        f"With eps = 0 the errors are at most {exact:.1e}; with the default eps = 1e-5 the output at a = 1e-3 is "
        f"{worst['output, eps=1e-05'][0]:.1%} of its largest value off.",
        rows,
        draw,
    )

"""Whether a network keeps what it can represent: gamma and beta that make the transform the identity.

The race's Inception network and the paper's small network, without BN, trained for a while on Fashion-MNIST; then BN is
put in with gamma = sqrt(Var[x] + eps) and beta = E[x] over 2,000 training images (``batchnorm.insert``). Outputs on 500
test images beside those before, in float64. The paper writes gamma = sqrt(Var[x]), which leaves eps out: measured
beside it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchnorm.experiments import style
from batchnorm.experiments.claim import Cell, Claim, Record, Result
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.events import Run
from batchnorm.racing.loading import load_task
from batchnorm.racing.trainer import Trainer
from batchnorm.surgery import insert

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT = 1e-9
STEPS = {"inception": 400, "mlp": 2_000}
RATES = {"inception": 0.1, "mlp": 0.05}
CLAIM = Claim(
    "capacity",
    "The transform can represent the identity, so that a network with batch normalization can represent what it could "
    "without.",
    "Section 3",
    f"with gamma = sqrt(Var[x] + eps) and beta = E[x] the outputs of a trained network are as before, to {LIMIT:g} of "
    "the largest (float64)",
)


def cells(quick: bool, seeds: int) -> list[Cell]:
    """Networks x seeds."""
    shorter = 4 if quick else 1
    return [{"network": name, "seed": s, "steps": STEPS[name] // shorter} for name in STEPS for s in range(seeds)]


def measure(network: str, seed: int, steps: int) -> Record:
    """Errors of the outputs and the smallest variance that a channel had."""
    task = load_task(network)
    trainer = Trainer(task, Run(CONTENDERS["baseline"], seed, RATES[network], steps, 1))
    for _ in range(steps):
        trainer.step()
    model = trainer.model.double().eval()
    images = task.train[torch.arange(2_000)][0].double()
    test = task.test[torch.arange(500)][0].double()
    inserted = insert(model, images[:2], batches=images.split(500))
    as_printed = copy.deepcopy(inserted)
    layers = [m for m in as_printed.modules() if isinstance(m, FusedBatchNorm)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(layer.running_var.sqrt())  # type: ignore[union-attr]
        before = model(test)
    variance = min(layer.running_var.min().item() for layer in layers)  # type: ignore[union-attr]
    names = {"with_eps": inserted, "as_printed": as_printed}
    return {key: _off(made, test, before) for key, made in names.items()} | {
        "variance": variance,
        "layers": len(layers),
    }


def _off(model: nn.Module, inputs: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return ((model(inputs) - expected).abs().max() / expected.abs().max()).item()


def conclude(records: list[Record]) -> Result:
    """The largest error over networks and seeds."""
    by_network: dict[str, list[Record]] = {}
    for record in records:
        by_network.setdefault(record["network"], []).append(record)
    rows: list[dict[str, Any]] = [
        {
            "network": name,
            "layers": str(some[0]["layers"]),
            "smallest variance": f"{min(r['variance'] for r in some):.1e}",
            "error, sqrt(Var + eps)": f"{max(r['with_eps'] for r in some):.1e}",
            "error, sqrt(Var)": f"{max(r['as_printed'] for r in some):.1e}",
        }
        for name, some in by_network.items()
    ]
    exact, printed = (max(record[key] for record in records) for key in ("with_eps", "as_printed"))

    def draw(figure: Figure) -> None:
        axes = style.axes_of(
            figure, "gamma = sqrt(Var + eps) restores a trained network; sqrt(Var) nearly",
            "error of the outputs, relative to the largest", "",
        )  # fmt: skip
        for shift, (key, words), (color, _) in zip(
            (-0.12, 0.12), (("with_eps", "sqrt(Var + eps)"), ("as_printed", "sqrt(Var), as printed")),
            (style.WITH, style.OTHER), strict=True,
        ):  # fmt: skip
            for place, some in enumerate(by_network.values()):
                label = words if place == 0 else None
                axes.plot([r[key] for r in some], [place + shift] * len(some), "o", color=color, label=label)
        axes.set_yticks(range(len(by_network)), list(by_network))
        axes.set_ylim(len(by_network) - 0.4, -0.6)
        axes.set_xscale("log")
        axes.axvline(LIMIT, color="black", linewidth=0.8)
        axes.annotate(f" limit {LIMIT:g}", (LIMIT, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9)
        axes.legend(frameon=False, loc="center")

    return Result(
        exact <= LIMIT,
        f"Outputs are at most {exact:.1e} of the largest off; with the paper's sqrt(Var), {printed:.1e}.",
        rows,
        draw,
    )

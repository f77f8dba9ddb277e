"""Training with two, three and four images in a batch: Renorm beside batch statistics. On the CPU, from the root:

    python benchmarks/tiny_batches.py --out results-tiny

A network and a contender are one row each. Every run sees the same number of images in one pass. The learning rate of
each (network, contender, batch size) is chosen on held-out training images; the runs that count have other seeds, all
training images, and are scored on the test images. A finished run is a file in OUT/runs: a killed script goes on.
Prints the table; writes results.json, results.md and tiny-batches.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.racing.data import load_images
from batchnorm.racing.zoo import mlp

STATISTICS_MOMENTUM = 0.01  # of running statistics, for all: 0.1 is a window of 20 images at a batch of 2
SGD_MOMENTUM = 0.9
RATES = (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # from which a sweep takes neighbors
TUNING_SEED, SEEDS = 100, (0, 1, 2)
HELD_OUT, RECALIBRATION, TRAIN_MODE = 5_000, 1_000, 2_000  # images: to choose rates, re-estimate, score in train mode
EVALUATIONS = 10  # points of a curve
# The paper's 5,000, 40,000 and 25,000 steps as shares of a run: of 160,000 steps.
RENORM = {"r_max": 3.0, "d_max": 5.0}
RENORM_SHARES = ((1 / 32, 1 / 4), (1 / 32, 5 / 32))


def fully_connected(*, batch_norm: bool) -> nn.Sequential:
    """The paper's small network, as in the race: 3 hidden layers of 100 sigmoid units; with BN (N, C), before each."""
    network = nn.Sequential(nn.Flatten(), *mlp())
    return bn.insert(network, torch.randn(2, 1, 28, 28)) if batch_norm else network


def convolutions(*, batch_norm: bool) -> nn.Sequential:
    """Four convolutions, 14 x 14 to 2 x 2 places, each with BN and ReLU: 4 values per channel and image at the end."""

    def conv(in_channels: int, out_channels: int) -> list[nn.Module]:
        norm = [bn.BatchNorm2d(out_channels)] if batch_norm else []
        return [nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=not batch_norm), *norm, nn.ReLU()]

    return nn.Sequential(*conv(1, 8), *conv(8, 16), *conv(16, 32), *conv(32, 32), nn.Flatten(), nn.Linear(128, 10))


@dataclass(frozen=True)
class Network:
    """What is trained: on how many images, in which batches; ``places`` of its smallest layer."""

    make: Callable[..., nn.Sequential]
    images: int
    batches: tuple[int, ...]
    contenders: tuple[str, ...]
    places: int


@dataclass(frozen=True)
class Contender:
    """``head_only``: hidden layers keep their initial weights, to see what is learned without them."""

    title: str
    statistics: str  # "none", "batch" or "renorm"
    color: str
    dash: str
    head_only: bool = False


NETWORKS = {
    "fully connected": Network(fully_connected, 15_000, (2, 3, 4, 32), ("batch", "renorm", "none"), 1),
    "convolutions": Network(convolutions, 10_000, (2, 32), ("batch", "renorm"), 4),
}
EXTRA = [("fully connected", "renorm-head", 2), ("fully connected", "batch-head", 2)]
CONTENDERS = {
    "batch": Contender("Batch", "batch", "#7fb8e6", "-"),
    "renorm": Contender("Renorm", "renorm", "#5b2a86", "-"),
    "none": Contender("without BN", "none", "#444444", ":"),
    "renorm-head": Contender("Renorm, hidden layers as initialized", "renorm", "#5b2a86", ":", head_only=True),
    "batch-head": Contender("Batch, hidden layers as initialized", "batch", "#7fb8e6", ":", head_only=True),
}
# A sweep begins with this rate and its neighbors, and goes on while the best is the lowest or the highest.
FIRST_RATES = {
    "batch": {2: 0.003, 3: 0.003, 4: 0.003, 32: 0.1},
    "renorm": {2: 0.003, 3: 0.003, 4: 0.003, 32: 0.1},
    "renorm-head": {2: 0.003},
    "batch-head": {2: 0.003},
    "none": {2: 0.03, 3: 0.03, 4: 0.03, 32: 0.1},
}


class Examples(NamedTuple):
    """Inputs (N, 1, 28, 28), standardized, and labels (N,)."""

    inputs: Tensor
    labels: Tensor

    def __getitem__(self, indices: Any) -> Examples:  # type: ignore[override]
        return Examples(*(tensor[indices] for tensor in tuple(self)))


@dataclass(frozen=True)
class Run:
    """One training run; ``held_out``: scored on training images that it does not train on."""

    network: str
    contender: str
    batch: int
    rate: float
    seed: int
    held_out: bool

    @property
    def steps(self) -> int:
        return NETWORKS[self.network].images // self.batch

    @property
    def file(self) -> str:
        scored = "held-out" if self.held_out else "test"
        words = (self.network.replace(" ", "-"), self.contender, f"n{self.batch}", f"lr{self.rate:g}")
        return f"{'-'.join(words)}-seed{self.seed}-{self.steps}-{scored}.json"


def read_examples() -> tuple[Examples, Examples]:
    """All training and all test images."""
    images = load_images()
    pixels = images.train_images.float()
    center, scale = pixels.mean(), pixels.std()
    return (
        Examples((pixels[:, None] - center) / scale, images.train_labels.long()),
        Examples((images.test_images[:, None].float() - center) / scale, images.test_labels.long()),
    )


def build(run: Run) -> nn.Sequential:
    """The network from the run's seed: the same initial weights for all contenders with BN."""
    contender = CONTENDERS[run.contender]
    torch.manual_seed(run.seed)
    model = NETWORKS[run.network].make(batch_norm=contender.statistics != "none")
    schedule = tuple(tuple(round(share * run.steps) for share in shares) for shares in RENORM_SHARES)
    for layer in model.modules():
        if isinstance(layer, bn.BatchNorm1d | bn.BatchNorm2d):
            layer.momentum = STATISTICS_MOMENTUM
            if contender.statistics == "renorm":
                layer.statistics = bn.Renorm(**RENORM, schedule=schedule)  # type: ignore[arg-type]
    if contender.head_only:
        for layer in list(model)[:-1]:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.requires_grad_(False)
    return model


def train(run: Run, train_examples: Examples, test_examples: Examples) -> dict[str, Any]:
    """One run: its curve in eval mode, and at the end the same weights normalized in other ways."""
    model, start = build(run), time.perf_counter()
    order = torch.randperm(len(train_examples.labels), generator=torch.Generator().manual_seed(run.seed))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=run.rate, momentum=SGD_MOMENTUM, fused=True)
    curve = []
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = run.rate * (1 - step / run.steps)
        inputs, labels = train_examples[order[step * run.batch : (step + 1) * run.batch]]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.train()(inputs), labels)
        loss.backward()
        optimizer.step()
        if (step + 1) * EVALUATIONS // run.steps > step * EVALUATIONS // run.steps and not run.held_out:
            curve.append({"images": (step + 1) * run.batch, "accuracy": accuracy(model.eval(), test_examples)})
    result = {**asdict(run), "steps": run.steps, "seconds": time.perf_counter() - start, "curve": curve}
    result["eval"] = accuracy(model.eval(), test_examples)
    if not run.held_out and CONTENDERS[run.contender].statistics != "none":
        drawn = torch.randperm(len(test_examples.labels), generator=torch.Generator().manual_seed(0))[:TRAIN_MODE]
        with bn.preserve_state(model):
            result["train"] = accuracy(model.train(), test_examples[drawn], run.batch)
        batches = train_examples.inputs[order[:RECALIBRATION]].split(run.batch)[: RECALIBRATION // run.batch]
        for upstream in ("batch", "population"):
            with bn.preserve_state(model), redirect_stderr(StringIO()):  # it says how often it reads the batches
                result[f"recalibrated_{upstream}"] = recalibrated(model, batches, upstream, test_examples)
    return result


def recalibrated(model: nn.Module, batches: Sequence[Tensor], upstream: str, examples: Examples) -> float | None:
    """Accuracy in eval mode with re-estimated statistics; None where there are none that are finite."""
    try:
        bn.recalibrate(model, batches, upstream=upstream)
    except ValueError:
        return None
    return accuracy(model.eval(), examples)


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples, batch: int = 1_000) -> float:
    """Share of correct answers, over whole batches, in the mode that the model is in."""
    inputs, labels = examples
    whole = len(labels) // batch * batch
    right = sum((model(inputs[i : i + batch]).argmax(1) == labels[i : i + batch]).sum() for i in range(0, whole, batch))
    return float(right) / whole


class Laboratory:
    """Runs what has not been run yet, and keeps every result as a file."""

    def __init__(self, out: Path) -> None:
        self.directory, self.start, self.count = out / "runs", time.perf_counter(), 0
        self.directory.mkdir(parents=True, exist_ok=True)
        self.train, self.test = read_examples()
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(0))
        self.held_out, self.rest = self.train[order[:HELD_OUT]], self.train[order[HELD_OUT:]]

    def result(self, run: Run) -> dict[str, Any]:
        file = self.directory / run.file
        if not file.exists():
            examples = (self.rest, self.held_out) if run.held_out else (self.train, self.test)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(train(run, *examples)))
            part.replace(file)
        result: dict[str, Any] = json.loads(file.read_text())
        self.count += 1
        print(
            f"{self.count:4d}  {time.perf_counter() - self.start:5.0f} s  {run.file.removesuffix('.json'):70s}"
            f"{result['eval']:7.2%}  ({result['seconds']:.0f} s)",
            flush=True,
        )
        return result

    def sweep(self, run: Run) -> dict[float, float]:
        """Held-out accuracy of each rate, until the best is neither the lowest nor the highest."""
        scores: dict[float, float] = {}
        best = FIRST_RATES[run.contender][run.batch]
        while True:
            i = RATES.index(best)
            new = [rate for rate in RATES[max(i - 1, 0) : i + 2] if rate not in scores]
            if not new:
                return dict(sorted(scores.items()))
            scores |= {rate: self.result(replace(run, rate=rate))["eval"] for rate in new}
            best = max(scores, key=lambda rate: scores[rate])


def measure(laboratory: Laboratory) -> list[dict[str, Any]]:
    """One row per network, batch size and contender."""
    jobs = [(name, c, n) for name, network in NETWORKS.items() for n in network.batches for c in network.contenders]
    rows = []
    for network, contender, batch in jobs + EXTRA:
        scores = laboratory.sweep(Run(network, contender, batch, 0.0, TUNING_SEED, held_out=True))
        rate = max(scores, key=lambda r: scores[r])
        runs = [laboratory.result(Run(network, contender, batch, rate, seed, held_out=False)) for seed in SEEDS]
        values = NETWORKS[network].places * batch
        rows.append(
            {"network": network, "contender": contender, "batch": batch, "values": values, "rate": rate,
             "sweep": {f"{r:g}": score for r, score in scores.items()}, "runs": runs}
        )  # fmt: skip
    return rows


COLUMNS = {
    "eval mode": "eval",
    "recalibrated": "recalibrated_batch",
    "recalibrated, upstream=population": "recalibrated_population",
    "train mode": "train",
}


def cells_of(row: dict[str, Any]) -> list[str]:
    """Mean, smallest and largest of the seeds."""
    cells = [row["network"], str(row["batch"]), str(row["values"]), CONTENDERS[row["contender"]].title]
    cells.append(f"{row['rate']:g}")
    for key in COLUMNS.values():
        scores = [run.get(key) for run in row["runs"]]
        known = [score for score in scores if score is not None]
        low_high = f" ({100 * min(known):.1f} to {100 * max(known):.1f})" if known else ""
        cells.append(f"{mean(known):.1%}{low_high}" if len(known) == len(scores) else "-")
    return cells


def report(rows: list[dict[str, Any]], out: Path) -> None:
    headings = ["network", "batch", "values per channel, smallest layer", "statistics", "learning rate", *COLUMNS]
    table = Table(*headings, title=f"Accuracy on the test images: mean of {len(SEEDS)} seeds (lowest to highest)")
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * 2}---|{'---:|' * 5}"]
    for row in rows:
        table.add_row(*cells_of(row))
        lines.append(f"| {' | '.join(cells_of(row))} |")
    lines += ["", "| network, batch, statistics | learning rate: held-out accuracy |", "|---|---|"]
    for row in rows:
        sweep = ", ".join(f"{rate}: {score:.1%}" for rate, score in row["sweep"].items())
        lines.append(f"| {row['network']}, {row['batch']}, {CONTENDERS[row['contender']].title} | {sweep} |")
    (out / "results.md").write_text("\n".join(lines) + "\n")
    (out / "results.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
    Console(width=200).print(table)


def plot(rows: list[dict[str, Any]], path: Path, network: str = "fully connected") -> None:
    """One panel per batch size: accuracy in eval mode against images seen; a band from the lowest to the highest."""
    from matplotlib.figure import Figure  # without pyplot: the user's backend stays as it is
    from matplotlib.ticker import PercentFormatter

    batches = NETWORKS[network].batches
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True)
    gains = {}
    for axes, batch in zip(panels, batches, strict=True):
        ends = {}
        for row in rows:
            if row["network"] != network or row["batch"] != batch or CONTENDERS[row["contender"]].head_only:
                continue
            look = CONTENDERS[row["contender"]]
            curves = [[point["accuracy"] for point in run["curve"]] for run in row["runs"]]
            x = [point["images"] / 1000 for point in row["runs"][0]["curve"]]
            low, high = ([pick(at) for at in zip(*curves, strict=True)] for pick in (min, max))
            middle = [mean(at) for at in zip(*curves, strict=True)]
            axes.plot(x, middle, look.dash, color=look.color, linewidth=2)
            axes.fill_between(x, low, high, color=look.color, alpha=0.2, linewidth=0)
            ends[row["contender"]] = middle[-1]
            if batch == batches[0]:
                axes.annotate(
                    look.title, LABELS[row["contender"]], color="#2b7ab8" if look.title == "Batch" else look.color,
                    fontsize=10, fontweight="bold",
                )  # fmt: skip
        gains[batch] = 100 * (ends["renorm"] - ends["batch"])
        axes.set_title(f"batches of {batch}", fontsize=10)
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, eval mode")
    figure.supxlabel("training images seen (thousands)", fontsize=10)
    last, first = max(batches), min(batches)
    message = f"{gains[last]:+.1f} points with {last} images, {gains[first]:+.1f} with {first}"
    figure.suptitle(f"Renorm's gain over Batch grows as batches shrink: {message}", x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=150)


# Where in the first panel a line's name stands: thousands of images, accuracy.
LABELS = {"renorm": (6.0, 0.71), "batch": (10.8, 0.45), "none": (7.5, 0.25)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results-tiny"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = measure(Laboratory(out))
    report(rows, out)
    plot(rows, out / "tiny-batches.png")


if __name__ == "__main__":
    main()

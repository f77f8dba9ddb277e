"""experiments/: each runs at its quick size, concludes, draws; a claim that fails is "not confirmed", not an error."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from batchnorm.experiments import NAMES, load, runner
from batchnorm.experiments.annealing import chosen
from batchnorm.experiments.claim import Cell, Record, Result
from batchnorm.experiments.cost import LAYERS as COST
from batchnorm.experiments.gradient_quality import law
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.runner import run
from batchnorm.experiments.shift import drift
from batchnorm.experiments.throughput import NETWORKS as THROUGHPUT
from batchnorm.experiments.worth import Share, share_of
from batchnorm.racing import zoo
from batchnorm.racing.data import Images, load_images
from batchnorm.racing.score import Curves, interval

# Exact claims. In a record: what, made so large, must turn the verdict.
SPOILS = {"capacity": "with_eps", "scale": "output, eps=0", "convolution": "per_map"}
# Claims about training and times. What each of its runs gives where the claim holds, and where it does not.
LEARNS: dict[str, Callable[[Cell, bool], Record]] = {
    "steps": lambda cell, holds: {
        "curve": reaching(0.9, 5 if cell["contender"] == "bn-x5" and holds else 100),
        "status": "finished",
    },
    "mnist": lambda cell, holds: {"curve": curve(0.9 if cell["batch_norm"] and holds else 0.8)},
    "shift": lambda cell, holds: {
        "drift": 0.3 if cell["batch_norm"] and holds else 1.0,
        "gradient_change": 0.2,
        "steps": [0, 10],
        "unit": [[-1.0, 0.0, 1.0], [-1.0, 0.1, 1.0]],
    },
    "saturation": lambda cell, holds: {
        "accuracy": 0.85 if cell["batch_norm"] and holds else 0.3,
        "saturated": [(0, 0.1), (60, 0.2)],
    },
    "initialization": lambda cell, holds: {
        "accuracy": 0.8 if abs(math.log10(cell["scale"])) < (1.1 if cell["batch_norm"] and holds else 0.4) else 0.1
    },
    "learning-rate": lambda cell, holds: {
        "accuracy": 0.8 if cell["rate"] < (2 if cell["batch_norm"] and holds else 0.2) else 0.1,
        "loss_range": 0.1,
        "gradient_change": 0.5,
    },
    "gradients": lambda cell, holds: {
        "norms": 2 * [[(0.0 if cell["batch_norm"] and holds else 0.1) * layer for layer in range(cell["depth"])]]
    },
    "regularization": lambda cell, holds: {
        "train": 0.9,
        "test": (0.85 if holds else 0.7) if cell["batch_norm"] and not cell["dropout"] else 0.8,
        "noise": 0.1 if cell["batch_norm"] else 0.0,
    },
    "gradient-quality": lambda cell, holds: {
        "errors": {str(2**i): 300 / 2 ** (i * (1 if holds else 0.5)) for i in range(cell["batch_norm"], 13)}
    },
    "throughput": lambda cell, holds: {
        "rates": {name: [100 * m ** (0.5 if holds else 0.1) for m in cell["sizes"]] for name in THROUGHPUT}
    },
    "inference": lambda cell, holds: {
        "alone": 1e-15 if holds else 1e-3,
        "folded": 1e-15,
        "batch_statistics": 0.5,
        "curve": [(10, 0.2, 0.5, 0.5), (20, 0.4, 0.6, 0.6)],
    },
    "ensemble": lambda cell, holds: {"single": 6 * [0.8], "together": [*(5 * [0.8]), 0.85 if holds else 0.8]},
    "cost": lambda cell, holds: {
        "curve": reaching(0.9, 20 if cell["what"] == "fast" and holds else 100),
        "status": "finished",
        "seconds": {"without BN": 1.0, **dict.fromkeys(COST, 1.2)},
    },
    "worth": lambda cell, holds: {
        "ends": cell["seeds"] * [0.8 - 0.02 * math.log2(cell["divisor"] * (worth(cell) if holds else 0.9))]
        if cell["batch_norm"]
        else cell["seeds"] * [0.8 - 0.02 * math.log2(cell["divisor"])],
        "rate": 0.01,
        "at_edge": False,
    },
}
# What makes a run of each short; the others of those that learn take "steps".
SHORT: dict[str, Cell] = {
    "steps": {"steps": 15},
    "capacity": {"steps": 5},
    "cost": {"steps": 15},
    "gradients": {"steps": 2},
    "gradient-quality": {"steps": 5, "examples": 300, "draws": 2},
    "throughput": {"sizes": [1, 256], "rounds": 3},
    "inference": {"steps": 10},
    "ensemble": {"steps": 3},
    "regularization": {"steps": 20},
    "learning-rate": {"steps": 20},
    "worth": {"steps": 16},
}


def worth(cell: Cell) -> float:
    if cell["skips"]:
        return 0.9
    return {"relu": 3 / cell["depth"], "tanh": 0.2, "sigmoid": 0.1}[str(cell["activation"])]


def curve(best: float) -> list[tuple[int, float]]:
    return [(step, best * step / (step + 10)) for step in range(4, 101, 4)]


def reaching(best: float, at: int) -> list[Record]:
    return [{"step": step, "score": best * min(1, step / at)} for step in range(5, 101, 5)]


@pytest.mark.parametrize("name", LEARNS)
def test_a_verdict_follows_from_what_was_measured(name: str) -> None:
    experiment = load(name)
    for holds, verdict in ((True, "confirmed"), (False, "not confirmed")):
        records = [cell | LEARNS[name](cell, holds) for cell in experiment.cells(False, 3)]
        result = experiment.conclude(records)
        assert result.verdict == verdict
        drawn(result)


LONG = {
    "cost",
    "inference",
    "initialization",
    "steps",
    "ensemble",
    "mnist",
    "gradients",
    "throughput",
    "saturation",
    "worth",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in LEARNS])
def test_short_runs_are_measured_and_concluded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "load_images", few_test_images)
    experiment, short = load(name), SHORT.get(name, {"steps": 50})
    records = [cell | short | experiment.measure(**cell | short) for cell in experiment.cells(True, 1)]
    drawn(experiment.conclude(records))


def few_test_images(directory: str | None = None) -> Images:
    images = load_images(directory)
    return replace(images, test_images=images.test_images[:300], test_labels=images.test_labels[:300])


def test_every_experiment_is_tested() -> None:
    assert {*SPOILS, *LEARNS} == set(NAMES)


def drawn(result: Result) -> None:
    assert result.rows
    assert {tuple(row) for row in result.rows} == {tuple(result.rows[0])}
    figure = Figure()
    result.draw(figure)
    assert figure.get_suptitle()


@pytest.mark.parametrize("name", SPOILS)
def test_runs_concludes_draws_and_would_notice(name: str) -> None:
    experiment = load(name)
    assert experiment.claim.name == name
    short = SHORT.get(name, {})
    records = [cell | short | experiment.measure(**cell | short) for cell in experiment.cells(True, 1)]
    result = experiment.conclude(records)
    assert result.verdict == "confirmed"  # these are exact
    drawn(result)
    spoiled = copy.deepcopy(records)
    value = spoiled[0][SPOILS[name]]
    spoiled[0][SPOILS[name]] = [1.0] * len(value) if isinstance(value, list) else 1.0
    assert experiment.conclude(spoiled).verdict == "not confirmed"


def test_run_is_the_whole_experiment() -> None:
    assert run("scale", quick=True, seeds=2).headline == run("scale", quick=True, seeds=2).headline


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r'unknown experiment "speed". Known: steps, mnist, '):
        load("speed")


def test_intervals_against_known_answers() -> None:
    """Mean 2, deviation 1, n = 3: t = 4.302653, half width 4.302653 / sqrt(3)."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138))
    assert interval([0.5]) is None
    assert with_interval([0.1, 0.2, 0.3]) == "20.00% ± 24.84"
    assert with_interval([0.25]) == "25.00%"


def test_statistics_of_experiments_against_known_answers() -> None:
    assert law({m: 300 / m for m in (1, 2, 4, 8)}) == pytest.approx((-1, 300))
    # Two units, two times; percentiles (-1, 0, 1) move by 1 altogether for the first, not at all for the second.
    percentiles_TPU = torch.tensor([[[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]], [[0.0, -1.0], [1.0, 0.0], [2.0, 1.0]]])
    assert drift(percentiles_TPU) == pytest.approx((1 / 2 + 0) / 2)


def test_shares_of_the_steps_against_known_answers() -> None:
    """Ends that rise by 0.1 with each doubling of the budget, from 0.4 at N / 16 to 0.8 at N; then moved by some."""
    log_budgets = np.log([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])

    def share(without: float, with_bn: float) -> Share:
        ends, ends_with = (Curves(log_budgets, np.linspace(top - 0.4, top, 5)[None]) for top in (without, with_bn))
        return share_of(ends, ends_with, np.arange(1))

    assert str(share(0.8, 0.8)) == "100%"
    assert share(0.7, 0.8).value == pytest.approx(1 / 2)
    assert share(0.7, 0.85).value == pytest.approx(2**-1.5)  # linear in the logarithm
    assert share(0.8, 0.7).value == pytest.approx(2)  # to what BN ends at
    assert str(share(0.6, 0.95)) == "9%"
    assert str(share(0.5, 0.95)) == "≤6%"  # there already with the smallest budget
    assert str(share(0.95, 0.5)) == "≥16.0x"
    assert str(share(0.2, 0.5)) == "never without"
    assert str(share(0.5, 0.2)) == "never with BN"
    assert str(share(0.1, 0.1)) == "neither"


def test_a_rate_at_the_edge_that_wins_gets_one_more_beyond_it() -> None:
    def score(best: float) -> Callable[[float, int], float]:
        return lambda rate, seed: -abs(math.log(rate / best))

    inside = chosen(score(0.03), (0.01, 0.03, 0.1))
    assert (inside["rate"], inside["at_edge"], len(inside["tried"])) == (0.03, False, 3)
    beyond = chosen(score(0.3), (0.01, 0.03, 0.1))
    assert beyond["rate"] == pytest.approx(0.33)
    assert len(beyond["tried"]) == 5
    assert chosen(score(1e-9), (0.01, 0.03, 0.1))["at_edge"]


def test_cells_that_take_times_come_last_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(jobs: list[tuple[str, Cell]], out: Path, workers: int) -> Iterator[tuple[str, Cell]]:
        seen.append(({name for name, _ in jobs}, {str(cell.get("what")) for _, cell in jobs}, workers))
        yield from jobs

    monkeypatch.setattr(runner, "measured", measured)
    names = ["throughput", "cost", "scale"]
    with pytest.raises(FileNotFoundError):  # nothing was measured
        list(runner.run_all(names, quick=True, seeds=1, out=tmp_path, workers=2, console=Console(quiet=True)))
    assert seen == [
        ({"cost", "scale"}, {"baseline", "fast", "None"}, 2),
        ({"throughput", "cost"}, {"seconds", "None"}, 1),
    ]


def test_a_log_is_told_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_LINES", 0)
    cells = len(load("scale").cells(True, 2))
    list(runner.run_all(["scale"], quick=True, seeds=2, out=tmp_path, workers=1, console=Console()))
    told = capsys.readouterr().out.split("\n")
    assert [line.strip() for line in told if line.strip()] == [f"scale: {i + 1} of {cells} cells" for i in range(cells)]


@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_is_said(name: str) -> None:
    """A number, or a comparison, in words."""
    said = load(name).claim.confirmed_if
    assert len(said.split()) > 6

"""experiments/: each runs at its quick size, concludes, draws; a claim that fails is "not confirmed", not an error."""

import copy
import math
from collections.abc import Callable

import pytest
from matplotlib.figure import Figure

from batchnorm.experiments import NAMES, load
from batchnorm.experiments.claim import Cell, Record, Result
from batchnorm.experiments.numbers import with_interval
from batchnorm.experiments.runner import run
from batchnorm.racing.score import interval

# Exact claims. In a record: what, made so large, must turn the verdict.
SPOILS = {"capacity": "with_eps", "scale": "output, eps=0", "convolution": "per_map"}
# Claims about training. What each of its runs gives where the claim holds, and where it does not.
LEARNS: dict[str, Callable[[Cell, bool], Record]] = {
    "mnist": lambda cell, holds: {"curve": curve(0.9 if cell["batch_norm"] and holds else 0.8)},
    "saturation": lambda cell, holds: {
        "accuracy": 0.85 if cell["batch_norm"] and holds else 0.3,
        "saturated": [(0, 0.1), (60, 0.2)],
    },
    "initialization": lambda cell, holds: {
        "accuracy": 0.8 if abs(math.log10(cell["scale"])) < (1.1 if cell["batch_norm"] and holds else 0.4) else 0.1
    },
}


def curve(best: float) -> list[tuple[int, float]]:
    return [(step, best * step / (step + 10)) for step in range(4, 101, 4)]


@pytest.mark.parametrize("name", LEARNS)
def test_a_verdict_follows_from_what_was_measured(name: str) -> None:
    experiment = load(name)
    for holds, verdict in ((True, "confirmed"), (False, "not confirmed")):
        records = [cell | LEARNS[name](cell, holds) for cell in experiment.cells(False, 3)]
        result = experiment.conclude(records)
        assert result.verdict == verdict
        drawn(result)


@pytest.mark.parametrize("name", LEARNS)
def test_short_runs_are_measured_and_concluded(name: str) -> None:
    experiment = load(name)
    records = [short | experiment.measure(**short) for c in experiment.cells(True, 1) for short in [c | {"steps": 50}]]
    drawn(experiment.conclude(records))


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
    records = [cell | experiment.measure(**cell) for cell in experiment.cells(True, 1)]
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
    with pytest.raises(ValueError, match=r'unknown experiment "speed". Known: mnist, '):
        load("speed")


def test_intervals_against_known_answers() -> None:
    """Mean 2, deviation 1, n = 3: t = 4.302653, half width 4.302653 / sqrt(3)."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138))
    assert interval([0.5]) is None
    assert with_interval([0.1, 0.2, 0.3]) == "20.00% ± 24.84"
    assert with_interval([0.25]) == "25.00%"

"""Learning rates and budgets that were chosen on held-out examples, and how one is chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from batchnorm.racing.errors import RaceError

TUNED_FILE = Path(__file__).with_name("tuned.json")


def best_rate(scores: Mapping[str, Sequence[float]]) -> str:
    """The rate with the best mean score; of equals, the one nearest to the middle of the sweep."""
    rates = list(scores)
    return max(rates, key=lambda rate: (mean(scores[rate]), -abs(rates.index(rate) - (len(rates) - 1) / 2)))


def stored_speeds(task: str, mode: str) -> dict[str, float]:
    """The budgets of contenders of a built-in task, as ``decay_speed``, chosen on held-out examples."""
    stored = json.loads(TUNED_FILE.read_text()).get(task, {})
    return {name: float(speed) for name, speed in stored.get(mode, {}).get("speeds", {}).items()}


def read_tuned(task: str, mode: str, file: Path, batch_size: int) -> tuple[dict[str, float], dict[str, int]]:
    """The learning rate of each tuned contender, and the baseline's steps in its sweep.

    The rate is the one with the best held-out score. What was not swept at a budget takes the rate of the default one.
    Sweeps in batches of another size do not count.
    """
    try:
        stored = json.loads(file.read_text()).get(task, {})
        sweeps = {
            m: sweep
            for m, sweep in stored.items()
            if "scores" in sweep and sweep.get("batch_size", batch_size) == batch_size
        }
        found = [sweeps[m] for m in ("default", mode) if m in sweeps]
        scores = {name: rates for sweep in found for name, rates in sweep["scores"].items()}
        steps = {name: int(sweep["steps"]) for sweep in found if "steps" in sweep for name in sweep["scores"]}
        return {name: float(best_rate(rates)) for name, rates in scores.items()}, steps
    except OSError as error:
        raise RaceError(f"the learning rates in {file} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RaceError(f"{file} is not a tuning.json written by `batchnorm race --tune`.") from None

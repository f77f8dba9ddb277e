"""Means over seeds with their intervals, and how numbers are written in tables.

Comes from: records of experiments. Goes to: their tables and verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Confidence interval of the mean (Student's t); None for a single value."""
    if len(values) < 2:
        return None
    from scipy import stats

    low, high = stats.t.interval(confidence, len(values) - 1, loc=mean(values), scale=stats.sem(values) or 1e-300)
    return float(low), float(high)


def with_interval(values: Sequence[float], form: str = "{:.2%}") -> str:
    """Mean, and half the width of its interval."""
    found = interval(values)
    text = form.format(mean(values))
    return text if found is None else f"{text} ± {form.format((found[1] - found[0]) / 2).removesuffix('%')}"

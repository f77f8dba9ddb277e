"""Means over seeds with their intervals, as tables have them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from batchnorm.racing.score import interval


def with_interval(values: Sequence[float], form: str = "{:.2%}") -> str:
    """Mean, and half the width of its interval."""
    found = interval(values)
    text = form.format(mean(values))
    return text if found is None else f"{text} ± {form.format((found[1] - found[0]) / 2).removesuffix('%')}"

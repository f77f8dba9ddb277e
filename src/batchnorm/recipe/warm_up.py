"""The learning rate's course in a recipe that brings its optimizer."""

from __future__ import annotations


class UpAndDown:
    """A factor for ``LambdaLR``: linearly up over a share of the steps, then linearly down to 0.

        min((step + 1) / (warm_up steps), (1 - step / steps) / (1 - warm_up)),  at least 0

    Args:
        steps: of the whole training.
        warm_up: the share, at least 0, below 1.

    Example:
        >>> [UpAndDown(10, 0.2)(step) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, steps: int, warm_up: float) -> None:
        self.steps, self.warm_up = steps, warm_up

    def __call__(self, step: int) -> float:
        rising = (step + 1) / (self.warm_up * self.steps) if self.warm_up else 1.0
        return max(0.0, min(1.0, rising, (1 - step / self.steps) / (1 - self.warm_up)))

"""Which batches a step of a Lightning training takes, and where its epochs end."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Epochs:
    """Epochs of so many batches. A step takes ``accumulate`` of them, an epoch's last step what is left of it."""

    batches: int
    accumulate: int = 1

    @property
    def steps(self) -> int:
        """Of one epoch."""
        return -(-self.batches // self.accumulate)

    def batches_until(self, step: int) -> int:
        """Batches that so many steps have taken."""
        epoch, rest = divmod(step, self.steps)
        return epoch * self.batches + rest * self.accumulate

    def steps_until(self, batch: int) -> int:
        """Steps that are complete after so many batches."""
        epoch, rest = divmod(batch, self.batches)
        return epoch * self.steps + rest // self.accumulate

    def stepped(self, steps: int, every: int) -> int:
        """How often, in so many steps, one came after a batch whose number in its epoch ``every`` divides."""
        epoch, rest = divmod(steps, self.steps)
        return epoch * self._stepped(self.steps, every) + self._stepped(rest, every)

    def _stepped(self, steps: int, every: int) -> int:
        """The same, in the first steps of one epoch."""
        whole = self.batches // self.accumulate
        shorter = steps > whole and self.batches % every == 0
        return min(steps, whole) // (every // math.gcd(every, self.accumulate)) + shorter

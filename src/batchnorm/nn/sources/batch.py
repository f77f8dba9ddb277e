"""The statistics of the batch: torch's.

Shapes: as in ``source``.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.nn.sources.source import Source


@dataclass(frozen=True)
class Batch(Source):
    """The mean and biased variance of the batch: the default, Algorithm 1.

    A batch with one value per channel has no variance: it raises in training, as in torch. (With a mask that leaves one
    value, y is the bias and the running mean alone moves.)

    Example:
        >>> import torch, batchnorm as bn
        >>> bn.BatchNorm1d(3).statistics
        Batch()
    """

    whole_batch = True

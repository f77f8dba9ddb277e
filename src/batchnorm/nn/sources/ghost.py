"""Ghost batches: statistics of each few examples by themselves.

Shapes: as in ``source``.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor

from batchnorm.nn.sources.source import Source
from batchnorm.ops import groups
from batchnorm.ops.arguments import Affine, Moments
from batchnorm.ops.split import of_batch


@dataclass(frozen=True)
class Ghost(Source):
    """Statistics of each ``size`` examples by themselves (ghost batches, Hoffer et al. 2017): noise of small batches.

    The examples of a group follow one another, or are drawn anew in every step with ``shuffle`` (by torch's global
    generator), so that no example can tell what else is in the batch by its place: batch leakage in contrastive
    learning. The last group takes what is left; one value per channel would have no variance, so it joins the group
    before. The running statistics move towards mean and variance of the whole batch (pooled: within and between
    groups). In eval there are no groups.

    Args:
        size: examples in a group, at least 1.
        shuffle: draw the groups at random.

    Raises:
        ValueError: ``size`` below 1, or a group has one value per channel.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm1d(3, statistics=bn.Ghost(8))
        >>> x = torch.randn(20, 3)
        >>> torch.equal(layer(x)[8:16], bn.BatchNorm1d(3)(x[8:16]))
        True

    Source: Hoffer, Hubara & Soudry, "Train longer, generalize better", https://arxiv.org/abs/1705.08741.
    """

    size: int
    shuffle: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not hasattr(self.size, "__index__") or self.size < 1:
            raise ValueError(f"Ghost takes the number of examples in a group, at least 1 (got {self.size!r}).")
        object.__setattr__(self, "size", index(self.size))

    def normalize(self, x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, known: Any) -> tuple[Tensor, Moments]:
        """y, and the moments of the whole batch."""
        examples = x_NCS.shape[0]
        if examples <= self.size:
            return of_batch(x_NCS, affine, mask_N1S)
        places = x_NCS[0, 0].numel()
        many = -(-examples // self.size)
        if places * (examples - (many - 1) * self.size) == 1:
            many -= 1
        if places * self.size == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training: Ghost(1) of {tuple(x_NCS.shape)} has one in "
                "each group; use a larger size."
            )
        if not self.shuffle:
            return groups.normalize_groups(x_NCS, affine, mask_N1S, self.size, many)
        order = torch.randperm(examples, device=x_NCS.device)
        back, residual = order.argsort(), affine.residual_NCS
        y, moments = groups.normalize_groups(
            groups.reordered(x_NCS, order, back),
            affine._replace(residual_NCS=None if residual is None else groups.reordered(residual, order, back)),
            None if mask_N1S is None else mask_N1S[order],
            self.size,
            many,
        )
        return groups.reordered(y, back, order), moments

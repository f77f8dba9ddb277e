"""Where a layer's training statistics come from: the value of its ``statistics=``, and what one of your own has to say.

Shapes: N examples, C channels, S places. x_NCS is (N, C, ...), mask_N1S its like in bool, True where a place counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from batchnorm.ops.arguments import Affine, Moments
from batchnorm.ops.split import differentiable, differentiable_statistics, of_batch


class Source:
    """Where training statistics come from. A subclass is a value: it holds its settings, and the layer its state.

    The layer, ``recalibrate`` and the converters ask what is here, and know no source by name. Settings are best those
    of a frozen dataclass, whose repr and equality they then are. The default is what ``Batch`` does.

    Attributes:
        whole_batch: training normalizes by mean and biased variance of the whole batch, so that one kernel does it all
            and ``normalize``, ``after`` and ``moved`` are not called without a mask.
        beyond_batch: the moments are of other values too than those of the batch at hand: one value per channel may be
            enough.
        initial: names of the buffers that a layer gets from the source, each with the value of a layer that has seen
            nothing. They are saved; a state_dict may lack them.

    Example:
        >>> import torch, batchnorm as bn
        >>> class Halves(bn.Source):  # of the first half of the examples alone, for all of them
        ...     def normalize(self, x_NCS, affine, mask_N1S, known):
        ...         moments = self.moments(x_NCS[: len(x_NCS) // 2])
        ...         return self.apply(x_NCS, moments, affine), moments
        >>> layer = bn.BatchNorm1d(3, statistics=Halves())
        >>> layer(torch.randn(8, 3))[:4].mean().abs() < 1e-6
        tensor(True)
    """

    whole_batch: ClassVar[bool] = False
    beyond_batch: ClassVar[bool] = False
    initial: ClassVar[Mapping[str, float]] = MappingProxyType({})

    def buffers(self, layer: nn.Module) -> dict[str, Tensor]:
        """The buffers of ``initial``, for a layer that gets this source.

        Raises:
            ValueError: the layer lacks what the source needs.
        """
        return {}

    def known(self, layer: nn.Module) -> Any:
        """What ``normalize`` has to know of the layer as it is before the batch; a copy, where the batch changes it."""
        return None

    def normalize(self, x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, known: Any) -> tuple[Tensor, Moments]:
        """y, and the moments that the running statistics move towards."""
        return of_batch(x_NCS, affine, mask_N1S)

    def after(self, layer: nn.Module, known: Any, moments: Moments) -> None:
        """Called after a batch that moves the running statistics; not where a forward is repeated."""
        self.moved(layer, moments.values)

    def moved(self, layer: nn.Module, values: Tensor) -> None:
        """Called when the running statistics move towards moments of so many values: for several micro-batches once."""

    def in_recalibrate(self, known: Any) -> Source:
        """What ``recalibrate`` trains with, in this process alone; ``known`` is of before."""
        return self

    @staticmethod
    def moments(x_NCS: Tensor, mask_N1S: Tensor | None = None) -> Moments:
        """Mean and biased variance of each channel, and of how many values; differentiable."""
        return differentiable_statistics(x_NCS, mask_N1S)[1]

    @staticmethod
    def apply(x_NCS: Tensor, moments: Moments, affine: Affine, mask_N1S: Tensor | None = None) -> Tensor:
        """y by these moments: xhat, weight, bias, residual and activation; 0 where the mask is False.

        In torch's own ops, so that the gradient is right whatever the moments are of: detach those that are constants.
        """
        if affine.residual_NCS is not None and mask_N1S is not None:
            affine = affine._replace(residual_NCS=affine.residual_NCS.where(mask_N1S, 0))
        x_NCS, affine = affine.in_one_dtype(x_NCS)
        y = differentiable(x_NCS if mask_N1S is None else x_NCS.where(mask_N1S, 0), moments, affine)
        return y if mask_N1S is None else y.where(mask_N1S, 0)


def names_of_buffers() -> Iterator[str]:
    """The names of the buffers of all sources that there are."""
    kinds = [Source]
    for kind in kinds:
        kinds += kind.__subclasses__()
        yield from kind.initial

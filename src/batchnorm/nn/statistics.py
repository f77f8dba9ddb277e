"""Sources of training statistics: the value of a layer's ``statistics=``.

Shapes: N examples, C channels, S places. x_NCS is (N, C, ...), mask_N1S its like in bool, True where a place counts.
Each source gives y and the moments that the running statistics move towards; it holds no state and changes none. A new
source is one class here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.nn import ranks
from batchnorm.ops import groups, split
from batchnorm.ops.split import Affine, Moments


class Running(NamedTuple):
    """A layer's state before a batch: its running statistics, and the steps that ``Renorm`` counts.

    ``seen_C``: that batch's mean, by which a forward that is repeated for checkpointing finds what it knew at first.
    """

    mean_C: Tensor
    var_C: Tensor
    steps: Tensor
    seen_C: Tensor | None = None

    @staticmethod
    def before(history: list[Running], mean_C: Tensor) -> Running:
        """The state before the last batch with this mean; does not wait for the device."""
        history = history[::-1]
        seen_KC = torch.stack([known.seen_C for known in history])  # type: ignore[misc]
        nearest = (seen_KC - mean_C).abs().sum(1).argmin(0, keepdim=True)  # t[nearest[0]] would wait
        return Running(*(torch.stack(t)[nearest][0] for t in zip(*(known[:3] for known in history), strict=True)))


# Of one layer, or of the batches that it saw last.
Known = Running | list[Running] | None


@dataclass(frozen=True)
class Batch:
    """The mean and biased variance of the batch: the default, Algorithm 1.

    A batch with one value per channel has no variance: it raises in training, as in torch. (With a mask that leaves one
    value, y is the bias and the running mean alone moves.)

    Example:
        >>> import torch, batchnorm as bn
        >>> bn.BatchNorm1d(3).statistics
        Batch()
    """

    def normalize(
        self, x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, running: Known
    ) -> tuple[Tensor, Moments]:
        """y, and the moments of the values that count."""
        return split.of_batch(x_NCS, affine, mask_N1S)


@dataclass(frozen=True)
class Ghost:
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

    def normalize(
        self, x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, running: Known
    ) -> tuple[Tensor, Moments]:
        """y, and the moments of the whole batch."""
        examples = x_NCS.shape[0]
        if examples <= self.size:
            return Batch().normalize(x_NCS, affine, mask_N1S, running)
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


@dataclass(frozen=True)
class Renorm:
    """Batch Renormalization (Ioffe 2017): train with what eval will use, for tiny or dependent batches.

        y = weight * (xhat * r + d) + bias,   xhat = (x - mu) / sigma,
        r = clip(sigma / sigma_run, 1 / r_max, r_max),   d = clip((mu - mu_run) / sigma_run, -d_max, d_max)

    with sigma = sqrt(var + eps), and mu_run, sigma_run of the running statistics. r and d are constants to the
    gradient. Without clipping, y is what eval gives. r_max and d_max grow from 1 and 0, where y is ordinary batch
    normalization, to the given values, linearly between the steps of ``schedule``; the layer counts steps in the buffer
    ``renorm_steps`` (saved), where it saw at least one value. Under activation checkpointing a forward that is repeated
    finds, among the layer's last 32 batches, what it corrected towards the first time.

    With two values per channel, (2, C), xhat is +1 and -1 whatever x is: y is right, but hardly a gradient goes through
    it to what lies below, as with batch statistics.

    Args:
        r_max, d_max: how far the batch is corrected in the end; at least 1 and 0.
        schedule: (first, last) step between which r_max grows, and the same of d_max; default: the paper's.

    Raises:
        ValueError: ``r_max`` below 1, ``d_max`` below 0, steps that do not grow; in training one value per channel.

    Example:
        >>> import torch, batchnorm as bn
        >>> layer = bn.BatchNorm2d(3, statistics=bn.Renorm())
        >>> layer(torch.randn(2, 3, 8, 8)).shape, layer.renorm_steps.item()
        (torch.Size([2, 3, 8, 8]), 1)

    Source: Ioffe, "Batch Renormalization", https://arxiv.org/abs/1702.03275.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    schedule: tuple[tuple[int, int], tuple[int, int]] = ((5_000, 40_000), (5_000, 25_000))

    def __post_init__(self) -> None:
        for value, least in ((self.r_max, 1), (self.d_max, 0)):
            if not isinstance(value, int | float) or not value >= least:
                raise ValueError(
                    f"Renorm takes r_max of at least 1 and d_max of at least 0 (got {self.r_max!r}, {self.d_max!r})."
                )
        try:
            grows = len(self.schedule) == 2 and all(0 <= first <= last for first, last in self.schedule)
        except (TypeError, ValueError):
            grows = False
        if not grows:
            raise ValueError(
                "Renorm takes schedule=((first, last), (first, last)), the steps between which r_max and d_max grow "
                f"(got {self.schedule!r})."
            )

    def normalize(
        self, x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, running: Known
    ) -> tuple[Tensor, Moments]:
        """y, and the moments of the batch."""
        x_NCS, moments = split.statistics(x_NCS, mask_N1S)
        assert running is not None
        if isinstance(running, list):
            running = Running.before(running, moments.mean_C)
        dtype = torch.promote_types(x_NCS.dtype, torch.float32)
        r_C, d_C = (t.to(dtype) for t in self._corrections(moments, running, affine.eps))
        weight_C, bias_C = affine.weight_C, affine.bias_C  # weight * (xhat * r + d) + bias is another weight and bias
        shift_C = d_C if weight_C is None else weight_C * d_C
        affine = affine._replace(
            weight_C=r_C if weight_C is None else weight_C * r_C, bias_C=shift_C if bias_C is None else bias_C + shift_C
        )
        return split.normalize(x_NCS, moments, affine, mask_N1S), moments

    def _corrections(self, moments: Moments, running: Running, eps: float) -> tuple[Tensor, Tensor]:
        mean_C, var_C = moments.mean_C.detach(), moments.var_C.detach()
        sigma_C = (running.var_C.double() + eps).sqrt()
        r_max = 1 + self._limit(self.r_max - 1, running.steps, *self.schedule[0])
        d_max = self._limit(self.d_max, running.steps, *self.schedule[1])
        r_C = torch.minimum(torch.maximum((var_C + eps).sqrt() / sigma_C, 1 / r_max), r_max)
        d_C = torch.minimum(torch.maximum((mean_C - running.mean_C) / sigma_C, -d_max), d_max)
        return r_C, d_C

    @staticmethod
    def _limit(in_the_end: float, steps: Tensor, first: int, last: int) -> Tensor:
        """0 up to the first step, ``in_the_end`` (which may be infinite) from the last one on."""
        share = (
            ((steps.double() - first) / max(last - first, 1)).clamp(0, 1) if last > first else (steps >= first).double()
        )
        return (share * in_the_end).where(share > 0, 0)


@dataclass(frozen=True)
class Synced:
    """The batch of all processes of a torch.distributed group, which may have different numbers of examples, or none.

    Forward gathers 2 C + 1 numbers of each rank in one collective, backward adds up 2 C in another; in eval nothing is
    sent. Every rank must run the layer as often as the others, with gradients for its input on all ranks or on none.
    Gradients of weight and bias are the rank's own: DistributedDataParallel and FSDP average them. Works on gloo (CPU
    too) and nccl, with ``mask``, under activation checkpointing; torch.compile breaks the graph here.

    On gloo a rank that was killed or does not arrive gives the others an error that names the layer and the rank within
    the group's time-out. On nccl torch's watchdog ends the process when a collective takes longer than the time-out of
    ``init_process_group`` (TORCH_NCCL_ASYNC_ERROR_HANDLING=0 would switch that off); with TORCH_NCCL_DUMP_ON_TIMEOUT=1
    its flight recorder tells which collective it was.

    Args:
        process_group: the ranks; default: all of them.
        layer: a name for errors; ``convert_sync_batchnorm`` sets it.

    Raises:
        ValueError: in training, without ``torch.distributed.init_process_group``.
        RuntimeError: another rank is gone; a second derivative, or one of torch.func, is asked for.

    Example:
        >>> import batchnorm as bn
        >>> bn.BatchNorm2d(64, statistics=bn.Synced()).statistics
        Synced()
    """

    process_group: Any = None
    layer: str = ""

    def __post_init__(self) -> None:
        _keep_out_of_graphs()

    def __repr__(self) -> str:
        named = [
            f"{name}={value!r}"
            for name, value in (("process_group", self.process_group), ("layer", self.layer))
            if value
        ]
        return f"Synced({', '.join(named)})"

    def __deepcopy__(self, memo: Any) -> Synced:
        return self  # a process group cannot be copied

    def __reduce__(self) -> Any:
        return Synced, (self.process_group, self.layer)  # so that __post_init__ runs in a new process too

    def normalize(
        self, x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, running: Known
    ) -> tuple[Tensor, Moments]:
        """y, and the moments of all ranks' values."""
        if torch.jit.is_tracing():
            raise RuntimeError(
                "synchronized statistics cannot be traced by torch.jit.trace, nor exported by what uses it: a graph "
                "knows nothing of other processes. Trace it in eval, or batchnorm.revert_sync_batchnorm(model)."
            )
        if not split.is_eager():
            raise RuntimeError(
                "synchronized statistics have no derivatives under torch.func and forward-mode AD, which know nothing "
                "of other processes: use another source of statistics there."
            )
        group = ranks.Ranks(self.process_group, self.layer or f"a layer of {x_NCS.shape[1]} channels")
        if group.size == 1 and x_NCS.numel() == x_NCS.shape[1]:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x_NCS.shape)} in a group "
                "of one process: one value has no variance."
            )
        x_NCS, mine = split.statistics(x_NCS, mask_N1S)
        moments = group.merged(mine)
        return split.normalize(x_NCS, moments, affine, mask_N1S, group.sum), moments


@cache
def _keep_out_of_graphs() -> None:
    """Not as a decorator: it imports torch._dynamo, which takes as long as torch itself."""
    Synced.normalize = torch.compiler.disable(Synced.normalize)  # type: ignore[method-assign]


Statistics = Batch | Ghost | Renorm | Synced

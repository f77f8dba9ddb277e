"""The statistics of the batches of all processes of a group.

Shapes: as in ``source``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from batchnorm.nn.sources import ranks
from batchnorm.nn.sources.batch import Batch
from batchnorm.nn.sources.source import Source
from batchnorm.ops.arguments import Affine, Moments
from batchnorm.ops.modes import runs_kernels
from batchnorm.ops.split import by_moments, statistics


@dataclass(frozen=True)
class Synced(Source):
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

    beyond_batch = True

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

    def in_recalibrate(self, known: Any) -> Source:
        """This process' batch: ``recalibrate`` has a ``process_group`` of its own."""
        return Batch()

    def normalize(self, x_NCS: Tensor, affine: Affine, mask_N1S: Tensor | None, known: Any) -> tuple[Tensor, Moments]:
        """y, and the moments of all ranks' values."""
        if torch.jit.is_tracing():
            raise RuntimeError(
                "synchronized statistics cannot be traced by torch.jit.trace, nor exported by what uses it: a graph "
                "knows nothing of other processes. Trace it in eval, or batchnorm.revert_sync_batchnorm(model)."
            )
        if not runs_kernels():
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
        x_NCS, mine = statistics(x_NCS, mask_N1S)
        moments = group.merged(mine)
        return by_moments(x_NCS, moments, affine, mask_N1S, group.sum), moments


@cache
def _keep_out_of_graphs() -> None:
    """Not as a decorator: it imports torch._dynamo, which takes as long as torch itself."""
    Synced.normalize = torch.compiler.disable(Synced.normalize)  # type: ignore[method-assign]

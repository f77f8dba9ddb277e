"""Messages between the processes of a group about one layer's batch, and the names of those missing when that fails.

Shapes: C channels, R ranks.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.ops import split
from batchnorm.ops.arguments import Moments

_LOOK = 0.5  # seconds: how often a rank that waits looks whether another one has given up
_ROLL_CALL = 3.0  # seconds for all to answer then: several looks
_FAILED = "batchnorm/failed"  # keys in the group's store
_HERE = "batchnorm/here/{}"


class Ranks:
    """A process group at the service of one layer."""

    def __init__(self, group: Any, layer: str) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "Default process group has not been initialized: statistics=Synced() needs "
                "torch.distributed.init_process_group() before training (eval does not)."
            )
        self.group: Any = dist.group.WORLD if group is None else group
        if not isinstance(self.group, dist.ProcessGroup):
            raise ValueError(
                f"synchronized statistics of {layer} need a process group that this rank is in, got {group!r}: "
                "pass torch.distributed.new_group(...), or mesh.get_group() of a device mesh."
            )
        self.layer, self.size = layer, dist.get_world_size(self.group)

    def merged(self, moments: Moments) -> Moments:
        """The moments of all ranks' values, added up in the order of ranks: the same bits everywhere."""
        mine = torch.cat(moments)  # mean, variance, count
        everyone = mine.new_empty(self.size * len(mine))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        self._finish(gather(everyone, mine, self.group, async_op=True), "forward", mine.device)
        return split.merged(*everyone.view(self.size, -1).split([len(t) for t in moments], dim=1))

    def sum(self, sums: Tensor) -> Tensor:
        """The sums of all ranks, in place of this one's."""
        self._finish(dist.all_reduce(sums, group=self.group, async_op=True), "backward", sums.device)
        return sums

    def _finish(self, work: Any, stage: str, device: torch.device) -> None:
        """Wait for a collective; on gloo with an eye on the others, since it notices some failures late."""
        backend = self.group._get_backend(device)
        if backend.name() != "gloo":
            work.wait()
            return
        limit = backend.options._timeout.total_seconds()
        roll_call = min(_ROLL_CALL, limit / 3)
        started, look = time.monotonic(), timedelta(seconds=min(_LOOK, roll_call / 3))
        store, silent = self.group.get_group_store(), None
        while True:
            try:
                work.wait(look)
                if silent is not None:  # it came to a good end after all
                    _forget(store, self.group.rank())
                return
            except RuntimeError as error:
                waited = time.monotonic() - started
                if (
                    not work.is_completed()
                    and waited < limit - roll_call
                    and (silent == [] or not _has(store, _FAILED))
                ):
                    continue
                silent = _silent(store, self.group.rank(), self.size, roll_call)
                if _succeeded(work) if work.is_completed() else silent == [] and waited < limit - roll_call:
                    continue
                raise RuntimeError(self._verdict(stage, waited, silent)) from error

    def _verdict(self, stage: str, waited: float, silent: list[int] | None) -> str:
        if silent is None:
            who = "the rendezvous store cannot be reached: the process that holds it (rank 0, without torchrun) is gone"
        elif silent:
            names = " and ".join(f"rank {dist.get_global_rank(self.group, rank)}" for rank in silent)
            who = f"{names} did not answer: killed, stuck, or never in this layer"
        else:
            who = "all ranks are there: did they run the same layers as often, with the same inputs' gradients?"
        return (
            f"synchronized statistics of {self.layer}, {stage} on rank {dist.get_rank()}, failed after {waited:.1f} s "
            f"among {self.size} ranks: {who}."
        )


def _succeeded(work: Any) -> bool:
    try:
        work.wait()
    except RuntimeError:
        return False
    return True


def _has(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except RuntimeError:
        return True  # the store is gone


def _silent(store: Any, rank: int, size: int, seconds: float) -> list[int] | None:
    """Every rank says that it is here; those that have not when the time is up. None where there is no store."""
    silent, until = None, time.monotonic() + seconds
    try:
        store.set(_FAILED, "")
        store.set(_HERE.format(rank), "")
        while silent != [] and time.monotonic() < until:
            silent = [other for other in range(size) if not store.check([_HERE.format(other)])]
            time.sleep(0.05)
    except RuntimeError:  # its process has ended, after a roll call of its own perhaps
        pass
    return silent


def _forget(store: Any, rank: int) -> None:
    """A false alarm."""
    store.delete_key(_FAILED)
    store.delete_key(_HERE.format(rank))

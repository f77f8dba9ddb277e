"""Population statistics: what inference normalizes with (Ioffe & Szegedy 2015, Algorithm 2)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.tracking import updates_running_statistics
from batchnorm.population.attachments import ABSENT, Attached
from batchnorm.population.batches import call_with_inputs, one_value_said, placed, refuse_one_batch
from batchnorm.population.depth import depths, stages
from batchnorm.population.estimators import ESTIMATORS, Estimator, Population
from batchnorm.population.snapshots import check_materialized, let_go, set_aside
from batchnorm.population.watching import STATISTICS, OldStatistics, Watch, batch_in_buffers, counted, place

# What is set on a layer meanwhile: copies that somebody makes have what the layer had.
_SET = ("momentum", "guarded", "counts", "gathering", "held", "_statistics", "_check_input_dim")


class NoStatistics(ValueError):
    """No layer saw a value, or one saw values that are not finite: there are no statistics of them."""


class Shift(NamedTuple):
    """What ``recalibrate`` found for one layer: how far its running statistics had been from the population.

    ``values``: values per channel seen; ``mean_shift``: largest |running mean - E[x]| over the channels, in standard
    deviations of the population; ``variance_ratio``: smallest and largest running variance / Var[x] over the channels.
    A constant channel is infinitely far off where the running one differs, and not at all where it does not.
    """

    layer: str
    values: int
    mean_shift: float
    variance_ratio: tuple[float, float]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    estimator: str = "pooled",
    upstream: str = "batch",
    process_group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> list[Shift]:
    r"""Replace running statistics by population statistics (Ioffe & Szegedy 2015, Algorithm 2), in place.

        pooled:      E[x] = mean of all values,     Var[x] = m / (m - 1) * biased variance of all m values
        batch_mean:  E[x] = mean over batches of mu_B,  Var[x] = mean over batches of m_B / (m_B - 1) * var_B

    Everything but batch normalization (dropout, say) behaves as in eval, whatever mode the model is in. Weights are
    not touched; modes, momentum, hooks and torch's random numbers are as before afterwards, on an exception also the
    statistics. It may run between a forward pass and its backward: buffers stay the same objects, and what that
    backward needs keeps its values. Sums are taken in float64.

    Args:
        model: any module; stock ``torch.nn.BatchNorm*`` layers count too. Only running statistics change;
            ``num_batches_tracked`` becomes the number of batches read. Layers that do not update any are left alone:
            those that have none, are frozen, or have ``track_running_stats`` switched off. It may be wrapped:
            ``DistributedDataParallel`` sends nothing meanwhile.
        batches: iterable of model inputs, each (N, ...); of a tuple or list, as a DataLoader gives with labels, the
            first element, which may be a tuple of several arguments. Read front to back.
        forward: ``forward(model, batch)`` runs the model on one batch; default: ``model(inputs)``; a mapping, as of
            transformers' collators, is given as keyword arguments where the model's forward takes all its keys by name
            (labels too, where they are in it), else as it is.
        max_batches: stop after so many; default: all.
        estimator: "pooled": the same for any split of the same data into batches; "batch_mean": the paper's average.
        upstream: "batch": one pass; all layers normalize by the batch, so that a layer after another one sees what it
            saw in training, which depends on the split. "population": layer after layer, those before it with their new
            statistics already, as in inference: no layer depends on the split. It reads ``batches`` once for each layer
            of the deepest chain, and says on stderr how often that is.
        process_group: pool the values of all ranks of this group, which all must call this; the ranks may have
            different numbers of batches. Default: this process alone, no communication.
        device: where to put batches: tensors and whatever has ``.to``, nested ones too; default: as they come.
        progress: show a progress bar (needs rich).

    Returns:
        One row per layer that was reached, in the order of ``model.named_modules()``: see ``Shift``.

    Raises:
        ValueError: ``batches`` yielded nothing, or nothing that reached a layer, or is an iterator where it is read
            more than once; ``max_batches`` is no positive whole number; an unknown estimator or upstream; a batch gave
            a layer a single value per channel, or one that is not finite; a process group without
            ``torch.distributed.init_process_group``; a lazy layer has no shape yet, or the model is on the meta device.
            Nothing has been changed then.
        TypeError: ``batches`` is itself a batch (a tensor, a mapping), or a mapping has keys of which forward takes
            some only.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> report = recalibrate(model, [torch.randn(32, 4) for _ in range(10)])
        >>> report[0].layer, report[0].values
        ('1', 320)
    """
    check(batches, max_batches, estimator, upstream, process_group)
    check_materialized(model, "recalibrate", runs=True)
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if updates_running_statistics(module)
    }
    for layer in layers.values():
        if isinstance(layer, FusedBatchNorm):
            layer.tell_skipped()
    reader = _Reader(batches, max_batches, device, forward or call_with_inputs, progress)
    old = {name: {key: getattr(layer, key) for key in STATISTICS} for name, layer in layers.items()}
    found: dict[str, Population] = {}
    left: set[str] = set()
    with _set_up(model, layers), torch.no_grad():
        passes = [list(layers)]
        if upstream == "population":
            passes = stages(_largest(depths(model, layers, reader.first), process_group), layers)
            print(f"batchnorm: recalibrate reads the batches {len(passes)} times, once per depth", file=sys.stderr)
        for stage in passes:
            estimate = ESTIMATORS[estimator]([layers[name] for name in stage])
            left |= {stage[index] for index in reader.run(model, estimate, stage)}
            if process_group is not None:
                _pool_over_ranks(estimate, process_group)
            for name, population in zip(stage, estimate.results(), strict=True):
                finite = population.mean_C.isfinite() & population.unbiased_var_C.isfinite()
                if population.values and not finite.all():
                    which = f"layer {name}" if name else f"the {type(model).__name__}"
                    if population.mean_C.isfinite().all() and population.unbiased_var_C.isnan().any():
                        raise ValueError(
                            f"{which} saw a single value per channel, which has no variance: use larger batches, or "
                            "estimator='pooled' where only some have one value."
                        )
                    raise NoStatistics(f"{which} saw values that are not finite: look at the batches and the weights.")
                found[name] = population
                for key, new in zip(STATISTICS, population[2:], strict=True):  # for the next stage
                    getattr(layers[name], key).copy_(new if population.values else old[name][key])
        if not any(population.values for population in found.values()) and not reader.read:
            raise ValueError("batches yielded nothing: recalibrate needs at least one batch of model inputs.")
    reached = {name: found[name] for name in layers if name in found and found[name].values}
    if layers and not reached and not left:
        raise NoStatistics(
            f"recalibrate: none of the {len(layers)} layers of batch normalization saw a value of these batches: the "
            "batches are empty, or forward= runs another model than the one it is given."
        )
    report = [_shift(name, population, old[name]) for name, population in reached.items()]
    for name, population in reached.items():
        with torch.inference_mode(torch.is_inference_mode_enabled() or layers[name].running_mean.is_inference()):
            _write(layers[name], population)
    return report


def check(
    batches: Iterable[Any], max_batches: int | None, estimator: str, upstream: str, group: dist.ProcessGroup | None
) -> None:
    """What ``recalibrate`` refuses before it begins."""
    refuse_one_batch(batches, "batches")
    if max_batches is not None and (max_batches < 1 or max_batches % 1):
        raise ValueError(f"max_batches must be a whole number, at least 1 (got {max_batches}).")
    for name, value, known in (("estimator", estimator, ESTIMATORS), ("upstream", upstream, ("batch", "population"))):
        if value not in known:
            raise ValueError(f'unknown {name} "{value}". Known: {", ".join(known)}.')
    if upstream == "population" and isinstance(batches, Iterator):
        raise ValueError(
            f'upstream="population" reads the batches several times, got an iterator ({type(batches).__name__}), which '
            "is empty after once: pass a list or a DataLoader."
        )
    if group is not None and not (dist.is_available() and dist.is_initialized()):
        raise ValueError("process_group needs torch.distributed.init_process_group() first.")


class _Reader:
    """Runs the model on the batches."""

    def __init__(
        self, batches: Iterable[Any], most: int | None, device: Any, forward: Callable[..., Any], progress: bool
    ) -> None:
        self.batches, self.most, self.device, self.forward, self.progress = batches, most, device, forward, progress
        self.read = 0

    def first(self, model: nn.Module) -> None:
        """The first batch alone, where there is one."""
        for batch in islice(self.batches, 1):
            self._forward(model, batch)

    def _forward(self, model: nn.Module, batch: Any) -> None:
        with one_value_said(self.read + 1):
            self.forward(model, self._placed(batch))

    def run(self, model: nn.Module, estimate: Estimator, names: Sequence[str]) -> set[int]:
        """All batches, with these layers normalizing by the batch. Which of them ran without an update.

        Raises:
            ValueError: a layer with a forward of its own never takes over its batch's statistics.
        """
        with batch_in_buffers(estimate.layers):
            watch = Watch(estimate)
            hooks = watch.hooks()
            try:
                for layer in estimate.layers:
                    layer.train()
                self.read = 0
                for batch in self._shown(islice(self.batches, self.most)):
                    self._forward(model, batch)
                    watch.read()
                    self.read += 1
            except OldStatistics as error:
                kind, index = error.args
                raise ValueError(
                    f"layer {names[index]} ({kind}) keeps a share of its old running statistics with momentum 1 too: "
                    "they are never those of one batch, of which recalibrate makes the population's. To leave the "
                    "layer as it is, set its track_running_stats = False before, and True again afterwards."
                ) from None
            finally:
                for hook in hooks:
                    hook.remove()
                for layer in estimate.layers:
                    layer.eval()
        return watch.left

    def _placed(self, batch: Any) -> Any:
        return batch if self.device is None else placed(batch, self.device)

    def _shown(self, batches: Iterable[Any]) -> Iterable[Any]:
        if not self.progress:
            return batches
        try:
            from rich.progress import track
        except ImportError as error:
            raise ImportError("progress=True shows a bar of rich: pip install rich") from error
        try:
            size: int | None = len(self.batches)  # type: ignore[arg-type]
        except TypeError:  # a generator, or a DataLoader of one
            size = None
        sizes = [n for n in (self.most, size) if n is not None]
        return track(batches, "recalibrate", total=min(sizes, default=None))


@contextmanager
def _set_up(model: nn.Module, layers: dict[str, Any]) -> Iterator[None]:
    """In eval, on copies of the buffers, without a word to other processes; modes and random numbers come back."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    parallel = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    syncs = [m.require_forward_param_sync for m in parallel]
    own = [counted(layer) | {name: vars(layer).get(name, ABSENT) for name in _SET} for layer in layers.values()]
    held: list[Attached] = []
    with set_aside(model, grown=True), torch.random.fork_rng(devices):
        try:
            for layer, before in zip(layers.values(), own, strict=True):
                held.append(Attached(layer, own=partial(dict, before)))
            for m in parallel:  # their forward would send buffers, and wait for ranks that have no batch
                m.require_forward_param_sync = False
            model.eval()
            for layer in layers.values():
                if isinstance(layer, FusedBatchNorm):
                    layer.held = layer.statistics.known(layer)
                    vars(layer)["_statistics"] = layer.statistics.in_recalibrate(layer.held)
            yield
        finally:
            for attached in held:
                attached.remove()
            for m, sync in zip(parallel, syncs, strict=True):
                m.require_forward_param_sync = sync


def _largest(depth: dict[str, int], group: dist.ProcessGroup | None) -> dict[str, int]:
    """Of all ranks, one of which may have no batch to look at."""
    if group is None:
        return depth
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, depth, group)
    return {name: max(d.get(name, 0) for d in everyone) for name in set().union(*everyone)}


def _pool_over_ranks(estimate: Estimator, group: dist.ProcessGroup) -> None:
    """Every rank's estimate, in one collective, merged in the order of ranks: the same bits everywhere."""
    mine = estimate.packed()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group)
    estimate.clear()
    for packed in everyone:
        estimate.merge(packed)


def _write(layer: Any, population: Population) -> None:
    """The new statistics into the layer."""
    tensors = [place(layer, name).get(name) for name in (*STATISTICS, "num_batches_tracked")]
    let_go(*(t for t in tensors if t is not None))
    if tensors[-1] is not None:
        layer.reset_running_stats()
        tensors[-1].fill_(population.batches)
    if isinstance(layer, FusedBatchNorm):
        layer.forget_skipped()
    layer.running_mean.copy_(population.mean_C)
    layer.running_var.copy_(population.unbiased_var_C)


def _shift(name: str, population: Population, old: dict[str, Tensor]) -> Shift:
    mean_C, var_C = population.mean_C.cpu(), population.unbiased_var_C.cpu()
    off_C = (old["running_mean"].double().cpu() - mean_C).abs()
    shift_C = (off_C / var_C.sqrt()).where((var_C > 0) | (off_C != 0), 0.0)  # a constant channel may have its mean
    ratio_C = old["running_var"].double().cpu() / var_C
    ratio_C = ratio_C.where((var_C > 0) | (old["running_var"].cpu() != 0), 1.0)
    return Shift(name, population.values, shift_C.max().item(), (ratio_C.min().item(), ratio_C.max().item()))

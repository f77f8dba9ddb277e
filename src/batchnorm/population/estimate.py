"""Population statistics: what inference normalizes with (Ioffe & Szegedy 2015, Algorithm 2).

Comes from: any model with batch normalization layers, torch's or ours. Goes to: their running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from batchnorm.nn.norm import FusedBatchNorm, is_recomputing


class Shift(NamedTuple):
    """What ``recalibrate`` found for one layer: how far its running statistics had been from the population.

    ``values``: values per channel seen; ``mean_shift``: largest |running mean - E[x]| over the channels, in standard
    deviations of the population; ``variance_ratio``: smallest and largest running variance / Var[x] over the channels.
    """

    layer: str
    values: int
    mean_shift: float
    variance_ratio: tuple[float, float]


class Pooled:
    """Mean and variance of all values of all batches of one layer, by the law of total variance, in float64."""

    def __init__(self, layer: _BatchNorm) -> None:
        zeros = torch.zeros(layer.num_features, dtype=torch.float64, device=layer.running_mean.device)  # type: ignore[union-attr]
        self.values, self.batches, self.mean_C, self.squares_C = 0, 0, zeros, zeros.clone()

    def add(self, values: int, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        """Merge one batch (Chan et al. 1979): ``squares`` is the sum of squared distances from the mean."""
        total, delta_C = self.values + values, mean_C.double() - self.mean_C
        self.mean_C = self.mean_C + delta_C * (values / total)
        self.squares_C = (
            self.squares_C + unbiased_var_C.double() * (values - 1) + delta_C**2 * (self.values * values / total)
        )
        self.values, self.batches = total, self.batches + 1

    def unbiased_var_C(self) -> Tensor:
        """The unbiased variance of all values."""
        return self.squares_C / (self.values - 1)

    def collect(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """As a forward hook of a layer with momentum 1: its running statistics are then those of the last batch."""
        values = inputs[0].numel() // inputs[0].shape[1] if inputs[0].numel() else 0
        if values and layer.training and not is_recomputing() and not frozen(layer):
            self.add(values, layer.running_mean, layer.running_var)  # type: ignore[arg-type]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
) -> list[Shift]:
    r"""Replace running statistics by population statistics (Ioffe & Szegedy 2015, Algorithm 2), in place.

        E[x] = mean of all values seen,   Var[x] = m / (m - 1) * biased variance of all m values seen

    The layers normalize by each batch while the pass runs, so a layer above another one sees what it saw in
    training; everything else (dropout, say) behaves as in eval, whatever mode the model is in. Weights are not
    touched, and modes, momentum and hooks are as before afterwards, on an exception also the statistics.
    Sums are taken in float64.

    Args:
        model: any module; stock ``torch.nn.BatchNorm*`` layers count too. Only running statistics change;
            ``num_batches_tracked`` becomes the number of batches read. Layers that keep none, or whose statistics are
            frozen, are left alone.
        batches: iterable of model inputs, each (N, ...). Read once, front to back.
        forward: ``forward(model, batch)`` runs the model on one batch; default: ``model(batch)``.
        max_batches: stop after so many; default: all.

    Returns:
        One row per layer that was reached, in the order of ``model.named_modules()``: see ``Shift``.

    Raises:
        ValueError: ``batches`` yielded nothing, ``max_batches`` is not positive, or a batch gave a layer a single
            value per channel. Nothing has been changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> report = recalibrate(model, (torch.randn(32, 4) for _ in range(10)))
        >>> report[0].layer, report[0].values
        ('1', 320)
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1 (got {max_batches}).")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and not frozen(module)
    }
    pooled = {name: Pooled(layer) for name, layer in layers.items()}
    modes = {module: module.training for module in model.modules()}
    saved = {
        name: (layer.momentum, {key: buffer.clone() for key, buffer in layer.named_buffers()})
        for name, layer in layers.items()
    }
    hooks: list[RemovableHandle] = []
    read = 0
    try:
        model.eval()
        for name, layer in layers.items():
            layer.train()
            # With momentum 1 the layer itself leaves the statistics of its last batch in its buffers; afresh, since
            # 0 * NaN is NaN: statistics that are broken are what somebody may want to mend.
            layer.momentum = 1.0
            layer.reset_running_stats()
            hooks.append(layer.register_forward_hook(pooled[name].collect))
        with torch.no_grad():
            for batch in batches:
                (forward or _call)(model, batch)
                read += 1
                if read == max_batches:
                    break
        if read == 0:
            raise ValueError("batches yielded nothing: recalibrate needs at least one batch of model inputs.")
    except BaseException:
        _restore(layers, saved, buffers=True)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
        _restore(layers, saved, buffers=False)
    _restore({name: layer for name, layer in layers.items() if not pooled[name].values}, saved, buffers=True)
    return [_write(name, layer, pooled[name], saved[name][1]) for name, layer in layers.items() if pooled[name].values]


def frozen(layer: nn.Module) -> bool:
    """Whether ``freeze`` keeps the layer's statistics."""
    return isinstance(layer, FusedBatchNorm) and layer.frozen_statistics


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def _restore(layers: dict[str, _BatchNorm], saved: dict[str, Any], *, buffers: bool) -> None:
    for name, layer in layers.items():
        layer.momentum, old = saved[name]
        if buffers:
            for key, buffer in layer.named_buffers():
                buffer.copy_(old[key])


def _write(name: str, layer: _BatchNorm, statistics: Pooled, old: dict[str, Tensor]) -> Shift:
    mean_C, var_C = statistics.mean_C, statistics.unbiased_var_C()
    shift_C = (old["running_mean"].double() - mean_C).abs() / var_C.sqrt()
    ratio_C = old["running_var"].double() / var_C
    layer.running_mean.copy_(mean_C)  # type: ignore[union-attr]
    layer.running_var.copy_(var_C)  # type: ignore[union-attr]
    layer.num_batches_tracked.fill_(statistics.batches)  # type: ignore[union-attr]
    return Shift(name, statistics.values, shift_C.max().item(), (ratio_C.min().item(), ratio_C.max().item()))

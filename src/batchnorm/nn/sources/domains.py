"""Statistics of each domain by itself: domain-specific batch normalization, AdaBN.

Shapes: as in ``source``; D domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.nn.sources.source import Source


@dataclass(frozen=True)
class Domains(Source):
    """One set of running statistics per domain: a layer works in one domain at a time, ``select`` changes it.

    In train each batch, which is of one domain, is normalized by itself and moves that domain's running statistics; in
    eval the domain's are used. Weight and bias are shared. The selected domain's running statistics are the layer's
    ``running_mean``, ``running_var`` and ``num_batches_tracked``, so that ``recalibrate``, ``freeze``, ``fold`` and
    torch's own tools work on that domain. The buffers ``domain_mean`` and ``domain_var``, (D, C), and
    ``domain_batches``, (D,), have those of all domains, the selected one's as they were when it was selected;
    ``domain`` is its number. All of it is saved. Every domain begins with the statistics that the layer has: load a
    checkpoint of a network without domains first, then set ``statistics``. Select domain 0 before running statistics
    are averaged over models (``AveragedModel(use_buffers=True)``), and run backward inside the block where activation
    checkpointing computes it again.

    Args:
        number: how many domains, at least 1; the first is selected.

    Raises:
        ValueError: ``number`` below 1; a layer without running statistics.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(bn.BatchNorm1d(3, statistics=bn.Domains(2)))
        >>> with bn.Domains.select(model, 1):
        ...     _ = model(torch.randn(8, 3) + 5)  # the second domain's batch
        >>> bool(model[0].running_mean.any()), bool((model[0].domain_mean[1] > 0).all())
        (False, True)

    Source: Chang et al., "Domain-specific batch normalization", https://arxiv.org/abs/1906.03950. Recalibrating a
    trained network in each domain is AdaBN: Li et al., https://arxiv.org/abs/1603.04779.
    """

    number: int

    whole_batch = True
    initial = MappingProxyType({"domain": 0, "domain_mean": 0, "domain_var": 1, "domain_batches": 0})

    def __post_init__(self) -> None:
        if isinstance(self.number, bool) or not hasattr(self.number, "__index__") or self.number < 1:
            raise ValueError(f"Domains takes the number of domains, at least 1 (got {self.number!r}).")
        object.__setattr__(self, "number", index(self.number))

    def buffers(self, layer: Any) -> dict[str, Tensor]:
        """The statistics of all domains, which are the layer's at first."""
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError("Domains keeps running statistics of each domain: it needs track_running_stats=True.")
        batches = layer.num_batches_tracked
        counted = torch.zeros((), dtype=torch.int64, device=layer.running_mean.device) if batches is None else batches
        each = {"domain_mean": layer.running_mean, "domain_var": layer.running_var, "domain_batches": counted}
        found = {name: t.detach().expand(self.number, *t.shape).clone() for name, t in each.items()}
        if "domain" not in layer._buffers:
            return {"domain": torch.zeros_like(counted, dtype=torch.int64), **found}
        if int(layer.domain) >= self.number:
            raise ValueError(f"domain {int(layer.domain)} is selected, which {self} has not: select another one first.")
        _change(layer, layer.domain.clone())
        for name, t in found.items():  # another number of domains: those that there are stay
            rows = min(self.number, len(layer._buffers[name]))
            t[:rows] = layer._buffers[name][:rows]
        return {"domain": layer.domain.clone(), **found}

    @staticmethod
    def select(model: nn.Module, domain: int) -> Selected:
        """Have every layer of a model with ``Domains`` work in this domain, from now on or for the block of a ``with``.

        Args:
            model: any module with such layers.
            domain: its number, from 0 on.

        Returns:
            A context that selects, at its end, the domains of before.

        Raises:
            ValueError: no layer has ``statistics=Domains(...)``, or one has no such domain.
            TypeError: ``domain`` is not a whole number.
            RuntimeError: inside ``accumulate_statistics`` or ``recalibrate``, which gather statistics of one domain.
        """
        layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "statistics", None), Domains)]
        if not layers:
            raise ValueError("no layer has statistics=Domains(n): set layer.statistics = batchnorm.Domains(n) first.")
        try:
            domain = index(domain)
        except TypeError:
            raise TypeError(f"a domain is a whole number, got {domain!r}.") from None
        if any(layer.gathering for layer in layers):
            raise RuntimeError(
                "a domain cannot be selected while recalibrate or accumulate_statistics gathers the statistics of one: "
                "select it around them, for each domain."
            )
        least = min(layer.statistics.number for layer in layers)
        if not 0 <= domain < least:
            raise ValueError(f"there are domains 0 to {least - 1}, got {domain}.")
        selected = Selected(layers, domain)
        selected.begin()
        return selected


class Selected:
    """A domain that is selected for a while; ended by ``with``, or never."""

    def __init__(self, layers: list[Any], domain: int) -> None:
        self.layers, self.domain = layers, domain
        self.before: list[Tensor] | None = None

    def begin(self) -> None:
        """Select it."""
        self.before = [layer.domain.clone() for layer in self.layers]
        for layer in self.layers:
            _change(layer, torch.full_like(layer.domain, self.domain))

    def __enter__(self) -> None:
        if self.before is None:  # the same in a second block
            self.begin()

    def __exit__(self, *_: Any) -> None:
        before, self.before = self.before or (), None
        for layer, domain in zip(self.layers, before, strict=True):
            if isinstance(layer.statistics, Domains):  # it may have got another source inside
                _change(layer, domain.to(layer.domain.device))


@torch.no_grad()
def _change(layer: Any, domain: Tensor) -> None:
    """Put the selected domain's statistics away and bring those of another; waits for no device."""
    for now, of_all in (
        (layer.running_mean, layer.domain_mean),
        (layer.running_var, layer.domain_var),
        (layer.num_batches_tracked, layer.domain_batches),
    ):
        if now is not None:
            of_all.index_copy_(0, layer.domain.long().view(1), now[None].to(of_all.dtype))
            now.copy_(of_all.index_select(0, domain.long().view(1))[0])
    layer.domain.copy_(domain)

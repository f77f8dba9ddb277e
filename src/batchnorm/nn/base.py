"""What BatchNorm1d, 2d and 3d share: torch's layer with activation, residual, mask, other statistics, and guards.

Shapes: N examples, C channels (``num_features``), then the places: none, (L), (H, W) or (D, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from batchnorm.functional import ActivationLike, overridden, parse_activation, refuse_others
from batchnorm.nn import tracing
from batchnorm.nn.forward import forward
from batchnorm.nn.guards import Epsilon, QConfig
from batchnorm.nn.sources import Batch, Source
from batchnorm.nn.state import State
from batchnorm.ops.activations import NO_ACTIVATION

_LAYOUTS = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}
_LAYERS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
_BATCH = Batch()


class FusedBatchNorm(State):
    """The three layers' common part; they differ in the number of dimensions alone.

    Its state, and what of it is saved, is in ``state.py``.
    """

    activation: str | tuple[Any, ...] | None = None
    g = NO_ACTIVATION  # the same, as ops take it
    before_sync: type | None = None  # the class that ``revert_sync_batchnorm`` restores
    held: Any = None  # what the source knew before the running statistics went into use elsewhere
    counts: list[Tensor] | None = None  # where someone wants to know how many values a batch had
    gathering = False  # ``recalibrate`` or ``accumulate_statistics`` makes one set of statistics of several batches
    fused = False  # the activation, or a residual, came from the network around it (``from_torch``)
    # Whose work the layer does: each gets it back by its ``hand_back()``, and must where it no longer ``is_there()``.
    taken_from: tuple[Any, ...] = ()
    eps: Any = Epsilon()
    qconfig = QConfig()
    # Not looked at by torch.jit: some refuse to be read, and none means anything to TorchScript.
    __jit_ignored_attributes__ = ("eps", "epsilon", "qconfig", "statistics", "frozen_statistics", "frozen_affine")
    _dims: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
        statistics: Source = _BATCH,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # torch 2.10 does not know the argument
            self.bias = None  # type: ignore[assignment]
        self.activation = activation  # type: ignore[assignment]
        if self.running_mean is not None:
            self.counter(self.running_mean)
        self.statistics = statistics

    def __setattr__(self, name: str, value: Any) -> None:
        """torch's; an activation in any form, a module too, is kept as its name, or (name, parameters ...)."""
        if name == "activation":
            g = parse_activation(value)
            vars(self)["g"] = g
            value = g.as_users_write_it()
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """torch's; a layer that was pickled before ``g`` was there has it from ``activation``."""
        super().__setstate__(state)
        if "g" not in vars(self):
            self.activation = vars(self).get("activation")

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """activation(BN(input) + residual): batch statistics in train, running ones in eval (where tracked)."""
        for owner in self.taken_from:
            if not owner.is_there():
                self.hand_back()  # it may be of the class that it had before
                more = () if residual is None and mask is None else (residual, mask)
                return type(self).forward(self, input, *more)
        if type(input) is not Tensor or residual is not None or mask is not None:
            if any(isinstance(t, torch.fx.Proxy) for t in (input, residual, mask)):
                return tracing.as_node(self, input, residual, mask)
            refuse_others(input=input, residual=residual)
            if overridden(input, residual, mask):  # subclasses of Tensor, whose __torch_function__ wants to know
                return handle_torch_function(forward, (input, residual, mask), self, input, residual, mask)
        return forward(self, input, residual, mask)

    def __prepare_scriptable__(self) -> nn.Module:
        """For ``torch.jit.script``."""
        return tracing.scriptable(self)

    @property
    def epsilon(self) -> float:
        """``eps``, without what reading that one means: see ``guards.Epsilon``."""
        return self.__dict__["eps"]

    def hand_back(self) -> None:
        """Undo what ``from_torch`` fused into this layer: those that it came from do it again."""
        owners, self.taken_from, self.activation, self.fused = self.taken_from, (), None, False
        for owner in owners:
            owner.hand_back()

    def extra_repr(self) -> str:
        """torch's, with the activation, other statistics and what is frozen appended, where there is any."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        source = "" if type(self.statistics) is Batch else f", statistics={self.statistics!r}"
        both = (("statistics", self.frozen_statistics), ("affine", self.frozen_affine))
        kept = [what for what, is_kept in both if is_kept]
        return super().extra_repr() + activation + source + (f", frozen={'+'.join(kept)}" if kept else "")

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._dims:
            layouts = " or ".join(_LAYOUTS[dim] for dim in self._dims)
            raise ValueError(
                f"expected {' or '.join(f'{dim}D' for dim in self._dims)} input (got {input.dim()}D input): "
                f"{type(self).__name__} takes {layouts}, got {tuple(input.shape)}; {self._dims_advice(input, layouts)}."
            )

    def _dims_advice(self, input: Tensor, layouts: str) -> str:
        one_example = input.dim() + 1 in self._dims and input.dim() and input.shape[0] == self.num_features
        if one_example and (input.dim() < 2 or input.shape[1] != self.num_features):
            return "one example by itself has no batch dimension: pass input.unsqueeze(0)"
        fitting = _LAYERS.get(input.dim())
        return f"use {fitting}" if fitting else f"reshape it to {layouts}"

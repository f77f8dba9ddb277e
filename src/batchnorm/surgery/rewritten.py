"""Modules with a forward that was written anew, as the layers know them whose work is done there no more.

Comes from: ``rewrite``. Goes to: ``layer.taken_from``.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.surgery.form import Form


def stands(root: Any, path: list[str], layer: FusedBatchNorm) -> bool:
    """Whether a layer is where it took something over, alone or in somebody's wrapper, and still does it.

    Others put what they like in a layer's place: ``model.bn = torch.nn.Identity()``. Nobody is told.
    """
    found = root
    for name in path:
        while name not in found._modules and len(found._modules) == 1:  # a wrapper's only child
            (found,) = found._modules.values()
        found = found._modules.get(name)
        if found is None:
            return False
    return layer.fused and (found is layer or any(part is layer for part in found.modules()))


def own_class(kind: Any) -> Any:
    """Of one that was written for one that was written, the first."""
    while hasattr(kind, "written_for"):
        kind = kind.written_for
    return kind


class Rewritten:
    """A module whose forward was written anew, as the layers know it whose activations and additions are gone there."""

    def __init__(self, module: Any, layers: dict[str, FusedBatchNorm], form: Form | None = None) -> None:
        self.module, self.layers, self.form = module, [*layers.values()], form
        self.paths = [name.split(".") for name in layers]

    def is_whole(self) -> bool:
        """Whether all of its layers are where they were."""
        places = zip(self.paths, self.layers, strict=False)
        return bool(self.layers) and all(stands(self.module, path, layer) for path, layer in places)

    def is_there(self) -> bool:
        """Always: it asks itself, before its layers run."""
        return True

    def hand_back(self) -> None:
        """The module's own forward, and all of its layers without what was fused into them."""
        layers, self.layers = self.layers, []
        if layers:
            self._own_forward()
        for layer in layers:
            layer.hand_back()

    def _own_forward(self) -> None:
        self.module.__class__ = own_class(type(self.module))
        vars(self.module).pop("written_by", None)


class Regraphed(Rewritten):
    """The same for a ``torch.fx.GraphModule``, whose graph was changed."""

    def __init__(self, module: Any, layers: dict[str, FusedBatchNorm], graph: fx.Graph) -> None:
        super().__init__(module, layers)
        self.graph = graph

    def _own_forward(self) -> None:
        self.module.graph = self.graph

    def __reduce__(self) -> Any:  # torch pickles such a module as its program, which cannot hold itself
        return Lost, ([(layer, layer.activation) for layer in self.layers],)

    def __deepcopy__(self, memo: dict[int, Any]) -> Regraphed:
        new = memo[id(self)] = Regraphed.__new__(Regraphed)
        new.paths, new.form = self.paths, None
        new.module, new.layers = copy.deepcopy(self.module, memo), copy.deepcopy(self.layers, memo)
        new.graph = copy.deepcopy(self.graph, memo)
        return new


class Lost:
    """Of a ``GraphModule`` that was pickled: what its program was before."""

    def __init__(self, layers: list[tuple[FusedBatchNorm, Any]]) -> None:
        self.layers = layers

    def is_there(self) -> bool:
        """As far as anybody knows."""
        return True

    def hand_back(self) -> None:
        """It cannot: leave the layers as they are, and say so."""
        for layer, activation in self.layers:
            layer.activation, layer.fused, layer.taken_from = activation, True, (self,)
        raise TypeError(
            "what this layer does for the program around it cannot be given back: a torch.fx.GraphModule was pickled "
            "with fused layers. Pickle batchnorm.to_torch(model), or its state_dict."
        )

"""Modules with a forward that was written anew, as the layers know them whose work is done there no more."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

from torch import fx, nn

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.ops.activations import activation_of
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
    while hasattr(kind, "original_class"):
        kind = kind.original_class
    return kind


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
Through = tuple[nn.Module, list[str], list[tuple[str, nn.Module]]]


def through(module: nn.Module, called: Collection[str], gone: Collection[str], path: str = "") -> Iterator[Through]:
    """The modules that a graph goes through, each with the names of what it holds, and the children that must be the
    ones that they are: of containers all, since a forward may go through them in a loop.

    Args:
        module: whose forward is written anew.
        called: where the modules are that the graph calls.
        gone: which of these it calls less often now: activations that a layer took over.
    """
    same = []
    for name, child in module._modules.items():
        at, layer = f"{path}.{name}".lstrip("."), isinstance(child, FusedBatchNorm)
        inside = any(other.startswith(f"{at}.") for other in called)
        inside = inside or (isinstance(child, _CONTAINERS) and at not in called)
        if child is not None and (inside or at in gone or (isinstance(module, _CONTAINERS) and not layer)):
            same.append((name, child))
        if child is not None and inside:
            yield from through(child, called, gone, at)
    yield module, _names(module), same


def _names(module: nn.Module) -> list[str]:
    names = [name for name, child in module._modules.items() if child is not None]
    if module._parameters or module._buffers:  # seldom: this is asked in each call
        held: Any = (module._parameters, module._buffers)
        names += [name for each in held for name, t in each.items() if t is not None]
    return names


class Rewritten:
    """A module whose forward was written anew, as the layers know it whose activations and additions are gone there."""

    def __init__(
        self,
        module: Any,
        layers: dict[str, FusedBatchNorm],
        form: Form | None = None,
        passed: Collection[Through] = (),
    ) -> None:
        self.module, self.layers, self.form = module, [*layers.values()], form
        places = {name: name.rpartition(".") for name in layers}
        self.places = [(module.get_submodule(places[n][0]), places[n][2], layer) for n, layer in layers.items()]
        inner = [vars(each).get("written_by") for each, *_ in passed]  # what these went through is in the text too
        self.passed = [*passed, *(each for other in inner if other for each in other.passed)]
        children = [child for *_, same in self.passed for _, child in same]
        known = [(child, activation_of(child)) for child in children]
        self.activations = [(child, g) for child, g in known if g and (g.row.parameters or g.row.fixed)]

    def is_whole(self) -> bool:
        """Whether all of its layers are where they were, and what the forward went through is what it was."""
        for module, names, same in self.passed:
            if _names(module) != names:
                return False
            for name, child in same:
                if module._modules[name] is not child:
                    return False
        for child, g in self.activations:
            if activation_of(child) != g:
                return False
        for around, name, layer in self.places:
            if not (around._modules.get(name) is layer and layer.fused) and not stands(around, [name], layer):
                return False
            for owner in layer.taken_from:  # activations behind others of its layers, which are modules of their own
                if not owner.is_there():
                    return False
        return bool(self.layers)

    def is_there(self) -> bool:
        """Always: it asks itself, before its layers run."""
        return True

    def hand_back(self) -> None:
        """The module's own forward, and all of its layers without what was fused into them."""
        layers, self.layers = self.layers, []
        if layers:
            self._own_forward()
        for layer in layers:
            if isinstance(layer, FusedBatchNorm):  # else it is of the class that it had before
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
        new.form, new.places, new.passed, new.activations = None, [], [], []  # it is never asked
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

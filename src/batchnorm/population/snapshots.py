"""A model's state set aside, and brought back; tensors let go before they change.

A pending backward holds tensors of earlier forward passes: torch's batch normalization its running statistics, other
modules whatever buffers they read. Copying into those would end in "modified by an inplace operation", so state is set
aside by exchanging tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # torch's containers and the mode
_aside: Counter[nn.Module] = Counter()  # in how many blocks of set_aside a module is now
_FREE = torch.empty(0)._use_count()  # type: ignore[attr-defined]  # of a tensor that Python alone holds


class Kept:
    """The state of a module besides its parameters, by reference: mode and buffers; of batch normalization, everything.

    That is what was set on it (frozen, momentum, where statistics come from, what was counted), under whatever name,
    and which of its parameters require a gradient.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        self.buffers, self.not_saved = dict(module._buffers), set(module._non_persistent_buffers_set)
        self.scripted = isinstance(module, torch.jit.ScriptModule)  # can neither gain nor lose buffers
        self.normalizes = isinstance(module, _BatchNorm)
        held = vars(module) if self.normalizes else {}
        self.attributes = {k: v for k, v in held.items() if k not in _OF_EVERY_MODULE}
        self.wanted = [(p, p.requires_grad) for p in module.parameters()] if self.normalizes else []

    def tensors(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Each tensor that may be exchanged: where it is, under which name."""
        places = [] if self.scripted else [(self.module._buffers, self.buffers)]
        if self.normalizes:
            places.append((vars(self.module), self.attributes))
        for place, held in places:
            for name, t in held.items():
                if isinstance(t, Tensor) and not t.requires_grad:  # a pruned weight is computed anew
                    yield place, name, t

    def bring_back(self, grown: bool = False) -> None:
        """As it was: the same objects, and nothing that was added; but with ``grown`` what its forward pass made.

        That are buffers that are new, or have another shape: a module may remember elsewhere that it has them.
        """
        module = self.module
        module.training = self.training
        if not self.scripted:
            made = {name: t for name, t in module._buffers.items() if grown and _differs(t, self.buffers.get(name))}
            not_saved = {name for name in module._non_persistent_buffers_set if name in made}
            module._buffers.clear()
            module._buffers.update(self.buffers | made)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(self.not_saved | not_saved)
        if self.normalizes:
            held = vars(self.module)
            for name in held.keys() - self.attributes.keys() - _OF_EVERY_MODULE:
                del held[name]
            held.update(self.attributes)
        for p, wanted in self.wanted:
            if p.requires_grad != wanted:  # which inference tensors refuse to be asked
                p.requires_grad_(wanted)

    def moved(self) -> bool:
        """Whether all that a module without parameters has was moved to another device or dtype."""
        if any(True for _ in self.module.parameters(recurse=False)):
            return False
        both = [(self.module._buffers.get(name), t) for name, t in self.buffers.items() if t is not None]
        floats = [(now, t) for now, t in both if t.is_floating_point()]
        return bool(floats) and all(now is not None and kind(now) != kind(t) for now, t in floats)


def _differs(now: Tensor | None, before: Tensor | None) -> bool:
    """Whether a buffer was made, or made anew in another shape."""
    return now is not None and (before is None or now.shape != before.shape)


@contextmanager
def set_aside(model: nn.Module, *, grown: bool = False) -> Iterator[None]:
    """Inside the model works on copies of its buffers. Afterwards it has its own again, with the values that they had.

    With ``grown`` those stay that a forward pass inside made (a cache of positions, say).
    Buffers that modules share are shared inside too. Somebody else may hold the model's own, and change them
    meanwhile: DistributedDataParallel, which broadcasts them, or another model that shares them. Where the model moves
    inside, to another device or dtype, its buffers follow, since its parameters stay there.
    """
    kept = [Kept(module) for module in model.modules()]
    kinds = [kind(p) for p in model.parameters()]
    places = [place for one in kept for place in one.tensors()]
    mine = {id(t): t for *_, t in places}
    held = mine | {id(t): t for one in kept for t in one.buffers.values() if t is not None}
    with torch.inference_mode(False), torch.no_grad():
        values = {key: _once(t).clone() for key, t in held.items()}
        copies = {key: t.clone() for key, t in mine.items()}
    try:
        _aside.update(one.module for one in kept)
        for place, name, t in places:
            place[name] = copies[id(t)]
        yield
    finally:
        _aside.subtract(one.module for one in kept)
        for module in [one.module for one in kept if not _aside[one.module]]:
            del _aside[module]
        moved = kinds != [kind(p) for p in model.parameters()]
        theirs = [(*place, place[0].get(place[1])) for one in kept if moved or one.moved() for place in one.tensors()]
        for one in kept:
            one.bring_back(grown)
        for key, t in held.items():
            with torch.inference_mode(t.is_inference()):  # which alone may change its tensors
                _once(t.data).copy_(values[key])  # not noticed by a pending backward, which saw these values
        followed: dict[int, Tensor] = {}
        for place, name, t, now in theirs:
            if place.get(name) is t and isinstance(now, Tensor) and kind(now) != kind(t):
                with torch.inference_mode(False), torch.no_grad():
                    place[name] = followed.setdefault(id(t), t.to(now))


def times_set_aside(module: nn.Module) -> int:
    """0 where it works on its own state; else on copies, on copies of these, and so on, or on what took their place."""
    return _aside[module]


def kind(t: Tensor) -> tuple[torch.device, torch.dtype]:
    """What ``Module.to`` changes."""
    return t.device, t.dtype


def _once(t: Tensor) -> Tensor:
    """Of a tensor that was expanded, each element of its memory once."""
    if t.layout is torch.strided:
        for dim, stride in enumerate(t.stride()):
            t = t if stride else t.narrow(dim, 0, min(t.shape[dim], 1))
    return t


def let_go(*tensors: Tensor) -> None:
    """Before they are changed in place: what a pending backward holds keeps its values, in memory of its own.

    The objects stay, since others hold those too: the module, DistributedDataParallel, a user's list. And they keep
    their memory, which a CUDA graph may read, or another process or tensor share.
    """
    for t in tensors:
        if t._use_count() > _FREE:  # type: ignore[attr-defined]
            with torch.inference_mode(False):  # its tensors are refused in training
                values, of_backward = t.clone(), t.data
                torch._C._swap_tensor_impl(t, of_backward)
                of_backward.data = values


def check_materialized(model: nn.Module, verb: str, *, weights: bool = False, runs: bool = False) -> None:
    """Refuses lazy layers that have not run, and where the model ``runs`` those that have no values.

    Raises:
        TypeError: not a module.
        ValueError: a buffer, a batch normalization layer's parameter, or with ``weights`` any one, has no shape yet;
            with ``weights`` also where a checkpoint was loaded, and the layer is of its lazy class still; a layer is on
            the meta device.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{verb} takes a torch.nn.Module, got {kind}.")
    for name, module in model.named_modules():
        own = list(module._buffers.values())
        if weights or isinstance(module, _BatchNorm):
            own += module._parameters.values()
        unknown, waits = any(is_lazy(t) for t in own), weights and hasattr(module, "_initialize_hook")
        if unknown or waits:
            what = "does not know its shapes yet" if unknown else "is lazy, and has not run yet"
            raise ValueError(
                f"{verb}: {name or 'the model'} ({type(module).__name__}) {what}: run the model once, on an example, "
                "before."
            )
        tensors = [*module._parameters.values(), *module._buffers.values()] if runs else []
        if any(t is not None and t.is_meta for t in tensors):
            raise ValueError(
                f"{verb}: {name or 'the model'} ({type(module).__name__}) is on the meta device, where tensors have no "
                "values: give it some before (model.to_empty(device='cpu'), then load a state_dict)."
            )

"""A model's copy; where torch refuses, what it is that cannot be copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from batchnorm.surgery.closures import rebind

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, kept: dict[int, Any] | None = None, apart: bool = False) -> Model:
    """A deep copy, but for the objects in ``kept``, by their id; functions that it holds call it, not the original.
    ``apart``: nor do they change what the original's do.

    Raises:
        ValueError: a module holds a tensor that gradients flow through, or what cannot be copied, with its name; a
            function in an attribute reads the model as a global variable.
    """
    programs = [value for _, value in _attributes(model) if isinstance(value, torch.jit.ScriptFunction)]
    kept = {id(program): program for program in programs} | (kept or {})  # which never change, and cannot be copied
    kept = {id(t): t.detach().clone() for t in _pruned(model)} | kept
    memo = dict(kept)
    try:
        made = copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, pickle.PickleError) as failure:
        held = [place for place, t in computed(model) if id(t) not in kept]
        if held:
            raise ValueError(
                f"the model cannot be copied: {', '.join(dict.fromkeys(held))} is computed, and gradients flow through "
                "it. Run the model once under torch.no_grad(), which leaves none such, or detach it; for "
                "torch.nn.utils.weight_norm there is torch.nn.utils.parametrizations.weight_norm."
            ) from failure
        held = [place for place, value in _attributes(model) if not _can_be_copied(value, kept)]
        if not held:
            raise
        raise ValueError(
            f"the model cannot be copied: {', '.join(held)} cannot ({failure}). Take it out first, and put it into the "
            "result."
        ) from failure
    both = {*model.modules()} & {*made.modules()}
    held = [name for name, module in model.named_modules() if module in both]
    if held:
        raise ValueError(
            f"the model cannot be copied: copy.deepcopy gives {', '.join(held)} as it is, and what is done to the copy "
            "would be done to the model: look at its __deepcopy__."
        )
    rebind(made, memo, list(model.modules()), apart)
    return made


def scratch(model: Model) -> Model:
    """A copy to run and throw away, so that the model notices nothing. Computed tensors are there by their values."""
    return copied(model, {id(t): t.detach().clone() for _, t in computed(model)}, apart=True)


def cloned(example: Any, of: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """An example for a model that may change what it is given: containers and objects copied as far as they can be.
    ``of`` makes the copy of each tensor."""
    tensors = {id(t): of(t) for t in tensors_of(example)}
    with _Copying(of):
        try:
            return copy.deepcopy(example, dict(tensors))
        except Exception:  # whatever an object raises that does not want it: each by itself, then
            return _pytree.tree_map(lambda leaf: _copied_or_itself(leaf, dict(tensors)), example)


def _copied_or_itself(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # as above
        return value


class _Copying(TorchFunctionMode):
    """``copy.deepcopy`` makes tensors as told, also those that gradients flow through, wherever objects hold them."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        t, memo = args
        return memo.setdefault(id(t), self.of(t))


def dense(t: Tensor) -> Tensor:
    """The values of a sparse tensor at their places."""
    return t if t.layout is torch.strided else t.to_dense()


def computed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that gradients flow through, and where modules hold them."""
    for place, value in _attributes(model):
        yield from ((place, t) for t in tensors_of(value) if not t.is_leaf)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Values that modules hold besides parameters and modules, with their names."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for key, value in (vars(module) | module._buffers).items():
                if key not in ("_buffers", "_parameters", "_modules"):
                    yield f"{name}.{key}".lstrip("."), value


def _pruned(model: nn.Module) -> Iterator[Tensor]:
    """What ``torch.nn.utils.prune`` computed, and computes again before each call."""
    for module in model.modules():
        for key in [] if isinstance(module, torch.jit.ScriptModule) else module._parameters:
            name = key.removesuffix("_orig")
            if f"{name}_mask" in module._buffers and isinstance(vars(module).get(name), Tensor):
                yield vars(module)[name]


def _can_be_copied(value: Any, kept: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(kept))
    except Exception:  # whatever an object raises that does not want it
        return False
    return True


def tensors_of(values: Any) -> Iterable[Tensor]:
    """All tensors in nested containers, those that torch does not know (transformers' outputs) and objects too."""
    for leaf in _pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_of(list(leaf.values()))
        elif hasattr(leaf, "__dataclass_fields__"):
            yield from tensors_of([getattr(leaf, name) for name in leaf.__dataclass_fields__])
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):  # not deeper: there may be cycles
            yield from (t for t in _pytree.tree_leaves(list(vars(leaf).values())) if isinstance(t, Tensor))

"""Batches as DataLoaders give them: put on a device, given to a model.

Comes from: the user's DataLoader or list. Goes to: ``recalibrate``, the Lightning callback, the range test.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def refuse_one_batch(batches: Iterable[Any], name: str) -> None:
    """Refuses what is a batch itself, whose rows or keys would be taken for batches.

    Raises:
        TypeError: a tensor or array, a mapping, a text.
    """
    if isinstance(batches, Tensor) or hasattr(batches, "__array__"):
        shape = tuple(batches.shape)  # type: ignore[union-attr]
        raise TypeError(
            f"{name} is a {type(batches).__name__} of shape {shape}, whose rows would be taken for batches: pass "
            "[tensor] for one batch, tensor.split(size) for several."
        )
    if isinstance(batches, Mapping | str):
        raise TypeError(
            f"{name} is a {type(batches).__name__}, whose {'keys' if isinstance(batches, Mapping) else 'letters'} would "
            "be taken for batches: pass [batch] for one batch, or a DataLoader."
        )


def placed(batch: Any, device: Any) -> Any:
    """The batch on the device: tensors, whatever has ``.to``, and those in mappings, sequences and dataclasses."""
    move = getattr(batch, "to", None)
    if callable(move) and not isinstance(batch, type):
        moved = move(device)
        return batch if moved is None else moved  # it moved itself
    if isinstance(batch, Mapping):
        items = {key: placed(value, device) for key, value in batch.items()}
        if isinstance(batch, defaultdict):
            return defaultdict(batch.default_factory, items)
        return type(batch)(items) if type(batch) in (OrderedDict, dict) else _like(batch, items)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(placed(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(placed(value, device) for value in batch)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):  # frozen ones too
                object.__setattr__(moved, field.name, placed(getattr(batch, field.name), device))
        return moved
    return batch


def _like(batch: Any, items: dict[Any, Any]) -> Any:
    """A mapping of the batch's class, with what else it holds."""
    moved = copy.copy(batch)
    for key, value in items.items():
        moved[key] = value
    return moved


def call_with_inputs(model: nn.Module, batch: Any) -> Any:
    """The model on a batch as a DataLoader gives it: of a tuple or list (inputs, labels) its first element.

    A mapping (of transformers' collators, say) is given as keyword arguments where the model's forward takes all of its
    keys by name, as transformers' models do; else it is given as it is.

    Raises:
        TypeError: forward takes some of a mapping's keys, and not the others.
    """
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    if isinstance(inputs, Mapping) and _takes_by_name(model, inputs):
        return model(**inputs)
    return model(inputs)


def _takes_by_name(model: nn.Module, inputs: Mapping[Any, Any]) -> bool:
    inner = _unwrapped(model)
    signature = inspect.signature(inner.forward)
    names = {
        name for name, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }  # fmt: skip
    known = [key for key in inputs if key in names]
    if not all(isinstance(key, str) for key in inputs):
        return False
    try:
        signature.bind(**inputs)
    except TypeError as error:
        if not known:
            return False
        raise TypeError(
            f"the batch has {', '.join(map(str, inputs))}, and {type(inner).__name__}.forward takes "
            f"{', '.join(names)} ({error}): pass forward=, a function of model and batch, for one, "
            f"lambda model, batch: model({', '.join(f'{key}=batch[{key!r}]' for key in known)})."
        ) from error
    return True


def _unwrapped(model: nn.Module) -> nn.Module:
    """Of a wrapper that takes any arguments (DistributedDataParallel, torch.compile, averaged weights), what it wraps."""
    inner = model._modules.get("_orig_mod", model._modules.get("module"))
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    anything = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return model if inner is None or not (anything or "_orig_mod" in model._modules) else _unwrapped(inner)

"""Batches as DataLoaders give them: put on a device, given to a model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset


def refuse_one_batch(batches: Iterable[Any], name: str) -> None:
    """Refuses what is a batch itself, whose rows or keys would be taken for batches.

    Raises:
        TypeError: a tensor or array, a mapping, a text, a dataset of single examples.
    """
    if isinstance(batches, Tensor) or hasattr(batches, "__array__"):
        shape = tuple(batches.shape)  # type: ignore[union-attr]
        raise TypeError(
            f"{name} is a {type(batches).__name__} of shape {shape}, whose rows would be taken for batches: pass "
            "[tensor] for one batch, tensor.split(size) for several."
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise TypeError(
            f"{name} is a {type(batches).__name__}, whose single examples would be taken for batches: pass "
            "torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
    if isinstance(batches, Mapping | str):
        parts = "keys" if isinstance(batches, Mapping) else "letters"
        raise TypeError(
            f"{name} is a {type(batches).__name__}, whose {parts} would be taken for batches: pass [batch] for "
            "one batch, or a DataLoader."
        )


@contextmanager
def one_value_said(batch: int) -> Iterator[None]:
    """Errors about one value per channel in there, raised by torch's layers or ours, name the batch."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"batch {batch} gives a layer of batch normalization one value per channel, which has no variance "
            f"({str(error).split(': ')[0]}): make batches larger, or leave out an incomplete last one "
            "(DataLoader(drop_last=True))."
        ) from error


def placed(batch: Any, device: Any) -> Any:
    """The batch on the device: tensors, whatever else has ``.to``, and those in mappings, sequences and dataclasses."""
    if _moves(batch):
        moved = batch.to(device)
        return batch if moved is None else moved  # it moved itself
    if isinstance(batch, Mapping):
        moved = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        for key, value in batch.items():
            moved[key] = placed(value, device)
        return moved
    if isinstance(batch, tuple | MutableSequence):
        values = [placed(value, device) for value in batch]
        if isinstance(batch, tuple):  # not by the class, whose arguments may be others: named tuples'
            return type(batch)(values) if hasattr(batch, "n_fields") else tuple.__new__(type(batch), values)
        moved = copy.copy(batch)
        for i, value in enumerate(values):
            moved[i] = value
        return moved
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(moved, field.name, placed(getattr(batch, field.name), device))  # frozen ones too
        return moved
    return batch


def call_with_inputs(model: nn.Module, batch: Any) -> Any:
    """The model on a batch as a DataLoader gives it: of a tuple or list (inputs, labels) its first element.

    Raises:
        TypeError: forward takes some of a mapping's keys, and not the others, or wants more.
    """
    return run(model, batch[0] if isinstance(batch, tuple | list) and not _moves(batch) else batch)


def run(model: nn.Module, inputs: Any) -> Any:
    """The model on the inputs of a batch.

    A mapping (of transformers' collators, say) is given as keyword arguments where the model's forward takes all of its
    keys by name, as transformers' models do, a tuple or list as arguments where it takes several; else they are given
    as they are.

    Raises:
        TypeError: forward takes some of a mapping's keys, and not the others, or wants more.
    """
    if isinstance(inputs, Mapping) and _takes_by_name(model, inputs):
        return model(**inputs)
    if type(inputs) in (tuple, list) and _takes_several(model, inputs):
        return model(*inputs)
    return model(inputs)


def _moves(batch: Any) -> bool:
    """Whether it is one thing that knows how to go to a device: a tensor, a graph, packed sequences."""
    return callable(getattr(batch, "to", None)) and not isinstance(batch, type)


def _takes_several(model: nn.Module, inputs: tuple[Any, ...] | list[Any]) -> bool:
    try:
        signature = inspect.signature(unwrapped(model).forward)
        signature.bind(*inputs)
    except (TypeError, ValueError):  # so many it does not take; of a traced one nothing is known
        return False
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in positional for kind in kinds) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds


def _takes_by_name(model: nn.Module, inputs: Mapping[Any, Any]) -> bool:
    try:
        inner = unwrapped(model)
        signature = inspect.signature(inner.forward)
    except ValueError:  # of a traced one
        return False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind in by_name]
    known = [key for key in inputs if key in names]
    if not all(isinstance(key, str) for key in inputs):
        return False
    try:
        signature.bind(**inputs)
    except TypeError as error:
        if not known:
            return False
        arguments = ", ".join(f"{key}=batch[{key!r}]" for key in known)
        raise TypeError(
            f"the batch has {', '.join(inputs)}, and {type(inner).__name__}.forward takes {', '.join(names)} "
            f"({error}). Pass forward=: lambda model, batch: model({arguments})."
        ) from error
    return True


def unwrapped(model: nn.Module) -> nn.Module:
    """Of what takes any arguments (torch.compile, DistributedDataParallel, averaged weights) the model in it."""
    if "_orig_mod" in model._modules:
        return unwrapped(model.get_submodule("_orig_mod"))
    if "module" not in model._modules:
        return model
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return model
    return unwrapped(model.get_submodule("module"))

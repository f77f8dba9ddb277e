"""The places for batch normalization in a network without it: layers that a nonlinearity reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd, _MaxPoolNd

from batchnorm.surgery.affine import (
    PRUNED,
    affine_of,
    does_more,
    is_computed,
    is_pruned,
    looks_affine,
    unregistered,
)
from batchnorm.surgery.between import NOTHING
from batchnorm.surgery.graph import ADDITIONS
from batchnorm.surgery.moves import came_from
from batchnorm.surgery.norms import norms_of
from batchnorm.surgery.report import LEFT, Row
from batchnorm.surgery.watch import Call, Watched

_NONLINEARITIES = {
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "softplus", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softsign", "logsigmoid", "tanhshrink",
    "hardshrink", "softshrink",
}  # fmt: skip
_OUTPUTS = {"sigmoid", "hardsigmoid", "logsigmoid", "tanh", "softplus"}  # that a model's output may end in
_MAXIMA = (_MaxPoolNd, _AdaptiveMaxPoolNd)


class Place(NamedTuple):
    """The fate of a layer, and the name of the batch normalization layer that follows it then."""

    row: Row
    norm: str | None = None


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The affine layers of a model, by name, those of no registered class too."""
    return {name: m for name, m in model.named_modules() if affine_of(m) is not None or looks_affine(m)}


def place_of(seen: Watched, name: str, layer: nn.Module) -> Place | None:
    """The place of a layer, or the reason to leave it alone; None for a class that is neither known nor affine."""
    calls = seen.of(name)
    reader = _reader(seen, calls[0]) if len(calls) == 1 else None
    if affine_of(layer) is None:
        wanted = reader is not None and len(calls[0].shape or ()) > 1 and _place(seen, name, reader).row.done != LEFT
        return Place(Row(name, LEFT, unregistered(layer))) if wanted else None
    if hasattr(type(layer), "normalizes"):
        return _has_one(name, f"{name}.batch_norm")
    if len(calls) != 1:
        why = "its forward is not called on the example" if not calls else f"it is called {len(calls)} times"
    elif does_more(layer):
        why = f"a {type(layer).__qualname__} with a forward of its own may do more than its weights"
    elif is_pruned(layer):
        why = f"its weight {PRUNED}"
    elif is_computed(layer):
        why = "its weight is computed from others"
    elif f"{name}.bias" in seen.read:
        why = f"{seen.read[f'{name}.bias']} reads its bias too"
    elif not _has_batch(layer, calls[0]):
        why = "its output has no batch dimension: give an example with one"
    elif reader is None:
        why = "its output is read more than once"
    else:
        return _place(seen, name, reader)
    return Place(Row(name, LEFT, why))


def _has_one(name: str, norm: str) -> Place:
    return Place(Row(name, LEFT, f"it has batch normalization, {norm}"), norm)


def norms_behind(seen: Watched, name: str, layer: nn.Module) -> list[nn.Module]:
    """The batch normalization that alone reads what a layer computes, of each of its calls; none if others read it.

    Also behind a maximum and what moves values: with a positive factor on the weight they give as much more.
    """
    if affine_of(layer) is None or is_pruned(layer) or is_computed(layer) or f"{name}.weight" in seen.read:
        return []
    if hasattr(type(layer), "normalizes"):
        return [layer.get_submodule("batch_norm")]
    readers = [] if does_more(layer) else [_reader(seen, call) for call in seen.of(name)]
    norms = [r.target for r in readers if r is not None and r.kind == "module" and "" in norms_of(r.target)]
    return norms if len(norms) == len(readers) else []


def _place(seen: Watched, name: str, reader: Call) -> Place:
    if reader.kind == "module" and "" in norms_of(reader.target):
        return _has_one(name, reader.name)
    if _is_nonlinearity(reader):
        return _before(seen, name, reader, reader.label)
    after = _behind_sums(seen, reader)
    if after is not None and _is_nonlinearity(after):
        return _before(seen, name, after, f"{reader.label} and {after.label}")
    return Place(Row(name, LEFT, f"its output goes to {reader.label}"))


def _before(seen: Watched, name: str, nonlinearity: Call, label: str) -> Place:
    """Normalized, unless what follows is the model's output: a sigmoid there is the softmax of two classes."""
    reader = _reader(seen, nonlinearity)
    if _base_name(nonlinearity) in _OUTPUTS and reader is not None and reader.kind == "output":
        return Place(Row(name, LEFT, f"its output goes to the model's output through {label}"))
    return Place(Row(name, "normalized", f"before {label}"), f"{name}.batch_norm")


def _has_batch(layer: nn.Module, call: Call) -> bool:
    row = affine_of(layer)
    return row is not None and len(call.shape or ()) >= 1 - row.channels


def _reader(seen: Watched, call: Call) -> Call | None:
    """The only reader of its output, behind calls that pass it on; a maximum and a nonlinearity may change places."""
    reader = seen.only_reader(call)
    return _reader(seen, reader) if reader is not None and _passes_on(seen, reader) else reader


def _passes_on(seen: Watched, call: Call) -> bool:
    """A maximum, or what moves values in train too."""
    if call.kind == "function" and call.name.startswith(("max_pool", "adaptive_max_pool")):
        return True
    if type(call.target) in NOTHING or isinstance(call.target, _MAXIMA):
        return True
    return came_from(seen, call, call.target, torch.float32, train=True) is not None


def _behind_sums(seen: Watched, call: Call) -> Call | None:
    """The only reader of a sum, or of the sum of sums."""
    if call.kind != "function" or call.name not in ADDITIONS:
        return None
    reader = _reader(seen, call)
    return reader if reader is None or reader.name not in ADDITIONS else _behind_sums(seen, reader)


def _is_nonlinearity(call: Call) -> bool:
    return _base_name(call) in _NONLINEARITIES


def _base_name(call: Call) -> str:
    """The nonlinearity's name in torch: also of modules called after it, GELUActivation or QuickGELU say."""
    if call.kind == "function":
        return call.name.rstrip("_")
    if call.kind != "module":
        return ""
    name = type(call.target).__name__.lower().removesuffix("activation")
    known = {known.replace("_", ""): known for known in _NONLINEARITIES}
    own = next(call.target.parameters(), None) is not None or next(call.target.buffers(), None) is not None
    ends = [] if own else [known[k] for k in sorted(known, key=len) if name.endswith(k)]
    return known.get(name) or (ends[-1] if ends else name)

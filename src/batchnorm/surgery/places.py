"""Where batch normalization goes in a network without it: which layers a nonlinearity reads, and what it is.

Comes from: a watched forward pass. Goes to: ``insert.py``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd, _MaxPoolNd

from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.surgery.report import LEFT, Row
from batchnorm.surgery.rewrite import ADDITIONS, NOTHING
from batchnorm.surgery.watch import Call, Watched

LAYERS: dict[type[nn.Module], type[FusedBatchNorm]] = {
    nn.Linear: BatchNorm1d,
    nn.Conv1d: BatchNorm1d,
    nn.Conv2d: BatchNorm2d,
    nn.Conv3d: BatchNorm3d,
    nn.ConvTranspose1d: BatchNorm1d,
    nn.ConvTranspose2d: BatchNorm2d,
    nn.ConvTranspose3d: BatchNorm3d,
}
_NONLINEARITIES = {
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "softplus", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softsign", "logsigmoid", "tanhshrink",
    "hardshrink", "softshrink",
}  # fmt: skip
_OUTPUTS = {"sigmoid", "hardsigmoid", "logsigmoid", "tanh", "softplus"}  # that a model's output may end in
_RESHAPES = {"flatten", "unflatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "movedim"}
_MAXIMA = (_MaxPoolNd, _AdaptiveMaxPoolNd)


def row_of(seen: Watched, name: str, layer: Any) -> Row:
    """What becomes of a layer, or why it is left alone."""
    calls = seen.of(name)
    reader = _reader(seen, calls[0]) if len(calls) == 1 else None
    if hasattr(type(layer), "normalizes"):
        why = f"it has batch normalization, {name}.batch_norm"
    elif len(calls) != 1:
        why = "its forward is not called on the example" if not calls else f"it is called {len(calls)} times"
    elif kind_of(layer) is None:
        why = f"a {type(layer).__qualname__} with a forward of its own may do more than its weights"
    elif nn.utils.parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        why = "its weight is computed from others"
    elif not _has_batch(layer, calls[0]):
        why = "its output has no batch dimension: give an example with one"
    elif reader is None:
        why = "its output is read more than once"
    elif isinstance(reader.target, _BatchNorm):
        why = f"it has batch normalization, {reader.name}"
    elif _is_nonlinearity(reader):
        return _before(seen, name, reader, reader.label)
    elif (after := _behind_sums(seen, reader)) is not None and _is_nonlinearity(after):
        return _before(seen, name, after, f"{reader.label} and {after.label}")
    else:
        why = f"its output goes to {reader.label}"
    return Row(name, LEFT, why)


def _before(seen: Watched, name: str, nonlinearity: Call, label: str) -> Row:
    """Normalized, unless what follows is the model's output: a sigmoid there is the softmax of two classes."""
    reader = _reader(seen, nonlinearity)
    while reader is not None and (reader.name in _RESHAPES or isinstance(reader.target, nn.Flatten | nn.Unflatten)):
        reader = _reader(seen, reader)
    if _base_name(nonlinearity) in _OUTPUTS and reader is not None and reader.kind == "output":
        return Row(name, LEFT, f"its output goes to the model's output through {label}")
    return Row(name, "normalized", f"before {label}")


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """Which of torch's layers it computes as; None where it may do more."""
    kind = next(kind for kind in LAYERS if isinstance(layer, kind))
    same = all(getattr(type(layer), f, None) is getattr(kind, f, None) for f in ("forward", "_conv_forward"))
    return kind if same and "forward" not in vars(layer) else None


def _has_batch(layer: nn.Module, call: Call) -> bool:
    dimensions = {BatchNorm1d: 3, BatchNorm2d: 4, BatchNorm3d: 5}
    least = 2 if isinstance(layer, nn.Linear) else dimensions[LAYERS[kind_of(layer)]]  # type: ignore[index]
    return len(call.shape or ()) >= least


def _reader(seen: Watched, call: Call) -> Call | None:
    """What alone reads its output, behind what only passes it on; a maximum and a nonlinearity may change places."""
    reader = seen.only_reader(call)
    return _reader(seen, reader) if reader is not None and _passes_on(reader) else reader


def _passes_on(call: Call) -> bool:
    if call.kind == "function":
        return call.name.startswith(("max_pool", "adaptive_max_pool"))
    without_effect = isinstance(call.target, _DropoutNd) and call.target.p == 0
    return type(call.target) in NOTHING or isinstance(call.target, _MAXIMA) or without_effect


def _behind_sums(seen: Watched, call: Call) -> Call | None:
    """What alone reads a sum, or the sum of sums."""
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

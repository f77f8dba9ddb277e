"""Batch normalization, the addition and the activation behind it as one layer: ``from_torch(model, example=)``.

Where an activation module alone reads a layer, the layer takes it over and an ``Identity`` stays. Additions, functions
and activation modules with several call sites stand in somebody's ``forward``: the smallest module around them gets
one that torch.fx wrote, and is checked, outputs and gradients, in train and eval.

Comes from: ``from_torch``, ``to_torch``. Goes to: ``watch``, torch.fx.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from torch import nn

from batchnorm.functional import parse_activation
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.ops import fallback
from batchnorm.surgery.report import LEFT, Report, Row
from batchnorm.surgery.results import difference, results
from batchnorm.surgery.rewrite import ADDITIONS, NOTHING, hooked, rewrite
from batchnorm.surgery.watch import Call, Watched, arguments, watch, watch_in_train

TOLERANCE = 1e-6  # of the whole model in float64, where roundings add up
_IN_PLACE = ("add_", "__iadd__", "iadd")


class Fused(nn.Identity):
    """In the place of an activation that the layer before it took over."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.was = (activation,)  # a tuple hides it from torch


def fuse(model: nn.Module, example: Any) -> Report:
    """Fuse what can be, in place; the model's layers are ours already."""
    seen, in_train, before = watch(model, example), watch_in_train(model, example), results(model, arguments(example))
    report, within = Report(), dict[str, list[str]]()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, FusedBatchNorm):
            continue
        reason, last = _follow(seen, name, layer)
        if last is not None and in_train is not None and not _same(seen, in_train, name, layer):
            reason, last = "it, or what follows it, is called differently in train", None
        if last is None:
            report.append(Row(name, LEFT, reason))
        elif last.kind == "module" and reason == "" and len(seen.of(last.name)) == 1:
            _take_over(model, layer, last.target)
            report.append(Row(name, "fused", f"with {last.name}"))
        else:
            within.setdefault(_around(name, last.owner), []).append(name)
    for place in sorted(within, key=len, reverse=True):  # inner ones first, which outer ones may take up
        report += rewrite(model, example, place, within[place])
    order = [name for name, _ in model.named_modules()]
    report.sort(key=lambda row: order.index(row.layer))
    wrong = difference(before, results(model, arguments(example)), TOLERANCE) if report.of("fused") else None
    if wrong is not None:
        unfuse(model)
        why = f"with all that could be fused, the model {wrong}"
        return Report(Row(row.layer, LEFT, why) if row.done == "fused" else row for row in report)
    return report


def unfuse(model: nn.Module) -> None:
    """Undo it, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Fused):
                setattr(module, name, child.was[0].train(child.training))
        if isinstance(module, FusedBatchNorm) and module.fused:
            module.activation, module.fused = None, False
        while hasattr(type(module), "written_for"):  # of one that was written for one that was written
            module.__class__ = getattr(type(module), "written_for")  # noqa: B009


def _same(a: Watched, b: Watched, name: str, layer: FusedBatchNorm) -> bool:
    """Whether the same alone reads the layer, and is called as often."""
    (why, last), (other_why, other) = _follow(a, name, layer), _follow(b, name, layer)
    if last is None or other is None:
        return False
    return (why, last.label, len(a.of(last.name))) == (other_why, other.label, len(b.of(last.name)))


# ---- what follows a layer --------------------------------------------------------------------------------------------


def _follow(seen: Watched, name: str, layer: FusedBatchNorm) -> tuple[str, Call | None]:
    """(why a forward is to be rewritten, the last call to fuse); or (why nothing can be fused, None)."""
    calls = seen.of(name)
    if len(calls) != 1:
        return ("the example does not reach it" if not calls else f"it is called {len(calls)} times"), None
    (call,) = calls
    if layer.activation is not None or len(call.inputs) > 1:
        return "it has an activation or a residual already", None
    if hooked(layer, ("forward", "backward", "backward_pre")):
        return "it has hooks, which would see what follows it", None
    call = _past_identities(seen, call)
    reader = seen.only_reader(call)
    if reader is None:
        return "its output is read more than once" if call.readers else "nothing is known to read its output", None
    added = _adds(seen, call, reader)
    after = seen.only_reader(reader) if added else reader
    if after is not None and _activation(after) is not None:
        return ("an addition" if added else "" if after.kind == "module" else "a function"), after
    if added:
        return "an addition", reader
    hooks = ", which has hooks" if reader.kind == "module" and hooked(reader.target) else ""
    return f"its output goes to {reader.label}{hooks}", None


def _past_identities(seen: Watched, call: Call) -> Call:
    """The last of those that give the same tensor on."""
    reader = seen.only_reader(call)
    passes = reader is not None and type(reader.target) in NOTHING and not hooked(reader.target)
    return _past_identities(seen, reader) if reader is not None and passes else call


def _adds(seen: Watched, call: Call, reader: Call) -> bool:
    """Whether that adds something of the same shape to it."""
    if reader.kind != "function" or reader.name not in ADDITIONS or len(reader.inputs) != 2:
        return False
    mine = reader.inputs.index(call.index)
    return seen.calls[reader.inputs[1 - mine]].shape == call.shape and not (reader.name in _IN_PLACE and mine == 1)


def _activation(call: Call) -> str | None:
    if call.kind == "module":
        if hooked(call.target):
            return None
        try:
            return parse_activation(call.target)[0]
        except TypeError:
            return None
    name = call.name.rstrip("_")
    return name if call.kind == "function" and name in fallback.ACTIVATIONS and len(call.inputs) == 1 else None


def _around(layer: str, owner: str) -> str:
    """The smallest module that both are in."""
    pairs = zip(layer.split(".")[:-1], owner.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _take_over(model: nn.Module, layer: FusedBatchNorm, activation: nn.Module) -> None:
    name, slope = parse_activation(activation)
    layer.activation, layer.fused = (name, slope) if name == "leaky_relu" else name, True
    for module in list(model.modules()):
        for child, found in list(module.named_children()):
            if found is activation:
                setattr(module, child, Fused(activation).train(activation.training))

"""Batch normalization, the addition and the activation behind it as one layer: ``from_torch(model, example=)``.

Where an activation module alone reads a layer, the layer takes it over and an ``Identity`` stays. Additions, functions
and activation modules with several call sites stand in somebody's ``forward``: the smallest module around them gets
one that torch.fx wrote, and is checked, outputs and gradients, in train and eval.
"""

from __future__ import annotations

from functools import cache
from itertools import takewhile
from typing import Any, NamedTuple

from torch import fx, nn

from batchnorm.functional import parse_activation
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.ops.activations import NO_ACTIVATION, REFUSED, ROWS, Activation, activation_named, activation_of
from batchnorm.surgery.adopt import Fused, adopt
from batchnorm.surgery.between import crossed, in_the_way, passes
from batchnorm.surgery.checks import hooked, replaced, scripted
from batchnorm.surgery.graph import ADDITIONS
from batchnorm.surgery.report import LEFT, Report, Row
from batchnorm.surgery.results import difference, results
from batchnorm.surgery.rewrite import inputs_of, rewrite
from batchnorm.surgery.watch import Call, Watched, arguments, watch, watch_in_train

TOLERANCE = 1e-6  # of the whole model in float64, where roundings add up
_IN_PLACE = ("add_", "__iadd__", "iadd")


def fuse(model: nn.Module, example: Any) -> Report:
    """Fuse what can be, in place; the model's layers are ours already, or other people's."""
    before = results(model, arguments(example))
    report, within = adopt(model, example), dict[str, list[str]]()
    known = {row.layer for row in report}
    seen, in_train = watch(model, example), watch_in_train(model, example)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, FusedBatchNorm) or name in known:
            continue
        why_not, last, passed, adds = _follow(seen, name, layer)
        if last is not None and in_train is not None and not _same(seen, in_train, name, layer):
            why_not, last = "it, or what follows it, is called differently in train", None
        if last is None:
            report.append(Row(name, LEFT, why_not))
        elif last.kind == "module" and not adds and len(seen.of(last.name)) == 1:
            _take_over(model, name, last, passed)
            report.append(Row(name, "fused", f"with {last.name}"))
        else:
            within.setdefault(_around(name, last.owner), []).append(name)
    inputs = cache(lambda: inputs_of(model, example, [*within]))  # rewriting inner ones changes none
    for place in sorted(within, key=len, reverse=True):  # inner ones first, which outer ones may take up
        report += rewrite(model, inputs, place, within[place])
    report += scripted(model)
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
        if isinstance(module, FusedBatchNorm) and module.taken_from:
            module.hand_back()


def _same(a: Watched, b: Watched, name: str, layer: FusedBatchNorm) -> bool:
    """Whether the same alone reads the layer, and is called as often."""
    in_a, in_b = (
        None if (last := found.last) is None else (found.adds, last.kind, last.label, len(seen.of(last.name)))
        for seen, found in ((seen, _follow(seen, name, layer)) for seen in (a, b))
    )
    return in_a is not None and in_a == in_b


# ---- what follows a layer --------------------------------------------------------------------------------------------


class _Followed(NamedTuple):
    """Why nothing can be fused; or the last call to fuse, what comes between, and whether that adds something."""

    why_not: str
    last: Call | None = None
    between: tuple[Any, ...] = ()
    adds: bool = False


def _follow(seen: Watched, name: str, layer: FusedBatchNorm) -> _Followed:
    calls = seen.of(name)
    if len(calls) != 1:
        return _Followed("the example does not reach it" if not calls else f"it is called {len(calls)} times")
    (call,) = calls
    if layer.activation is not None or len(call.inputs) > 1:
        return _Followed("it has an activation or a residual already")
    if replaced(layer):
        return _Followed("its forward was replaced on the object")
    if hooked(layer, ("forward", "backward", "backward_pre")):
        return _Followed("it has hooks, which would see what follows it")
    between: list[Any] = []
    reader = seen.only_reader(call)
    while reader is not None and passes(reader.target) and _unwatched(reader.target):
        between.append(reader.target)
        call, reader = reader, seen.only_reader(reader)
    if reader is None:
        return _Followed("its output is read more than once" if call.readers else "nothing is known to read its output")
    adds = _adds(seen, call, reader)
    after = seen.only_reader(reader) if adds else reader
    activation = None if after is None else _activation(after)
    if not adds and activation is None:
        other = _summand(seen, call, reader)
        unusual = ", which has hooks" if reader.kind == "module" and not _unwatched(reader.target) else ""
        unusual = f", of something of another shape, {other.shape}" if other and other.shape != call.shape else unusual
        if type(reader.target) in REFUSED:
            unusual = f", a {type(reader.target).__name__}: {REFUSED[type(reader.target)]}"
        return _Followed(f"its output goes to {reader.label}{unusual}")
    why = in_the_way(between, activation or NO_ACTIVATION, adds)
    if why is not None:
        return _Followed(why)
    if after is None or activation is None:
        return _Followed("", reader, tuple(between), adds)
    return _Followed("", after, tuple(between), adds)


def _unwatched(module: Any) -> bool:
    """Whether nobody has put hooks, or another forward, on a module."""
    return not hooked(module) and not replaced(module)


def _adds(seen: Watched, call: Call, reader: Call) -> bool:
    """Whether that adds something of the same shape to it."""
    other = _summand(seen, call, reader)
    in_place_of_another = reader.name in _IN_PLACE and reader.inputs.index(call.index) == 1
    return other is not None and other.shape == call.shape and not in_place_of_another


def _summand(seen: Watched, call: Call, reader: Call) -> Call | None:
    """The other summand of an addition."""
    if reader.kind != "function" or reader.name not in ADDITIONS or len(reader.inputs) != 2:
        return None
    return seen.calls[reader.inputs[1 - reader.inputs.index(call.index)]]


def _activation(call: Call) -> Activation | None:
    if call.kind == "module":
        return activation_of(call.target) if _unwatched(call.target) else None
    row = ROWS.get(call.name.rstrip("_")) if call.kind == "function" and len(call.inputs) == 1 else None
    return activation_named(row.name) if row else None  # its parameters are read when the forward is rewritten


def _around(layer: str, owner: str) -> str:
    """The smallest module that both are in."""
    pairs = zip(layer.split(".")[:-1], owner.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _take_over(model: nn.Module, place: str, call: Call, between: tuple[Any, ...]) -> None:
    activation, around = call.target, _around(place, call.owner)
    layer: Any = model.get_submodule(place)
    path = place.removeprefix(f"{around}.").split(".")
    g = parse_activation(activation)
    layer.activation, layer.fused = activation, True
    root = model.get_submodule(around)
    parent, _, child = call.name.rpartition(".")
    by, held = (root, path, layer), (model.get_submodule(parent), child)
    where = () if isinstance(root, fx.GraphModule) else (by, held)  # such a program cannot hold itself
    placeholder = Fused(activation, layer, *where)
    layer.taken_from = (*layer.taken_from, placeholder, *crossed(list(between), layer, g, adds=False))
    for module in model.modules():
        for child, found in module._modules.items():
            if found is activation:
                module._modules[child] = placeholder

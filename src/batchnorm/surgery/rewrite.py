"""A module's forward written anew by torch.fx, with layers that take over what follows them, and checked in float64."""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.surgery.checks import replaced
from batchnorm.surgery.copies import cloned, dense, scratch, tensors_of
from batchnorm.surgery.effects import Reached
from batchnorm.surgery.form import Form
from batchnorm.surgery.graph import fuse_in_graph
from batchnorm.surgery.originals import Regraphed, Rewritten, own_class, through
from batchnorm.surgery.report import LEFT, Row
from batchnorm.surgery.results import difference, results
from batchnorm.surgery.subclass import subclass
from batchnorm.surgery.surroundings import SURROUNDINGS
from batchnorm.surgery.tracer import Tracer
from batchnorm.surgery.watch import in_eager, run_itself

_CONTEXTS = (torch.autocast, torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)


def rewrite(
    model: nn.Module, inputs: Callable[[], dict[str, tuple[list[Any], bool]]], place: str, names: list[str]
) -> list[Row]:
    """Fuse these layers in the forward of the module at ``place``, or leave all of it as it is.

    ``inputs``: gives what ``inputs_of`` found, for this module too. Plain values that the forward reads are constants
    afterwards.
    """
    module: Any = model.get_submodule(place)
    where = f"the forward of {place or 'the model'}"
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    owners: dict[str, tuple[Any, ...]] = {}
    undo = _undo(module, list(layers.values()))
    why: str | None
    try:
        if replaced(module):
            raise RuntimeError("it was replaced on the object, and a new one would not be called")
        ((given, *more), changes) = inputs()[place]
        if more or changes:
            why = f"it is called {1 + len(more)} times" if more else "it changes what it is given"
            raise RuntimeError(why)
        local = {name: name[len(place) + 1 :] if place else name for name in names}
        before = results(module, given)
        if len(before.tensors) == 1:
            raise RuntimeError("it does not run in float64, in which it is checked")
        is_graph = isinstance(module, fx.GraphModule)
        form = None if is_graph else Form(type(module).forward, *given)
        graph = copy.deepcopy(module.graph) if form is None else _traced(module, form, list(local.values()))
        calls = _called(graph)
        found = {name: fuse_in_graph(graph, module, local[name], layer) for name, layer in layers.items()}
        owners = {name: crossed for name, (_, crossed) in found.items()}
        called = {name: module.get_submodule(name) for name in _called(graph)}
        fused = {name: layer for name, layer in called.items() if isinstance(layer, FusedBatchNorm) and layer.fused}
        passed = [*through(module, calls, calls - _called(graph))]
        owner = Rewritten(module, fused, form, passed) if form else Regraphed(module, fused, module.graph)
        if isinstance(module, fx.GraphModule):
            module.graph = graph
        else:
            module.__class__ = _with_forward(type(module), graph)
            vars(module)["written_by"] = owner
        wrong = difference(before, results(module, given))
        why = wrong and f"{where}, rewritten, {wrong}"
    except Exception as error:  # whatever user code raises when it is traced
        why = f"{where} cannot be traced: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
    if why:
        undo()
        for each in owners.values():
            for one in each:
                one.hand_back()
        return [Row(name, LEFT, why) for name in names]
    for name, each in owners.items():
        layers[name].taken_from = (*layers[name].taken_from, *each)
    for layer in fused.values():
        layer.taken_from = (*layer.taken_from, owner)
    return [
        Row(name, "fused", f"with {what}, in {where}")
        if what
        else Row(name, LEFT, f"nothing is left for it in {where}: another layer took it over, or it is not alone")
        for name, (what, _) in found.items()
    ]


def _called(graph: fx.Graph) -> Counter[str]:
    """The modules that it calls, by their places, with the number of calls."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def _undo(module: Any, layers: list[Any]) -> Callable[[], None]:
    """A function that brings the forward and these layers back to their present state."""
    kind: Any = type(module)
    graph: Any = module.graph if isinstance(module, fx.GraphModule) else None
    owner = vars(module).get("written_by")

    def undo() -> None:
        if not isinstance(module, fx.GraphModule):
            module.__class__ = kind
            vars(module).pop("written_by", None)
            vars(module).update({} if owner is None else {"written_by": owner})
        elif module.graph is not graph:
            module.graph = graph
        for layer in layers:
            layer.activation, layer.fused = None, False

    return undo


def inputs_of(model: nn.Module, example: Any, names: list[str]) -> dict[str, tuple[list[Any], bool]]:
    """The inputs of these modules when the model runs on the example, and whether they change them in place."""
    twin = scratch(model)
    found: dict[str, tuple[list[Any], list[bool]]] = {name: ([], []) for name in names}

    def noting(name: str) -> None:
        seen, changed = found[name]
        reached: list[Reached] = []

        def before(m: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(cloned((args, kwargs)))
            reached.append(Reached(args, kwargs))

        def after(m: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            now, then = ([dense(t) for t in tensors_of(each)] for each in ((args, kwargs), seen[-1]))
            changed.append(bool(reached.pop().changed()) or not all(map(torch.equal, now, then)))

        module = twin.get_submodule(name)
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)

    for name in names:
        noting(name)
    run_itself(twin, cloned(example))
    return {name: (seen, any(changed)) for name, (seen, changed) in found.items()}


def _traced(module: nn.Module, form: Form, layers: list[str]) -> fx.Graph:
    """Its graph, which must not depend on train and eval, or on what it finds around it."""
    graphs: list[fx.Graph] = []
    twin = scratch(module)
    with in_eager(twin), torch.enable_grad():
        for said, mode, around in SURROUNDINGS:
            twin.train(mode)
            with around():
                graphs.append(_recorded(twin, layers, form))
            if str(graphs[-1]) != str(graphs[0]):
                raise RuntimeError(f"it does something else {said}")
        for node in graphs[0].nodes:
            node.type = None  # annotations, which may be strings
        if any({"dtype", "device"} & {*node.kwargs} for node in graphs[0].nodes if node.meta.get("made")):
            others = {torch.bfloat16, torch.float16} - {p.dtype for p in module.parameters()}
            moved = scratch(module).eval().to(device="meta", dtype=next(iter(others), torch.float32))
            if str(_recorded(moved, layers, form)) != str(graphs[1]):
                raise RuntimeError("it makes a tensor with the dtype or device of its parameters, a constant then")
    return graphs[0]


def _recorded(twin: nn.Module, layers: list[str], form: Form) -> fx.Graph:
    with _all_recorded(twin), Tracer(layers, form) as tracer:
        return tracer.trace(twin)


@contextmanager
def _all_recorded(module: nn.Module) -> Iterator[None]:
    """Raises where a forward does what torch.fx does not record."""

    def refused(context: Any) -> None:
        raise RuntimeError(f"it enters {type(context).__name__}, which would be lost")

    drawn, reached = _drawn(), Reached(module)
    entered = [(context, context.__enter__) for context in _CONTEXTS]
    for context in _CONTEXTS:
        context.__enter__ = refused  # type: ignore[method-assign]
    try:
        yield
        if _drawn() != drawn:
            raise RuntimeError("it draws random numbers that would be constants")
        if changed := reached.changed():
            raise RuntimeError(f"it changes {changed}, which would happen once")
    finally:
        for context, enter in entered:
            context.__enter__ = enter  # type: ignore[method-assign]


def _drawn() -> list[Any]:
    """The states of all random number generators."""
    numpy: Any = sys.modules.get("numpy")
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [state.tolist() for state in (torch.get_rng_state(), *on_cuda)]
    return [random.getstate(), states, numpy and str(numpy.random.get_state())]


def _with_forward(kind: type, graph: fx.Graph) -> type:
    """A subclass whose forward the graph is. It is found again when a module is copied or unpickled."""
    code = graph.python_code("self")
    return _written(kind, _format_import_block(code.globals, sys_importer) + "\n" + code.src)


@cache
def _written(kind: Any, source: str) -> type:
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    written = namespace["forward"]

    was = kind.forward

    @wraps(was)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = self.written_by
        given = owner.form.given(was, args, kwargs) if kind.forward is was and owner.is_whole() else None
        if given is not None:
            return written(self, *given)
        owner.hand_back()
        return own_class(type(self)).forward(self, *args, **kwargs)  # of a shallow copy too

    def reduced(module: nn.Module, protocol: int) -> Any:
        return _remade, (kind, source), module.__dict__

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return own_class(cls)(*args, **kwargs)  # type(module)(...) has the forward that there was

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "forward" and not _calls(value, forward):  # it is to call the layers by itself
            self.written_by.hand_back()
        kind.__setattr__(self, name, value)

    def scriptable(self: Any) -> nn.Module:
        """For ``torch.jit.script``, which reads the class's own forward."""
        from batchnorm.surgery.convert import to_torch

        return to_torch(self)

    content = {
        "forward": forward,
        "original_class": kind,
        "__reduce_ex__": reduced,
        "__new__": new,
        "__setattr__": set_attribute,
        "__prepare_scriptable__": scriptable,
    }
    try:
        return subclass(kind, content)
    except TypeError as error:
        raise RuntimeError(f"its class, {kind.__name__}, takes no subclass: {error}") from error


def _calls(function: Any, forward: Any) -> bool:
    """Whether it is a wrapper of that, as functools has it: accelerate's hooks are."""
    while function is not None:
        if getattr(function, "__func__", function) is forward:
            return True
        function = vars(function).get("__wrapped__") if hasattr(function, "__dict__") else None
    return False


def _remade(kind: Any, source: str) -> nn.Module:
    return own_class(kind).__new__(_written(kind, source))

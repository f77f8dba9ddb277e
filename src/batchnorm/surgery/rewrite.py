"""A module's forward written anew by torch.fx, with layers that take over what follows them, and checked in float64.

Comes from: ``fuse``. Goes to: a subclass of the module's class.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer
from torch.utils import _pytree

from batchnorm.functional import parse_activation
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.ops import fallback
from batchnorm.population import preserve_state
from batchnorm.surgery.report import LEFT, Row
from batchnorm.surgery.results import difference, results
from batchnorm.surgery.watch import in_eager, is_leaf, run, tensors_of

ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__", "iadd")
NOTHING = (nn.Identity,)
_CONTEXTS = (torch.autocast, torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)


class _Tracer(fx.Tracer):
    """Goes into those modules only that hold one of the layers."""

    def __init__(self, layers: list[str]) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        holds = any(name.startswith(f"{module_qualified_name}.") for name in self.layers)
        if is_leaf(m) or isinstance(m, FusedBatchNorm) or not holds:
            return True
        if hooked(m):
            raise RuntimeError(f"{module_qualified_name} in it has hooks, which would not be called")
        return False

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        frame = sys._getframe()
        while frame.f_back is not None:  # what checkpoint calls is recorded, that it calls it is not
            frame = frame.f_back
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                raise RuntimeError("it calls torch.utils.checkpoint, which would be lost")
        return super().create_proxy(*args, **kwargs)


def rewrite(model: nn.Module, example: Any, place: str, names: list[str]) -> list[Row]:
    """Fuse these layers in the forward of the module at ``place``, or leave all of it as it is.

    Arguments that the example does not give, and plain attributes that the forward reads, are constants afterwards.
    """
    module = model.get_submodule(place)
    where = f"the forward of {place or 'the model'}"
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    old = type(module)
    try:
        given = _given(model, example, module)
        local = {name: name[len(place) + 1 :] if place else name for name in names}
        before = results(module, given)
        if len(before) == 1:
            raise RuntimeError("it does not run in float64, in which it is checked")
        graph = _traced(module, given, list(local.values()))
        found = {name: _fuse_in_graph(graph, module, local[name], layer) for name, layer in layers.items()}
        module.__class__ = _with_forward(old, graph)
        wrong = difference(before, results(module, given))
        why = wrong and f"{where}, rewritten, {wrong}"
    except Exception as error:  # whatever user code raises when it is traced
        why = f"{where} cannot be traced: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
    if why:
        module.__class__ = old
        for layer in layers.values():
            layer.activation, layer.fused = None, False
        return [Row(name, LEFT, why) for name in names]
    return [
        Row(name, "fused", f"with {what}, in {where}") if what else Row(name, LEFT, f"{where} has no such")
        for name, what in found.items()
    ]


def hooked(module: nn.Module, kinds: tuple[str, ...] = ("forward", "forward_pre", "backward", "backward_pre")) -> bool:
    """Whether somebody looks at what comes in or goes out."""
    return any(getattr(module, f"_{kind}_hooks") for kind in kinds)


def _given(model: nn.Module, example: Any, module: nn.Module) -> tuple[Any, dict[str, Any]]:
    """What the module is called with when the model runs on the example."""
    seen: list[Any] = []
    changed: list[bool] = []

    def before(m: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(_pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))

    def after(m: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        pairs = zip(tensors_of((args, kwargs)), tensors_of(seen[-1]), strict=True)
        changed.append(not all(torch.equal(a, b) for a, b in pairs))

    hooks = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 1:
        raise RuntimeError(f"it is called {len(seen)} times")
    if changed[0]:
        raise RuntimeError("it changes what it is given, in place")
    given: tuple[Any, dict[str, Any]] = seen[0]
    return given


def _traced(module: nn.Module, given: Any, layers: list[str]) -> fx.Graph:
    """Its graph, which must not depend on train and eval; arguments that were not given keep their defaults."""
    args, kwargs = given
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs).arguments
    values = {name: parameter.default for name, parameter in signature.parameters.items()} | bound
    fixed = {
        name: value for name, value in values.items() if value is None or isinstance(value, bool | int | float | str)
    }
    graphs = []
    with preserve_state(module), in_eager(module), torch.enable_grad():
        for mode in (True, False):
            module.train(mode)
            with _all_recorded(module):
                graphs.append(_Tracer(layers).trace(module, concrete_args=fixed or None))
    if str(graphs[0]) != str(graphs[1]):
        raise RuntimeError("it does something else in train than in eval")
    return graphs[0]


@contextmanager
def _all_recorded(module: nn.Module) -> Iterator[None]:
    """Raises where a forward does what torch.fx does not record; attributes that it sets are put back."""

    def refused(context: Any) -> None:
        raise RuntimeError(f"it enters {type(context).__name__}, which would be lost")

    modules = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    drawn, marks, saved = _drawn(), [_marks(m) for m in modules], [_attributes(m) for m in modules]
    entered = [(context, context.__enter__) for context in _CONTEXTS]
    for context in _CONTEXTS:
        context.__enter__ = refused  # type: ignore[method-assign]
    try:
        yield
        if _drawn() != drawn:
            raise RuntimeError("it draws random numbers that would be constants")
        if [_marks(m) for m in modules] != marks:
            raise RuntimeError("it changes its attributes, which would happen once")
    finally:
        for context, enter in entered:
            context.__enter__ = enter  # type: ignore[method-assign]
        for m, (attributes, held) in zip(modules, saved, strict=True):
            vars(m).clear()
            vars(m).update(attributes)
            for name, content in held.items():
                attributes[name].clear()
                (attributes[name].extend if isinstance(content, list) else attributes[name].update)(content)


def _drawn() -> list[Any]:
    """The states of all random number generators."""
    numpy: Any = sys.modules.get("numpy")
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [state.tolist() for state in (torch.get_rng_state(), *on_cuda)]
    return [random.getstate(), states, numpy and str(numpy.random.get_state())]


def _attributes(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """All, and what is in those that are containers."""
    found = dict(vars(module))
    return found, {name: copy.copy(value) for name, value in found.items() if isinstance(value, list | set | dict)}


def _marks(module: nn.Module) -> list[Any]:
    """Other ones where an attribute, or what is in one, is another, or a buffer was written to."""
    attributes, held = _attributes(module)
    inside = [each for value in held.values() for each in (value.values() if isinstance(value, dict) else value)]
    written = [t._version for t in module._buffers.values() if t is not None]
    return [*attributes, *map(id, (*attributes.values(), *inside)), *written]


def _fuse_in_graph(graph: fx.Graph, module: nn.Module, name: str, layer: Any) -> str:
    """Fuse one layer; what with, or nothing."""
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if len(nodes) != 1:
        return ""
    (node,) = nodes
    chain, kwargs = [node], dict(node.kwargs)
    after = _only_user(node)
    while after is not None and after.op == "call_module" and type(module.get_submodule(str(after.target))) in NOTHING:
        chain.append(after)
        after = _only_user(after)
    passed = len(chain)
    if after is not None and _name(after) in ADDITIONS and len(after.all_input_nodes) == 2 and not after.kwargs:
        kwargs["residual"] = next(other for other in after.all_input_nodes if other is not chain[-1])
        chain.append(after)
        after = _only_user(after)
    activation = None if after is None else _activation_of(module, after)
    if after is not None and activation is not None:
        chain.append(after)
    if len(chain) == passed:
        return ""
    with graph.inserting_before(chain[-1]):
        chain[-1].replace_all_uses_with(graph.call_module(name, node.args, kwargs))
    for done in reversed(chain):
        graph.erase_node(done)
    layer.activation, layer.fused = activation, True
    return " and ".join(str(done.target) if done.op == "call_module" else f"{_name(done)}()" for done in chain[passed:])


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _activation_of(module: nn.Module, node: fx.Node) -> str | tuple[str, float] | None:
    """As a layer has it."""
    if node.op == "call_module":
        if hooked(module.get_submodule(str(node.target))):
            return None
        try:
            name, slope = parse_activation(module.get_submodule(str(node.target)))
        except TypeError:
            return None
    else:
        found, (_, *args) = _name(node).rstrip("_"), node.args
        if found not in fallback.ACTIVATIONS or len(node.all_input_nodes) != 1:
            return None
        slope = node.kwargs.get("negative_slope", args[0] if args else 0.01) if found == "leaky_relu" else 0.01  # type: ignore[assignment]
        name = found
    return (name, float(slope)) if name == "leaky_relu" else name


def _with_forward(kind: type, graph: fx.Graph) -> type:
    """A subclass whose forward the graph is. It is found again when a module is copied or unpickled."""
    code = graph.python_code("self")
    return _written(kind, _format_import_block(code.globals, sys_importer) + "\n" + code.src)


@cache
def _written(kind: type, source: str) -> type:
    namespace: dict[str, Any] = {}
    exec(source, namespace)

    def reduced(module: nn.Module, protocol: int) -> Any:
        return _remade, (kind, source), module.__dict__

    return type(
        kind.__name__, (kind,), {"forward": namespace["forward"], "written_for": kind, "__reduce_ex__": reduced}
    )


def _remade(kind: type, source: str) -> nn.Module:
    made: Any = _written(kind, source)
    return made.__new__(made)

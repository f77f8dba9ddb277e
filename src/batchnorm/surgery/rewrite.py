"""A module's forward written anew by torch.fx, with layers that take over what follows them, and checked in float64.

Comes from: ``fuse``. Goes to: a subclass of the module's class.
"""

from __future__ import annotations

import copy
import inspect
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
from batchnorm.surgery.watch import is_leaf, run, tensors_of

ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__", "iadd")
NOTHING = (nn.Identity,)
TOLERANCE = 1e-9  # the largest error, in float64, relative to the largest value of a tensor
LEAST = 1e-3  # of the largest value of all: what that is at the least


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or isinstance(m, FusedBatchNorm)


def rewrite(model: nn.Module, example: Any, place: str, names: list[str]) -> list[Row]:
    """Fuse these layers in the forward of the module at ``place``, or leave all of it as it is."""
    module = model.get_submodule(place)
    where = f"the forward of {place or 'the model'}"
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    try:
        given = _given(model, example, module)
        before = _results(module, given)
        graph = _traced(module, given)
    except Exception as error:  # whatever user code raises when it is traced
        return [Row(name, LEFT, f"{where} cannot be traced: {str(error).splitlines()[0][:200]}") for name in names]
    rows = []
    for name, layer in layers.items():
        found = _fuse_in_graph(graph, module, name[len(place) + 1 :] if place else name, layer)
        rows.append(
            Row(name, "fused", f"with {found}, in {where}") if found else Row(name, LEFT, f"{where} has no such")
        )
    old = type(module)
    module.__class__ = _with_forward(old, graph)
    wrong = _difference(before, _results(module, given))
    if wrong is not None:
        module.__class__ = old
        for layer in layers.values():
            layer.activation, layer.fused = None, False
        return [Row(name, LEFT, f"{where}, rewritten, {wrong}") for name in names]
    return rows


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


def _traced(module: nn.Module, given: Any) -> fx.Graph:
    """Its graph, which must not depend on train and eval; arguments that were not given keep their defaults."""
    args, kwargs = given
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs).arguments
    fixed = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in bound and parameter.default is not inspect.Parameter.empty
    } | {name: value for name, value in bound.items() if value is None or isinstance(value, bool | int | float | str)}
    graphs = []
    with preserve_state(module):
        for mode in (True, False):
            module.train(mode)
            graphs.append(_Tracer().trace(module, concrete_args=fixed or None))
    if str(graphs[0]) != str(graphs[1]):
        raise RuntimeError("it does something else in train than in eval")
    return graphs[0]


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


def _results(module: nn.Module, given: Any) -> list[list[Tensor]]:
    """Outputs, then gradients, in eval and train, of a copy in float64."""
    found: list[list[Tensor]] = []
    for mode in (False, True):
        wide = copy.deepcopy(module).double().train(mode)
        args, kwargs = _pytree.tree_map_only(Tensor, _leaf, given)
        with torch.random.fork_rng([]), torch.enable_grad():
            torch.manual_seed(0)
            try:
                out = [t for t in tensors_of(wide(*args, **kwargs)) if t.is_floating_point()]
            except ValueError:
                if mode:  # one value per channel cannot be trained on
                    continue
                raise
            wanted = [t for t in (*tensors_of((args, kwargs)), *wide.parameters()) if t.requires_grad]
            loss = sum((t * torch.randn_like(t)).sum() for t in out)
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()  # type: ignore[arg-type]
        found += [[t.detach() for t in out], [t for t in gradients if t is not None]]
    return found


def _leaf(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_() if t.is_floating_point() else t


def _difference(before: list[list[Tensor]], after: list[list[Tensor]]) -> str | None:
    """What is wrong, if anything. LEAST: the gradient of a bias before batch normalization is rounding alone."""
    if [len(tensors) for tensors in before] != [len(tensors) for tensors in after]:
        return "has other gradients"
    for old, new in zip(before, after, strict=True):
        largest = max((t.abs().max().item() for t in old if t.numel()), default=0.0)
        for a, b in zip(old, new, strict=True):
            scale = max(a.abs().max().item(), LEAST * largest) if a.numel() else 1.0
            error = (a - b).abs().max().item() / scale if scale else 0.0
            if not error <= TOLERANCE:
                return f"gives other values: {error:.1e} of the largest"
    return None

"""Layers of a torch.fx graph that take over the addition and the activation behind them."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from batchnorm.ops.activations import NO_ACTIVATION, Activation, activation_called, activation_of
from batchnorm.surgery.between import crossed, in_the_way, passes
from batchnorm.surgery.checks import hooked, replaced

ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__", "iadd")


def fuse_in_graph(graph: fx.Graph, module: nn.Module, name: str, layer: Any) -> tuple[str, tuple[Any, ...]]:
    """Fuse one layer; what with, or nothing; and the dropouts in between that are to stay without effect."""
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if len(nodes) != 1:
        return "", ()
    (node,) = nodes
    chain, kwargs, passed = [node], dict(node.kwargs), list[Any]()
    after = _only_user(node)
    while after is not None and after.op == "call_module" and passes(module.get_submodule(str(after.target))):
        chain.append(after)
        passed.append(module.get_submodule(str(after.target)))
        after = _only_user(after)
    between, adds = chain[1:], False
    if after is not None and _name(after) in ADDITIONS and len(after.all_input_nodes) == 2 and not after.kwargs:
        kwargs["residual"] = next(other for other in after.all_input_nodes if other is not chain[-1])
        chain.append(after)
        after, adds = _only_user(after), True
    activation = None if after is None else _activation_of(module, after)
    if after is not None and activation is not None:
        chain.append(after)
    taken = chain[1 + len(between) :]
    g = activation or NO_ACTIVATION
    if not taken or in_the_way(passed, g, adds):
        return "", ()
    with graph.inserting_before(chain[-1]):
        new = graph.call_module(name, node.args, kwargs)
        for one in between:  # what comes between stays, behind
            new = graph.call_module(str(one.target), (new,))
        chain[-1].replace_all_uses_with(new)
    for done in reversed(chain):
        graph.erase_node(done)
    layer.activation, layer.fused = g.as_users_write_it(), True
    what = [str(done.target) if done.op == "call_module" else f"{_name(done)}()" for done in taken]
    return " and ".join(what), crossed(passed, layer, g, adds)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _activation_of(module: nn.Module, node: fx.Node) -> Activation | None:
    """The activation that a node computes."""
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        return None if hooked(target) or replaced(target) else activation_of(target)
    if len(node.all_input_nodes) != 1:
        return None
    return activation_called(_name(node).rstrip("_"), node.args[1:], node.kwargs)

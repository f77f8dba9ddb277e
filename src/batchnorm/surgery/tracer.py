"""torch.fx's tracer as a forward that is written anew needs it: where it goes in, and what it makes of tensors."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from batchnorm.surgery.between import passes
from batchnorm.surgery.checks import hooked, replaced
from batchnorm.surgery.form import Form
from batchnorm.surgery.watch import is_leaf


class Tracer(fx.Tracer):
    """Goes into those modules only that hold one of the layers; a context, in which it sees tensors being made.

    A tensor that the forward makes of nothing that it is given (``torch.eye(3)``) would be a constant of torch.fx, kept
    on one device in one dtype. Here the calls that made it are written down.
    """

    def __init__(self, layers: list[str], form: Form) -> None:
        super().__init__()
        self.layers, self.form = layers, form
        self.making = _Making()

    def __enter__(self) -> Tracer:
        self.making.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self.making.__exit__(*details)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        holds = any(name.startswith(f"{module_qualified_name}.") for name in self.layers)
        holds = holds or (type(m) is nn.Sequential and all(passes(part) for part in m))
        if is_leaf(m) or not holds:
            return True
        if replaced(m):
            raise RuntimeError(f"the forward of {module_qualified_name} in it was replaced on the object")
        if hooked(m):
            raise RuntimeError(f"{module_qualified_name} in it has hooks, which would not be called")
        return False

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            self.path_of_module(m)
        except NameError:
            if _holds_nothing(m) and not hooked(m) and not replaced(m) and type(m).__module__.startswith("torch.nn."):
                return forward(*args, **kwargs)  # the function that it is: F.silu
            kind = type(m).__name__
            raise RuntimeError(f"it calls a {kind} that is no child of a module (a class has it, or a list)") from None
        return super().call_module(m, forward, args, kwargs)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        frame = sys._getframe()
        while frame.f_back is not None:  # what checkpoint calls is recorded, that it calls it is not
            frame = frame.f_back
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                raise RuntimeError("it calls torch.utils.checkpoint, which would be lost")
        return super().create_proxy(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        given = self.form.proxies(lambda name: self.create_proxy("placeholder", name, (), {}))
        args, kwargs = self.form.arguments(given)

        def forward(module: nn.Module) -> Any:
            return root_fn(module, *args, **kwargs)

        return forward, [self.root]

    def create_arg(self, a: Any) -> Any:
        made = self.making.how.get(id(a)) if isinstance(a, Tensor) else None
        if made is None:
            return super().create_arg(a)
        _, version, function, args, kwargs = made
        if not a.is_inference() and a._version != version:
            raise RuntimeError("it makes a tensor and changes it in place, which would be a constant")
        name = getattr(function, "__name__", "")
        if name == "__get__":  # a property: t.T
            proxy = self.create_proxy("call_function", getattr, (args[0], function.__self__.__name__), {})
        elif getattr(Tensor, name, None) is function:
            proxy = self.create_proxy("call_method", name, args, kwargs)
        else:
            proxy = self.create_proxy("call_function", function, args, kwargs)
        proxy.node.meta["made"] = True
        return proxy.node


def _holds_nothing(module: nn.Module) -> bool:
    """Whether it has neither tensors nor children."""
    return not any((module._parameters, module._buffers, module._modules))


class _Making(TorchFunctionMode):
    """How tensors are made that are made of nothing that is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.how: dict[int, tuple[Tensor, int, Any, Any, Any]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _pytree.tree_leaves((args, kwargs))
        out = function(*args, **kwargs)
        if type(out) is Tensor and not any(isinstance(each, fx.Proxy) or each is out for each in given):
            self.how[id(out)] = out, 0 if out.is_inference() else out._version, function, args, kwargs
        return out

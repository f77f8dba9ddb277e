"""Which batch normalization layers come before which, seen in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.population.attachments import Attached


def depths(model: nn.Module, layers: dict[str, Any], run: Callable[[nn.Module], None]) -> dict[str, int]:
    """1 for a layer with no other one before it, 2 for one that comes after those alone, and so on.

    A layer that is used several times has its largest depth. Layers that ``run`` does not reach are missing.
    """
    watch = _Watch()
    depth: dict[str, int] = {}
    hooks: list[Attached] = []

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            here = watch.of(inputs) + 1
            depth[name] = max(depth.get(name, 0), here)
            watch.depths[output] = here

        return hook

    try:
        hooks += [Attached(layer, [layer.register_forward_hook(note(name))]) for name, layer in layers.items()]
        with watch:
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return depth


def stages(depth: dict[str, int], layers: dict[str, Any]) -> list[list[str]]:
    """Names of the layers of each depth, in their order; those that were not reached go with the last."""
    last = max(depth.values(), default=1)
    return [[name for name in layers if depth.get(name, last) == d] for d in sorted({*depth.values(), last})]


class _Watch(TorchDispatchMode):
    """Every tensor's depth: the largest of those that it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.depths = WeakTensorKeyDictionary()

    def of(self, values: Any) -> int:
        """The largest depth of the tensors in there."""
        tensors = [value for value in _pytree.tree_leaves(values) if isinstance(value, Tensor)]
        return max((self.depths.get(t, 0) for t in tensors), default=0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        depth = self.of((args, kwargs))
        out = function(*args, **kwargs)
        if depth:
            for t in _pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.depths[t] = max(depth, self.depths.get(t, 0))
        return out

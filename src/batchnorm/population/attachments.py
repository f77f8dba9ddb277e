"""Temporary hooks and values on a layer. Copies of the layer, and files, do not have them.

``copy`` and ``pickle`` ask ``copyreg`` how a class is taken apart, so that the layer itself needs nothing for it, and
what others hook or unhook meanwhile goes into its own dicts.
"""

from __future__ import annotations

import copyreg
from collections import Counter
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

ABSENT = object()  # an attribute that is of the class alone
_on: dict[nn.Module, list[Attached]] = {}
_kinds: Counter[type] = Counter()  # the classes of these layers
_others: dict[type, Any] = {}  # how somebody else has them taken apart
_lock = Lock()


class Attached:
    """Hooks on a layer, until ``remove``.

    ``own`` tells what copies and files have, attributes and buffers by name, in place of what is there at that moment.
    """

    def __init__(
        self, layer: nn.Module, handles: Iterable[RemovableHandle] = (), own: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self.layer, self.kind, self.handles, self.own = layer, type(layer), list(handles), own
        with _lock:
            _on.setdefault(layer, []).append(self)
            _kinds[self.kind] += 1
            if _kinds[self.kind] == 1:
                _others[self.kind] = copyreg.dispatch_table.get(self.kind)
                copyreg.dispatch_table[self.kind] = _apart

    def remove(self) -> None:
        """The hooks are gone; what stood in place of the layer's own is the caller's to take away."""
        for handle in self.handles:
            handle.remove()
        with _lock:
            _on[self.layer].remove(self)
            if not _on[self.layer]:
                del _on[self.layer]
            _kinds[self.kind] -= 1
            if not _kinds[self.kind]:
                del _kinds[self.kind]
                other = _others.pop(self.kind)
                if copyreg.dispatch_table.get(self.kind) is _apart:
                    del copyreg.dispatch_table[self.kind]
                    if other is not None:
                        copyreg.dispatch_table[self.kind] = other


def own_now(layer: nn.Module) -> dict[str, Any]:
    """The layer's own values, for which others stand in now."""
    own: dict[str, Any] = {}
    for one in reversed(_on.get(layer, [])):  # the first to come found the layer's own
        own |= one.own()
    return own


def _apart(layer: nn.Module) -> Any:
    """What ``__reduce_ex__`` gives, without what is on the layer."""
    other = _others.get(type(layer))
    parts: Any = other(layer) if other else layer.__reduce_ex__(4)
    here = _on.get(layer, [])
    if not here or isinstance(parts, str) or len(parts) < 3 or not isinstance(parts[2], dict):
        return parts
    state, ids = dict(parts[2]), {handle.id for one in here for handle in one.handles}
    for name, hooks in state.items():
        if "hooks" in name and isinstance(hooks, dict):
            state[name] = type(hooks)((id, hook) for id, hook in hooks.items() if id not in ids)
    buffers = state["_buffers"] = dict(state.get("_buffers", ()))
    for name, value in own_now(layer).items():
        place = buffers if name in buffers else state
        if value is ABSENT:
            place.pop(name, None)
        else:
            place[name] = value
    return (*parts[:2], state, *parts[3:])

"""Whether a forward repeats an earlier one, as activation checkpointing does in backward.

Not every forward inside backward is a repetition: a hook, or somebody's ``autograd.Function``, may run a layer there
for the first time. Two things repeat: the functions of ``torch.utils.checkpoint`` that compute a block again, and the
backward of an ``autograd.Function`` whose own forward ran the layer (checkpointing of other libraries, invertible
blocks). Such a Function is told by torch's two methods that call its forward and its backward, however it names and
decorates them, and whether its forward sees a ctx or not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import _disable_current_modes

# What torch.utils.checkpoint runs a block again from: without reentering autograd, and with.
_AGAIN = ("unpack_hook", "backward")
_FORWARD, _BACKWARD = Function.apply.__func__.__code__, BackwardCFunction.apply.__code__  # type: ignore[attr-defined]
# The layers that ran in the forward of each class of Functions. (Not of each call: under an outer checkpoint the call
# whose backward runs is itself a repetition.)
_RAN: WeakKeyDictionary[type, WeakSet[Any]] = WeakKeyDictionary()


class _Any:
    """Stands for any layer in a compiled graph, which may work on copies of buffers."""


_ANY = _Any()


def is_repeated(layer: Any) -> bool:
    """Whether the training forward that runs now, of this layer, repeats an earlier one.

    One without gradients, or within backward, is noted for the ``autograd.Function`` around it, if there is one. None
    stands for any layer in a compiled graph.
    """
    within = in_backward()
    if (not within and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return False  # a compiled graph outlives this moment: ``update_once_`` asks when it runs
    key = _ANY if layer is None else layer
    for frame in _frames():
        code = frame.f_code
        if code is _FORWARD:
            _RAN.setdefault(frame.f_locals["cls"], WeakSet()).add(key)
        elif within and code is _BACKWARD:
            if key in _RAN.get(frame.f_locals["self"]._forward_cls, ()):
                return True
        elif code.co_name in _AGAIN and frame.f_globals.get("__name__") == "torch.utils.checkpoint" and within:
            return True
    return False


def in_backward() -> bool:
    """Whether autograd runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


in_backward._dynamo_marked_constant = True  # type: ignore[attr-defined]


def own_copies(*tensors: Tensor | None) -> list[Any]:
    """Copies of buffers, which a repetition moves in their place: so it calls the same ops as the first time, which
    selective checkpointing counts."""
    with _disable_current_modes():
        return [None if t is None else t.clone() for t in tensors]


def _frames() -> Iterator[FrameType]:
    """From here outwards, within the innermost backward."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        yield frame
        frame = frame.f_back

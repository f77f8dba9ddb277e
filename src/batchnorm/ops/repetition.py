"""Whether a forward repeats an earlier one, as activation checkpointing does in backward.

Not every forward inside backward is a repetition: a hook, or somebody's ``autograd.Function``, may run a layer there
for the first time. Two things repeat: the functions of ``torch.utils.checkpoint`` that compute a block again, and the
backward of an ``autograd.Function`` whose own forward ran the layer (checkpointing of other libraries, invertible
blocks).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import _engine_run_backward

_MARK = "_batchnorm_ran"  # on a Function's ctx: the running means of layers that ran in its forward
# What torch.utils.checkpoint runs a block again from: without reentering autograd, and with.
_AGAIN = ("unpack_hook", "backward")


def is_repeated(running_mean: Tensor | None) -> bool:
    """Whether the training forward that runs now, of the layer with this buffer, repeats an earlier one.

    A first forward without gradients is noted on the ``autograd.Function`` around it, if there is one. None stands for
    any layer in a compiled graph, which may work on copies of buffers.
    """
    if torch.compiler.is_compiling():  # a graph outlives this moment: ``update_once_`` asks when it runs
        return False
    if torch._C._current_graph_task_id() == -1:
        if not torch.is_grad_enabled():
            for frame in _frames():
                ctx = _ctx_of(frame, "forward")
                if ctx is not None:
                    vars(ctx).setdefault(_MARK, {})[id(running_mean)] = running_mean
        return False
    for frame in _frames():
        code = frame.f_code
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint" and code.co_name in _AGAIN:
            return True
        ctx = _ctx_of(frame, "backward")
        if ctx is not None and id(running_mean) in vars(ctx).get(_MARK, ()):
            return True
    return False


def _frames() -> Iterator[FrameType]:
    """From here outwards, within the innermost backward."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not _engine_run_backward.__code__:
        yield frame
        frame = frame.f_back


def _ctx_of(frame: FrameType, name: str) -> FunctionCtx | None:
    """The first argument of an ``autograd.Function``'s forward or backward, where the frame is of one."""
    code = frame.f_code
    if code.co_name != name or not code.co_argcount:
        return None
    first = frame.f_locals.get(code.co_varnames[0])
    return first if isinstance(first, FunctionCtx) else None

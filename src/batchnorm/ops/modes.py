"""The modes of torch that a call runs in: torch.compile and export, torch.func, tracers, forward-mode derivatives."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether torch.func is around."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# torch.compile asks when it traces: a graph is for the transforms around it alone.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_functionalized() -> bool:
    """Whether ``torch.func.functionalize`` is around: buffers that it was not given change in torch's ops alone."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Functionalize for level in stack)


is_functionalized._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_eager() -> bool:
    """No torch.compile and no torch.func around."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def is_traced() -> bool:
    """Whether torch.export, TorchScript's tracer or functionalize look for torch's own ops."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return is_functionalized() if is_transformed() else torch._C._is_tracing()


def runs_kernels() -> bool:
    """Whether kernels run: no torch.compile, torch.func, tracer or forward-mode derivatives, which know torch's ops."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not torch._C._is_tracing() and forward_ad._current_level < 0

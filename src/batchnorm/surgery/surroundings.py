"""Contexts that a forward may run in: autocast, gradients recorded or not, inference mode, a default dtype.

Where it asks (``torch.is_autocast_enabled()``), the answer is a constant in what torch.fx writes. So a forward is
traced in all of these, and must do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def _autocast(dtype: torch.dtype, grad: bool = True) -> Iterator[None]:
    """On all devices, there or not."""
    before = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES]
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)
        with torch.set_grad_enabled(grad):
            yield
    finally:
        for device, enabled, was in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, was)


@contextmanager
def _other_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if before == torch.float64 else torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# As reports call it: "it does something else ..."; train or eval; what is entered. The first is what others must do.
SURROUNDINGS: list[tuple[str, bool, Callable[[], AbstractContextManager[Any]]]] = [
    ("", True, nullcontext),
    ("in train than in eval", False, nullcontext),
    ("under autocast", True, partial(_autocast, torch.bfloat16)),
    ("under autocast in float16", True, partial(_autocast, torch.float16)),
    ("without gradients", False, torch.no_grad),
    ("in inference mode", False, torch.inference_mode),
    ("under autocast without gradients", False, partial(_autocast, torch.bfloat16, grad=False)),
    ("with another default dtype", True, _other_default),
]

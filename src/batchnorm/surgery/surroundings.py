"""What a forward may find around it: autocast, gradients that are recorded or not, inference mode, a default dtype.

Where it asks (``torch.is_autocast_enabled()``), the answer is a constant in what torch.fx writes. So a forward is
traced in all of these, and must do the same.

Comes from: ``rewrite``. Goes to: its traces.
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


# As reports call it: "it does something else ..."; what is entered.
SURROUNDINGS: list[tuple[str, Callable[[], AbstractContextManager[Any]]]] = [
    ("in train than in eval", nullcontext),
    ("under autocast", partial(_autocast, torch.bfloat16)),
    ("under autocast in float16", partial(_autocast, torch.float16)),
    ("without gradients", torch.no_grad),
    ("in inference mode", torch.inference_mode),
    ("under autocast without gradients", partial(_autocast, torch.bfloat16, grad=False)),
    ("with another default dtype", _other_default),
]

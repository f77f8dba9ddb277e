"""Buffers on the meta device that remember what a new layer has there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Blank(Tensor):
    """A buffer of a source on the meta device. Memory that is made in its likeness holds its initial value already.

    Whoever makes a model of no values real (``to_empty``, transformers' ``from_pretrained``) leaves to chance what the
    checkpoint lacks, and a plain one lacks these buffers. In a state_dict it is torch's tensor.
    """

    value: float

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.empty_like:
                return torch.full_like(args[0], args[0].value, **kwargs or {})
            return function(*args, **kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), blank(self.shape, self.dtype, self.device, self.value))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return blank, (self.shape, self.dtype, self.device, self.value)


def blank(shape: Any, dtype: torch.dtype, device: Any, value: float) -> Tensor:
    """What a layer that has seen nothing has there."""
    tensor = torch.full(shape, value, dtype=dtype, device=device)
    if tensor.is_meta:
        tensor = tensor.as_subclass(Blank)
        tensor.value = value
    return tensor

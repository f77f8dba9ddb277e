"""A model's copy; where torch refuses, what it is that cannot be copied.

Comes from: any model. Goes to: whatever leaves the model given as it is.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from batchnorm.surgery.watch import tensors_of

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, kept: dict[int, Any] | None = None) -> Model:
    """A deep copy, but for the objects in ``kept``, by their id.

    Raises:
        ValueError: a module holds a tensor that gradients flow through, with its name.
    """
    try:
        return copy.deepcopy(model, kept)
    except RuntimeError as failure:
        held = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in (vars(module) | module._buffers).items()
            if key != "_buffers" and not all(t.is_leaf for t in tensors_of(value))
        ]
        if not held:
            raise
        raise ValueError(
            f"the model cannot be copied: {', '.join(held)} is computed, and gradients flow through it. Run the model "
            "once under torch.no_grad(), which leaves none such, or detach it; for torch.nn.utils.weight_norm there is "
            "torch.nn.utils.parametrizations.weight_norm."
        ) from failure

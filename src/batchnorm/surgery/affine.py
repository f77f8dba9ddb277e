"""The affine layers that batch normalization can stand behind or be folded into: a row each; ``register`` adds one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.base import FusedBatchNorm


class Affine(NamedTuple):
    """The map that a layer with ``weight`` and ``bias`` (or None) computes.

    ``norm``: takes its outputs; ``channels``: the dimension of inputs and outputs that holds them, from the end;
    ``transposed``: the weight is (inputs, outputs / groups, ...), not (outputs, inputs / groups, ...); ``spreads``: an
    output takes other places' inputs in numbers that differ, so that a constant at the inputs is none at the outputs;
    ``needs_bias``: its forward does not run with None.
    """

    norm: type[FusedBatchNorm]
    channels: int
    transposed: bool = False
    spreads: bool = False
    needs_bias: bool = False


ROWS: dict[type[nn.Module], Affine] = {
    nn.Linear: Affine(BatchNorm1d, -1),
    nn.Conv1d: Affine(BatchNorm1d, -2),
    nn.Conv2d: Affine(BatchNorm2d, -3),
    nn.Conv3d: Affine(BatchNorm3d, -4),
    nn.ConvTranspose1d: Affine(BatchNorm1d, -2, transposed=True, spreads=True),
    nn.ConvTranspose2d: Affine(BatchNorm2d, -3, transposed=True, spreads=True),
    nn.ConvTranspose3d: Affine(BatchNorm3d, -4, transposed=True, spreads=True),
}


def register(kind: type[nn.Module], row: Affine) -> None:
    """Have ``insert`` and ``fold`` take layers of a class, and of its subclasses that keep its forward.

    Example:
        >>> from transformers.pytorch_utils import Conv1D  # doctest: +SKIP
        >>> register(Conv1D, Affine(BatchNorm1d, -1, transposed=True, needs_bias=True))  # doctest: +SKIP

    Raises:
        TypeError: not a class of modules; not a row.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register takes a class of torch.nn.Module, got {kind!r}.")
    if not isinstance(row, Affine):
        raise TypeError(f"register takes an Affine(...), which says what a {kind.__name__} computes, got {row!r}.")
    ROWS[kind] = row


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """The registered class that a layer is of."""
    return next((kind for kind in type(layer).__mro__ if kind in ROWS), None)


def affine_of(layer: nn.Module) -> Affine | None:
    """The row of a layer."""
    kind = kind_of(layer)
    return None if kind is None else ROWS[kind]


def does_more(layer: nn.Module) -> bool:
    """Whether its forward is another than its registered class's."""
    kind: Any = kind_of(layer)
    same = all(getattr(type(layer), f, None) is getattr(kind, f, None) for f in ("forward", "_conv_forward"))
    return not same or "forward" in vars(layer)


def is_computed(layer: nn.Module) -> bool:
    """Whether its weight is no parameter: computed from others."""
    return nn.utils.parametrize.is_parametrized(layer) or layer._parameters.get("weight") is None


def is_pruned(layer: nn.Module) -> bool:
    """Whether ``torch.nn.utils.prune`` computes its weight before each call."""
    return "weight_mask" in layer._buffers and "weight_orig" in layer._parameters


PRUNED = "is pruned: torch.nn.utils.prune.remove(layer, 'weight') first"


def looks_affine(module: nn.Module) -> bool:
    """Whether a layer of no known class holds a weight as these do."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return kind_of(module) is None and weight is not None and weight.dim() > 1


def unregistered(layer: nn.Module) -> str:
    """How a report calls such a layer, and what there is to do."""
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag | nn.Bilinear):
        return f"a {type(layer).__qualname__}, which is not affine in one input"
    return f"a {type(layer).__qualname__}: batchnorm.surgery.affine.register says what it is"


def pads_with_zeros(layer: Any) -> bool:
    """Whether places outside count as 0. Other modes pad with what is there, scaled and shifted as it is."""
    padding = getattr(layer, "padding", 0)
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
    return zeros and padding != "valid" and any(p != 0 for p in (padding if isinstance(padding, tuple) else [padding]))


def shared(model: nn.Module) -> dict[str, str]:
    """The weights and biases that lie in the same memory as another tensor of the model, and that one's name."""
    spans = []
    for name, module in model.named_modules():
        for key, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and t.layout is torch.strided and not t.is_meta and t.numel():
                spans.append((*_span(t), f"{name}.{key}".lstrip(".")))
    found: dict[str, str] = {}
    widest: tuple[Any, ...] | None = None
    for span in sorted(spans):
        if widest is not None and span[0] == widest[0] and span[1] < widest[2]:
            found.setdefault(widest[3], span[3])
            found[span[3]] = widest[3]
        if widest is None or span[0] != widest[0] or span[2] > widest[2]:
            widest = span
    return found


def _span(t: Tensor) -> tuple[int, int, int]:
    """The storage, and from where to where in it, in bytes."""
    start, size = int(t.storage_offset()), t.element_size()
    last = sum((places - 1) * int(stride) for places, stride in zip(t.shape, t.stride(), strict=True))
    return t.untyped_storage().data_ptr(), start * size, (start + last + 1) * size

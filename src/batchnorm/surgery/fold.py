"""Inference-mode batch normalization folded into the layers beside it, and checked.

    W' = gamma / sqrt(var + eps) * W,   b' = gamma / sqrt(var + eps) * (b - mean) + beta

Comes from: a trained model. Goes to: deployment, without batch normalization.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import parse_activation
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.norm import AnyBatchNorm
from batchnorm.ops import fallback
from batchnorm.surgery.convert import OURS, Model
from batchnorm.surgery.copied import copied
from batchnorm.surgery.fold_check import Fold, check_layers, check_outputs, to_double
from batchnorm.surgery.fuse import unfuse
from batchnorm.surgery.given import checked, scripted
from batchnorm.surgery.report import LEFT, Report, Row
from batchnorm.surgery.watch import Call, Watched, watch
from batchnorm.surgery.weights import TRANSPOSED, affine, scale_inputs, scale_outputs

_KNOWN = {*OURS, *OURS.values(), AnyBatchNorm, nn.SyncBatchNorm}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AFFINE = (nn.Linear, *_CONVS, *TRANSPOSED)


class Rest(nn.Module):
    """What is left of a folded layer of ours: activation(x + residual)."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(x + residual)"""
        name, slope = parse_activation(self.activation)
        x = x if residual is None else x + residual
        return x if name is None else fallback.ACTIVATIONS[name](x.clone() if residual is None else x, slope)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation!r}"


def fold(model: Model, example: Any, *, tolerance: float | None = None) -> Model:
    r"""The model without its batch normalization: folded into the Linear, Conv or ConvTranspose before it, or after it.

        W' = gamma / sqrt(var + eps) * W,   b' = gamma / sqrt(var + eps) * (b - mean) + beta

    A layer folds into the one before it if nothing else reads that one's output; else into the one after it, if that
    alone reads its output and does not pad with 0. The names of modules stay: a folded layer is an ``nn.Identity``, or
    what is left of it, the activation; forwards that ``from_torch`` wrote anew are again what they were. The model
    given is not changed. ``batchnorm_report`` of the result lists what was folded into what, and what was not, with the
    reason; ``print`` it.

    Args:
        model: in eval (or with frozen statistics); torch's layers or ours, any dtype.
        example: an input: a tensor, a tuple of arguments or a dict of keyword arguments. It is run once to see which
            layers follow one another, and to check the result.
        tolerance: the largest error allowed beside float64, relative to the largest value: of each layer that took up
            another one, on what it sees, and of the model's outputs (there at least twice the model's own error).
            Default: 1e-9 in float64, 1e-4 in float32, 0.01 in float16, 0.05 in bfloat16.

    Returns:
        A copy of the model, in eval.

    Raises:
        ValueError: a layer in train mode; the error is above the tolerance, with the layer's name; the model is
            compiled, cannot be copied, or does not run in float64.
        TypeError: not a module.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> folded = bn.fold(model, torch.randn(2, 3, 8, 8))
        >>> print(folded.batchnorm_report)
        layer  done    why
        1      folded  into 0, before it

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", https://arxiv.org/abs/1712.05877, Section 3.2.
    """
    checked(model, "fold")
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training and not getattr(layer, "frozen_statistics", False):
            raise ValueError(
                f"fold needs running statistics in use, layer {name!r} is in train mode: call model.eval() first."
            )
    folded = copied(model).eval()
    unfuse(folded)  # what ``from_torch`` wrote around layers knows them unfolded
    wide, wide_example = copied(folded).double(), to_double(example)
    report = Report([*_fold_inserted(folded), *scripted(folded)])
    seen = watch(folded, example)
    folds: list[Fold] = []
    for name, layer in list(folded.named_modules()):
        if isinstance(layer, _BatchNorm):
            row, done = _fold_one(folded, seen, name, layer)
            report.append(row)
            folds += done
    check_layers(folded, wide, wide_example, folds, tolerance)
    check_outputs(model, folded, wide, example, wide_example, tolerance)
    folded.batchnorm_report = report  # type: ignore[assignment]
    return folded


# ---- one layer -------------------------------------------------------------------------------------------------------


def _fold_inserted(model: nn.Module) -> Report:
    """What ``insert`` gave to layers goes back into them."""
    report = Report()
    for name, layer in model.named_modules():
        norm: Any = getattr(layer, "batch_norm", None)  # which may be another one by now, or none
        plain = type(norm) in _KNOWN and getattr(norm, "activation", None) is None
        if hasattr(type(layer), "normalizes") and plain and norm.running_mean is not None:
            scale_outputs(layer, *affine(norm))
            del layer.batch_norm
            layer.__class__ = type(layer).normalizes
            report.append(Row(f"{name}.batch_norm", "folded", f"into {name}"))
    return report


def _fold_one(model: nn.Module, seen: Watched, name: str, layer: _BatchNorm) -> tuple[Row, list[Fold]]:
    """Fold it, or say why not."""
    calls = seen.of(name)
    reason = _unfit(layer, calls)
    if reason is not None:
        return Row(name, LEFT, reason), []
    (call,) = calls
    before, not_before = _before(seen, call)
    after, not_after = (None, "") if before is not None else _after(seen, call, layer)
    scale_C, shift_C = affine(layer)
    if before is not None:
        scale_outputs(before.target, scale_C, shift_C)
        done = Fold(name, before.name, after=False)
    elif after is not None:
        scale_inputs(after.target, scale_C, shift_C)
        done = Fold(name, after.name, after=True)
    else:
        return Row(name, LEFT, f"{not_before}; {not_after}"), []
    _replace(model, layer, _rest(layer, len(call.inputs) > 1))
    return Row(name, "folded", f"into {done.into}, {'after' if done.after else 'before'} it"), [done]


def _unfit(layer: _BatchNorm, calls: list[Call]) -> str | None:
    if type(layer) not in _KNOWN:
        return f"a {type(layer).__qualname__} may do more than batch normalization"
    if layer.running_mean is None:
        return "it has no running statistics: it normalizes by each batch in eval too"
    if len(calls) != 1:
        return "the example does not reach it" if not calls else f"it is called {len(calls)} times"
    if {2, "mask"} & {*calls[0].given}:
        return "it is given a mask"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks, which would see something else"
    return None


def _before(seen: Watched, call: Call) -> tuple[Call | None, str]:
    """The layer that it folds into backwards, or why there is none."""
    maker = seen.maker(call)
    if maker is None:
        return None, "what it reads is not made in the model"
    rows = _rows_of(seen, maker)
    if rows is not None and seen.only_reader(maker) is call:  # (N, L, C) as rows (N * L, C)
        maker, call = rows, maker
    if maker.kind != "module" or not isinstance(maker.target, _AFFINE):
        return None, f"it reads {maker.label}, which has no weights to fold into"
    if seen.only_reader(maker) is not call:
        others = ", ".join(seen.calls[i].label for i in maker.readers if i != call.index)
        return None, f"{maker.name} before it is read by {others or 'it'} too"
    if isinstance(maker.target, nn.Linear) and len(maker.shape or ()) != 2 and rows is None:
        return None, f"{maker.name} before it has its features in the last dimension, not the second"
    return _usable(seen, maker, "before")


def _rows_of(seen: Watched, call: Call) -> Call | None:
    """The Linear whose output this reshapes to rows, one for each place, its features kept together."""
    maker = seen.maker(call)
    reshapes = call.kind == "function" and call.name in ("flatten", "reshape", "view", "reshape_as", "view_as")
    if not reshapes or maker is None or not isinstance(maker.target, nn.Linear) or not maker.shape or not call.shape:
        return None
    return maker if len(call.shape) == 2 and call.shape[-1] == maker.shape[-1] else None


def _after(seen: Watched, call: Call, layer: _BatchNorm) -> tuple[Call | None, str]:
    """The layer that it folds into forwards, or why there is none."""
    reader = seen.only_reader(call)
    if reader is None:
        return None, "its output is read more than once"
    if reader.kind != "module" or not isinstance(reader.target, (nn.Linear, *_CONVS)):
        return None, f"its output goes to {reader.label}"
    if getattr(layer, "activation", None) is not None or len(call.inputs) > 1:
        return None, "its activation or residual comes before the next layer"
    target: Any = reader.target
    if not isinstance(target, nn.Linear) and _pads_with_zeros(target):
        return None, f"{reader.name} after it pads with 0"
    if isinstance(target, nn.Linear) and len(call.shape or ()) != 2:
        return None, f"{reader.name} after it reads its last dimension, not the second"
    return _usable(seen, reader, "after")


def _pads_with_zeros(conv: Any) -> bool:
    """Other modes pad with what is there, scaled and shifted as it is."""
    return conv.padding_mode == "zeros" and conv.padding != "valid" and any(p != 0 for p in conv.padding)


def _usable(seen: Watched, call: Call, side: str) -> tuple[Call | None, str]:
    if len(seen.of(call.name)) != 1:
        return None, f"{call.name} {side} it is called {len(seen.of(call.name))} times"
    if call.target._forward_hooks or call.target._forward_pre_hooks:
        return None, f"{call.name} {side} it has hooks, which would see something else"
    if type(call.target).forward not in {kind.forward for kind in _AFFINE}:
        return None, f"{call.name} {side} it is a {type(call.target).__qualname__}, which may do more"
    if nn.utils.parametrize.is_parametrized(call.target) or "weight" not in call.target._parameters:
        return None, f"the weight of {call.name} {side} it is computed from others"
    return call, ""


def _rest(layer: _BatchNorm, with_residual: bool) -> nn.Module:
    activation = layer.activation if isinstance(layer, FusedBatchNorm) else None
    return Rest(activation) if with_residual or activation is not None else nn.Identity()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name that it has."""
    new.train(old.training)
    for module in model.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)

"""Inference-mode batch normalization folded into the layers beside it, and checked.

    W' = gamma / sqrt(var + eps) * W,   b' = gamma / sqrt(var + eps) * (b - mean) + beta

Comes from: a trained model. Goes to: deployment, without batch normalization.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from batchnorm.functional import parse_activation
from batchnorm.nn.norm import AnyBatchNorm, FusedBatchNorm
from batchnorm.ops import fallback
from batchnorm.ops.reference import per_channel
from batchnorm.surgery.convert import OURS, Model
from batchnorm.surgery.report import LEFT, Report, Row
from batchnorm.surgery.watch import Call, Watched, run, tensors_of, watch

_KNOWN = {*OURS, *OURS.values(), AnyBatchNorm, nn.SyncBatchNorm}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_AFFINE = (nn.Linear, *_CONVS, *_TRANSPOSED)

# The largest error, relative to the largest value of an output, that a fold may have by default.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
    alone reads its output and does not pad. The names of modules stay: a folded layer is an ``nn.Identity``, or what is
    left of it, the activation. The model given is not changed. ``batchnorm_report`` of the result lists what was
    folded into what, and what was not, with the reason; ``print`` it.

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
        ValueError: a layer in train mode; the error is above the tolerance, with the layer's name.
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
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold takes a torch.nn.Module, got {type(model).__name__}.")
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training and not getattr(layer, "frozen_statistics", False):
            raise ValueError(
                f"fold needs running statistics in use, layer {name!r} is in train mode: call model.eval() first."
            )
    folded = copy.deepcopy(model).eval()
    seen = watch(folded, example)
    wide, wide_example = copy.deepcopy(folded).double(), _to_double(example)
    report, folds = Report(), list[Fold]()
    for name, layer in list(folded.named_modules()):
        if isinstance(layer, _BatchNorm):
            row, done = _fold_one(folded, seen, name, layer)
            report.append(row)
            folds += done
    _check_layers(folded, wide, wide_example, folds, tolerance)
    _check_outputs(model, folded, wide, example, wide_example, tolerance)
    folded.batchnorm_report = report  # type: ignore[assignment]
    return folded


# ---- one layer -------------------------------------------------------------------------------------------------------


class Fold(NamedTuple):
    """``layer`` went into ``into``, which comes after it or before it."""

    layer: str
    into: str
    after: bool


def _fold_one(model: nn.Module, seen: Watched, name: str, layer: _BatchNorm) -> tuple[Row, list[Fold]]:
    """Fold it, or say why not."""
    calls = seen.of(name)
    reason = _unfit(layer, calls)
    if reason is not None:
        return Row(name, LEFT, reason), []
    (call,) = calls
    before, not_before = _before(seen, call)
    after, not_after = (None, "") if before is not None else _after(seen, call, layer)
    scale_C, shift_C = _affine(layer)
    if before is not None:
        _scale_outputs(before.target, scale_C, shift_C)
        done = Fold(name, before.name, after=False)
    elif after is not None:
        _scale_inputs(after.target, scale_C, shift_C)
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
        return None, f"it reads {_called(maker)}, which has no weights to fold into"
    if seen.only_reader(maker) is not call:
        others = ", ".join(_called(seen.calls[i]) for i in maker.readers if i != call.index)
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
        return None, f"its output goes to {_called(reader)}"
    if getattr(layer, "activation", None) is not None or len(call.inputs) > 1:
        return None, "its activation or residual comes before the next layer"
    target: Any = reader.target
    if not isinstance(target, nn.Linear) and (target.padding == "same" or any(p != 0 for p in target.padding)):
        return None, f"{reader.name} after it pads with 0"
    if isinstance(target, nn.Linear) and len(call.shape or ()) != 2:
        return None, f"{reader.name} after it reads its last dimension, not the second"
    return _usable(seen, reader, "after")


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


def _called(call: Call) -> str:
    return (
        call.name
        if call.kind == "module"
        else f"the model's {call.kind}"
        if call.kind in ("input", "output")
        else f"{call.name}()"
    )


def _affine(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """scale * x + shift, in float64."""
    mean_C, var_C = layer.running_mean.double(), layer.running_var.double()  # type: ignore[union-attr]
    rstd_C = (var_C + layer.eps).rsqrt()
    scale_C = rstd_C if layer.weight is None else layer.weight.detach().double() * rstd_C
    shift_C = -mean_C * scale_C
    return scale_C, shift_C if layer.bias is None else shift_C + layer.bias.detach().double()


def _scale_outputs(target: Any, scale_C: Tensor, shift_C: Tensor) -> None:
    """target <- scale * target(x) + shift. Transposed convolutions have (in, out / groups, ...) weights."""
    weight = target.weight.detach().double()
    if isinstance(target, _TRANSPOSED):
        grouped = weight.unflatten(0, (target.groups, -1))  # (groups, in / groups, out / groups, ...)
        by_group = scale_C.view(target.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (grouped * by_group).flatten(0, 1)
    else:
        weight = weight * scale_C.view(-1, *[1] * (weight.dim() - 1))
    bias = shift_C if target.bias is None else scale_C * target.bias.detach().double() + shift_C
    _set(target, weight, bias)


def _scale_inputs(target: Any, scale_C: Tensor, shift_C: Tensor) -> None:
    """target <- target(scale * x + shift), for weights (out, in / groups, ...)."""
    weight = target.weight.detach().double()
    groups = getattr(target, "groups", 1)
    grouped = weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, ...)
    shape = (groups, 1, -1, *[1] * (weight.dim() - 2))
    bias = (grouped * shift_C.view(shape)).flatten(2).sum(2).flatten()
    bias = bias if target.bias is None else bias + target.bias.detach().double()
    _set(target, (grouped * scale_C.view(shape)).flatten(0, 1), bias)


def _set(target: Any, weight: Tensor, bias: Tensor) -> None:
    old = target.weight
    target.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    target.bias = nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)


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


# ---- the proof -------------------------------------------------------------------------------------------------------


def _check_layers(folded: nn.Module, wide: nn.Module, example: Any, folds: list[Fold], tolerance: float | None) -> None:
    """Each layer that took up others, on what these see, beside all of them in float64."""
    modules, wide_modules = dict(folded.named_modules()), dict(wide.named_modules())
    saw: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
            saw[name], made[name] = next(iter(tensors_of((inputs, named)))), output

        return hook

    watched = {name for one in folds for name in (one.layer, one.into)}
    hooks = [wide_modules[name].register_forward_hook(noting(name), with_kwargs=True) for name in watched]
    try:
        run(wide, example)
    finally:
        for hook in hooks:
            hook.remove()
    for into in dict.fromkeys(one.into for one in folds):
        before = [
            one.layer for one in folds if one.into == into and one.after
        ]  # the layer comes before what it went into
        behind = [one.layer for one in folds if one.into == into and not one.after]
        x, expected = saw[(before or [into])[0]], made[into]
        for layer in behind:
            scale_C, shift_C = _affine(wide_modules[layer])
            if not isinstance(modules[into], nn.Linear):  # whose features are last
                scale_C, shift_C = per_channel(scale_C, expected), per_channel(shift_C, expected)
            expected = expected * scale_C + shift_C
        weight: Any = modules[into].weight
        with torch.no_grad():
            error = _error(modules[into](x.to(weight.dtype)), expected)
        limit = TOLERANCE[weight.dtype] if tolerance is None else tolerance
        if not error <= limit:
            raise ValueError(
                f"fold refused: {into} with {' and '.join(before + behind)} folded in is {error:.1e} of its largest "
                f"output off, more than {limit:.1e} ({weight.dtype}): fold in a wider dtype, or raise the tolerance."
            )


def _check_outputs(
    model: nn.Module, folded: nn.Module, wide: nn.Module, example: Any, wide_example: Any, tolerance: float | None
) -> None:
    """The whole model beside itself in float64."""
    exact = _outputs(wide, wide_example)
    for i, (new, old, expected) in enumerate(
        zip(_outputs(folded, example), _outputs(model, example), exact, strict=True)
    ):
        limit = max(TOLERANCE.get(new.dtype, 0.0) if tolerance is None else tolerance, 2 * _error(old, expected))
        if not _error(new, expected) <= limit:
            raise ValueError(
                f"fold refused: output {i} of the model is {_error(new, expected):.1e} of its largest value off, more "
                f"than {limit:.1e}, though each layer alone is within it: pass a larger tolerance if that is fine."
            )


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    return [t for t in tensors_of(run(model, example)) if t.is_floating_point()]


def _error(found: Tensor, expected: Tensor) -> float:
    """Of the largest value."""
    if expected.numel() == 0:
        return 0.0
    return (
        (found.double() - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    ).item()


def _to_double(example: Any) -> Any:
    return _pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)

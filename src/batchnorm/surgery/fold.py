"""Inference-mode batch normalization folded into the layers beside it, and checked.

W' = gamma / sqrt(var + eps) * W,   b' = gamma / sqrt(var + eps) * (b - mean) + beta
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.surgery.affine import shared
from batchnorm.surgery.checks import checked, hooked, only_copies_run, scripted
from batchnorm.surgery.convert import Model
from batchnorm.surgery.copies import copied
from batchnorm.surgery.fold_check import Fold, check_layers, check_outputs, seen_by, to_double
from batchnorm.surgery.fuse import unfuse
from batchnorm.surgery.neighbours import Place, after, before, tied
from batchnorm.surgery.norms import check_statistics, computes, is_known, norms_of, rest_of
from batchnorm.surgery.report import LEFT, Report, Row
from batchnorm.surgery.watch import Call, Watched, in_eager, watch
from batchnorm.surgery.weights import affine, scale_inputs, scale_outputs

# What became of a layer that folds into none, which says why; its calls; whether it computes what it states.
Otherwise = Callable[[Watched, Row, Any, bool], Row]
_TENSORS = ("parameters", "named_parameters", "buffers", "named_buffers")  # that every module has, and a rest none of


def fold(model: Model, example: Any, *, tolerance: float | None = None) -> Model:
    r"""The model without its batch normalization: folded into the Linear, Conv or ConvTranspose before it, or after it.

        W' = gamma / sqrt(var + eps) * W,   b' = gamma / sqrt(var + eps) * (b - mean) + beta

    A layer folds into the one before it if nothing else reads that one's output; else into the one after it, if that
    alone reads its output and does not pad with 0; if one is called several times, then always with the other. In
    between there may be what only moves values (transpositions, reshapes, slices, dropout in eval) as long as each
    channel of the one goes to one channel of the other, and layers that are folded themselves. The names of modules
    stay: a folded layer is an ``nn.Identity``, or what is left of it, the activation; forwards that ``from_torch``
    wrote anew are again what they were. The model given is not changed; a weight that another module shares, or that a
    function reads, is left as it is. ``batchnorm_report`` of the result lists what was folded into what, and what was
    not, with the reason; ``print`` it.

    Args:
        model: in eval (or with frozen statistics); torch's layers, ours, or others that hold running statistics and
            compute batch normalization, then the children or the activation that they name; any dtype.
        example: an input: a tensor, a tuple of arguments or a dict of keyword arguments. It is run once to see which
            layers follow one another, and to check the result.
        tolerance: the largest error allowed beside float64, relative to the largest value: of each layer that took up
            another one, on what it sees, and of the model's outputs (there at least twice the model's own error).
            Default: 1e-9 in float64, 1e-4 in float32, 0.01 in float16, 0.05 in bfloat16.

    Returns:
        A copy of the model, in eval.

    Raises:
        ValueError: a layer in train mode, or with statistics or parameters that are not finite, or negative variances;
            a lazy layer before its first run; a negative tolerance; the error is above the tolerance, with the layer's
            name; the model is compiled, cannot be copied, does not run in float64, or gives NaN.
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
    folded, report = folded_copy(model, example, tolerance, "fold")
    folded.batchnorm_report = report  # type: ignore[assignment]
    return folded


def folded_copy(
    model: Model, example: Any, tolerance: float | None, verb: str, otherwise: Otherwise | None = None
) -> tuple[Model, Report]:
    """A copy in eval with all folded that can be, checked, and what was done; ``otherwise``: to what cannot be.

    Raises:
        ValueError: as ``fold``, named ``verb`` here.
    """
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"{verb}: tolerance must be 0 or more (got {tolerance}).")
    wide, wide_example = _unfused(model).double(), to_double(example)
    work = _Work(verb, wide, wide_example, shared(model), otherwise)
    left = dict[str, str]()

    def fold_in(model: nn.Module, example: Any, but: Collection[str] = ()) -> tuple[Report, list[Fold]]:
        with in_eager(model):  # calls are played again, some of them random
            return _fold_all(model, example, work, dict.fromkeys(but, "") | left)

    with only_copies_run(model, verb):
        while True:
            folded = _unfused(model)
            report, folds = fold_in(folded, example)
            check_layers(folded, wide, wide_example, folds, tolerance, verb)
            into = [one.layer for one in folds]  # in the order in which they were folded
            others = [row.layer for row in report if row.done != LEFT and row.layer not in into]
            found = check_outputs(
                model, folded, wide, example, wide_example, tolerance, [*others, *into], fold_in, verb
            )
            if found is None:
                break
            left[found] = "without it the model is another, in float64 too: a forward does more than call it"
        report.extend(scripted(folded))
    return folded, report


def _unfused(model: Model) -> Model:
    """A copy, as it was before ``from_torch``: the forwards that this wrote know the layers unfolded."""
    made = copied(model).eval()
    unfuse(made)
    return made


class _Work(NamedTuple):
    """The task: the verb; model and example in float64; tensors that share memory; what to do otherwise."""

    verb: str
    wide: nn.Module
    wide_example: Any
    ties: dict[str, str]
    otherwise: Otherwise | None


def _fold_all(folded: nn.Module, example: Any, work: _Work, left: dict[str, str]) -> tuple[Report, list[Fold]]:
    """Fold what can be folded, in place; ``left``: layers to leave alone, and why."""
    report = _fold_inserted(folded, example, work, left)
    norms = {name: norm for name, norm in norms_of(folded).items() if name not in {row.layer for row in report}}
    seen = watch(folded, example, whole=norms.values())
    others = [name for name, layer in norms.items() if not is_known(layer) and seen.of(name)]
    saw = seen_by(work.wide, work.wide_example, others)[0] if others else {}
    stated = {name: name not in others or _as_stated(work.wide.get_submodule(name), saw[name]) for name in norms}
    place = Place(folded, seen, work.ties, {})
    rows = {name: Row(name, LEFT, left.get(name, "")) for name in norms}
    folds: list[Fold] = []
    waiting = sorted(
        [name for name in norms if name not in left], key=lambda name: seen.of(name)[0].index if seen.of(name) else -1
    )
    were = len(waiting) + 1
    while len(waiting) < were:  # one that was folded stands in nobody's way any more
        were = len(waiting)
        for name in list(waiting):
            rows[name], done = _fold_one(place, name, norms[name], stated[name], work.verb)
            if done is not None:
                waiting.remove(name)
                folds.append(done)
    if work.otherwise is not None:
        rows |= {name: work.otherwise(seen, rows[name], norms[name], stated[name]) for name in waiting}
    report.extend(rows.values())
    return report, folds


def _as_stated(layer: Any, saw: list[Tensor]) -> bool:
    return bool(saw) and all(computes(layer, rest_of(layer, False), x) for x in saw)


# ---- one layer -------------------------------------------------------------------------------------------------------


def _fold_inserted(model: nn.Module, example: Any, work: _Work, left: dict[str, str]) -> Report:
    """What ``insert`` gave to layers goes back into them."""
    report = Report()
    layers: dict[str, Any] = {n: layer for n, layer in model.named_modules() if hasattr(type(layer), "normalizes")}
    seen = watch(model, example) if layers else None
    for name, layer in layers.items():
        norm: Any = getattr(layer, "batch_norm", None)  # which may be another one by now, or none
        plain = norm is not None and is_known(norm) and getattr(norm, "activation", None) is None
        if seen is not None and plain and norm.running_mean is not None:
            reason = left[f"{name}.batch_norm"] if f"{name}.batch_norm" in left else tied(work.ties, seen, name)
            if reason is None:
                check_statistics(f"{name}.batch_norm", norm, work.verb)
                scale_outputs(layer, *affine(norm))
                del layer.batch_norm
                layer.__class__ = type(layer).normalizes
            done, why = ("folded", f"into {name}") if reason is None else (LEFT, reason)
            report.append(Row(f"{name}.batch_norm", done, why))
    return report


def _fold_one(place: Place, name: str, layer: Any, stated: bool, verb: str) -> tuple[Row, Fold | None]:
    """Fold it, or say why not."""
    calls = place.seen.of(name)
    rest = rest_of(layer, any(len(call.inputs) > 1 for call in calls))
    reason = unfit(layer, calls, stated) or _alone(layer, calls) or read(place.seen, name, rest)
    if reason is not None:
        return Row(name, LEFT, reason), None
    check_statistics(name, layer, verb)
    found, not_before = before(place, calls, layer)
    if found is None:
        found, not_after = after(place, calls, layer, rest)
        if found is None:
            often = f"it is called {len(calls)} times: " if len(calls) > 1 else ""
            return Row(name, LEFT, f"{often}{not_before}; {not_after}"), None
    target = place.model.get_submodule(found.into)
    scale_C, shift_C = found.spread(*affine(layer))
    (scale_inputs if found.after else scale_outputs)(target, scale_C, shift_C)
    become(layer, rest)
    return Row(name, "folded", f"into {found.into}, {'after' if found.after else 'before'} it"), found


def unfit(layer: Any, calls: list[Call], stated: bool) -> str | None:
    """Why a layer is more, in eval, than a scale and a shift of each channel and what comes behind it."""
    if layer.running_mean is None:
        return "it has no running statistics: it normalizes by each batch in eval too"
    if not stated:
        then = " and then ".join(name for name, _ in layer.named_children())
        what = f"batch normalization{' and then ' if then else ''}{then}"
        return f"a {type(layer).__qualname__} computes something else than {what}: put that in a module behind it"
    for call in calls:
        if not is_known(layer) and (call.arguments is None or [*map(len, call.arguments)] != [1, 0]):
            return f"a {type(layer).__qualname__} is given more than its input"
        if {2, "mask"} & {*call.given}:
            return "it is given a mask"
    if type(layer).__basicsize__ != nn.Module.__basicsize__:
        return f"a {type(layer).__qualname__} has __slots__: the same object cannot be of another class"
    return None


def _alone(layer: Any, calls: list[Call]) -> str | None:
    """Why it is not to become part of another layer, whichever that is."""
    if not calls:
        return "the example does not reach it"
    return "it has hooks, which would see something else" if hooked(layer) else None


def read(seen: Watched, name: str, rest: nn.Module) -> str | None:
    """The attribute that a forward reads of it and that would be gone, or be another, in words."""
    asked = seen.asked.get(name, {})
    gone = [key for key in asked if key in _TENSORS or not hasattr(rest, key)]
    key = min(gone, key=lambda key: key.startswith("_"), default=None)
    return None if key is None else f"the forward of {asked[key] or 'the model'} reads its {key}"


def become(old: nn.Module, new: nn.Module) -> None:
    """The same object as another module: whoever holds it, a list or an object that torch does not know, has that."""
    new.train(old.training)
    old.__class__ = type(new)
    vars(old).clear()
    vars(old).update(vars(new))

"""Whether a folded model does what the model did: each layer on what it sees, then the whole, beside float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from batchnorm.common.errors import one_line
from batchnorm.surgery.affine import affine_of
from batchnorm.surgery.checks import in_containers
from batchnorm.surgery.copies import cloned, copied, dense
from batchnorm.surgery.moves import play
from batchnorm.surgery.watch import Call, run, tensors_of
from batchnorm.surgery.weights import affine

# The largest error, relative to the largest value of an output, that a fold may have by default.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ROUNDING = 1e-6  # more than it comes to in float64, relative to an output's largest value
_NAN = "NaN on the example, beside which nothing can be checked: give another one, or look at its parameters."


class Way(NamedTuple):
    """From one call of a layer to one of what it went into: which calls of theirs, counted from 0, and ``path``, the
    calls in between."""

    layer: int
    into: int
    path: list[Call]


class Fold(NamedTuple):
    """``layer`` went into ``into``, which comes after it or before it.

    ``ways``: one for each time that both are called; ``channels``: for each channel of ``into`` the layer's, or -1 for
    none.
    """

    layer: str
    into: str
    after: bool
    ways: list[Way]
    channels: Tensor

    def spread(self, scale_C: Tensor, shift_C: Tensor) -> tuple[Tensor, Tensor]:
        """A scale and a shift of the layer's channels, of the channels of ``into``."""
        channels = self.channels.to(scale_C.device)
        known = channels >= 0
        return scale_C[channels].where(known, 1.0), shift_C[channels].where(known, 0.0)


Seen = dict[str, list[Tensor]]


def seen_by(wide: nn.Module, example: Any, names: Collection[str]) -> tuple[Seen, Seen]:
    """Inputs and outputs of modules of a model in float64, in each of their calls."""
    saw: Seen = {name: [] for name in names}
    made: Seen = {name: [] for name in names}

    def noting(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
            saw[name].append(given.pop(name))
            made[name].append(output.clone())

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: Any) -> None:
            given[name] = next(iter(tensors_of((inputs, named)))).clone()  # it may be changed in place

        return hook

    def prepare(twin: nn.Module) -> None:
        modules = dict(twin.named_modules())
        for name in names:
            modules[name].register_forward_pre_hook(before(name), with_kwargs=True)
            modules[name].register_forward_hook(noting(name), with_kwargs=True)

    given: dict[str, Tensor] = {}

    def clear(twin: nn.Module) -> None:
        given.clear()
        for each in (*saw.values(), *made.values()):
            each.clear()
        prepare(twin)

    run_in_double(wide, example, clear)
    return saw, made


def check_layers(
    folded: nn.Module, wide: nn.Module, example: Any, folds: list[Fold], tolerance: float | None, verb: str
) -> None:
    """Each layer that took up others, on what these see, beside all of them in float64."""
    modules, wide_modules = dict(folded.named_modules()), dict(wide.named_modules())
    saw, made = seen_by(wide, example, {name for one in folds for name in (one.layer, one.into)})
    for into in dict.fromkeys(one.into for one in folds):
        before = [one for one in folds if one.into == into and one.after]  # the layer comes before what it went into
        behind = [one for one in folds if one.into == into and not one.after]
        row, weight = affine_of(modules[into]), cast(Tensor, modules[into].weight)
        assert row is not None
        for way in (before or behind)[-1].ways:
            if way.into >= len(made[into]) or (before and way.layer >= len(saw[before[-1].layer])):
                continue  # how often it is called depends on the data, and on rounding
            expected = made[into][way.into]
            for one in behind:
                shape = [1] * expected.dim()
                shape[row.channels] = -1
                scale_C, shift_C = one.spread(*affine(wide_modules[one.layer]))
                expected = expected * scale_C.view(shape) + shift_C.view(shape)
            x = saw[before[-1].layer][way.layer] if before else saw[into][way.into]  # the last to go came first
            x = x.to(weight.dtype)
            for call in way.path if before else ():
                x = play(modules[call.name] if call.kind == "module" else call.target, call.arguments, x)
            with torch.no_grad():
                off = error(modules[into](x), expected)
            if expected.isnan().any():
                raise ValueError(f"{into} gives {_NAN}")
            limit = TOLERANCE[weight.dtype] if tolerance is None else tolerance
            if not off <= limit:
                names = " and ".join(one.layer for one in before + behind)
                raise ValueError(
                    f"{verb} refused: {into} with {names} folded in is {off:.1e} of its largest output off, more than "
                    f"{limit:.1e} ({weight.dtype}): {verb} in a wider dtype, or raise the tolerance."
                )


def check_outputs(
    model: nn.Module,
    folded: nn.Module,
    wide: nn.Module,
    example: Any,
    wide_example: Any,
    tolerance: float | None,
    names: list[str],
    fold_in: Callable[[nn.Module, Any, Collection[str]], Any],
    verb: str,
) -> str | None:
    """The whole model beside itself in float64.

    How many values come out may depend on the data, of a detector say, and then on rounding: such a model is folded in
    float64 and compared there, where rounding decides nothing.

    Returns:
        The first of the layers ``names`` without which the model does not run, or computes something else in float64
        too: that is not rounding, and no tolerance is for it.
    """

    def in_double(but: Collection[str]) -> list[Tensor]:
        twin = copy.deepcopy(wide)
        fold_in(twin, wide_example, but)
        return _floating(run_in_double(twin, wide_example))

    old, exact = _floating(run(model, example)), _floating(run_in_double(wide, wide_example))
    try:
        new = _floating(run(folded, example))
    except Exception:  # whatever a forward raises that misses something
        found = _missed(names, exact, in_double)
        if found is None:
            raise
        return found
    if any(t.isnan().any() for t in (*old, *exact)):
        raise ValueError(f"the model gives {_NAN}")
    if not [t.shape for t in new] == [t.shape for t in old] == [t.shape for t in exact]:
        new, old = in_double(()), exact
        if [t.shape for t in new] != [t.shape for t in exact]:
            raise ValueError(
                "the number of values that the model gives depends on the data, and changes with rounding on this "
                f"example: {_shapes(exact)}, and folded {_shapes(new)}: give another one."
            )
    for i, (mine, theirs, expected) in enumerate(zip(new, old, exact, strict=True)):
        limit = max(TOLERANCE.get(mine.dtype, 0.0) if tolerance is None else tolerance, 2 * error(theirs, expected))
        if not error(mine, expected) <= limit:
            found = _missed(names, exact, in_double)
            if found is not None:
                return found
            raise ValueError(
                f"{verb} refused: output {i} of the model is {error(mine, expected):.1e} of its largest value off, "
                f"more than {limit:.1e}, though each layer alone is within it: pass a larger tolerance if that is fine."
            )
    return None


def _missed(names: list[str], exact: list[Tensor], in_double: Callable[[Collection[str]], list[Tensor]]) -> str | None:
    """The first layer that is missed when those before it and itself are folded, in float64; None where none is."""

    def is_missed(folded: int) -> bool:
        try:
            made = in_double(names[folded:])
        except Exception:  # as above
            return True
        alike = len(made) == len(exact) and all(error(a, b) <= _ROUNDING for a, b in zip(made, exact, strict=True))
        return not alike

    if not names or not is_missed(len(names)):
        return None
    fine, missed = 0, len(names)
    while missed - fine > 1:
        middle = (fine + missed) // 2
        fine, missed = (fine, middle) if is_missed(middle) else (middle, missed)
    return names[missed - 1]


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join("x".join(map(str, t.shape)) for t in tensors)


def _floating(outputs: Any) -> list[Tensor]:
    return [dense(t) for t in tensors_of(outputs) if t.is_floating_point()]


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected; of what is not floating-point, how many differ.

    Where both are infinite, as masks are, nothing differs; what is not a number differs from everything.
    """
    if found.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    if expected.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    if not expected.is_floating_point():
        return (found != expected).double().mean().item()
    found, expected = found.double(), expected.double()
    off = (found - expected).abs().masked_fill(found == expected, 0.0)
    largest = expected.abs().masked_fill(expected.isinf(), 0.0).max()
    return (off.max() / largest.clamp(min=torch.finfo(torch.float64).tiny)).item()


def limit_of(tensor: Tensor, model: nn.Module) -> float:
    """The default tolerance of an output; of what is not floating-point, that of the model's parameters."""
    dtypes = [tensor.dtype] if tensor.is_floating_point() else [p.dtype for p in model.parameters()]
    return max((TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE), default=TOLERANCE[torch.float32])


def beside(model: nn.Module, example: Any, found: list[Tensor], tolerance: float | None) -> tuple[int, float, float]:
    """Another program's outputs beside the model's: the one that is most off, by how much, and how much it may be.

    That is the tolerance, or twice what the model itself is off beside float64.
    """
    outputs = [*tensors_of(run(model, example))]
    rows = [
        (i, error(new.to(old.device), old), limit_of(old, model) if tolerance is None else tolerance)
        for i, (new, old) in enumerate(zip(found, outputs, strict=True))
    ]
    if any(not off <= limit for _, off, limit in rows):
        with suppress(ValueError):  # it may not run in float64
            exact = tensors_of(run_in_double(copied(model).double(), to_double(example)))
            own = [error(old, wide) for old, wide in zip(outputs, exact, strict=True)]
            rows = [(i, off, max(limit, 2 * own[i] if own[i] < math.inf else 0.0)) for i, off, limit in rows]

    def beyond(row: tuple[int, float, float]) -> float:
        _, off, limit = row
        return math.inf if math.isnan(off) else off / limit if limit else off

    return max(rows, key=beyond, default=(0, 0.0, 0.0))


def to_double(example: Any) -> Any:
    """A copy of an example with its floating-point tensors in float64."""
    return cloned(example, lambda t: t.double() if t.is_floating_point() else t.clone())


def run_in_double(wide: nn.Module, example: Any, prepare: Callable[[nn.Module], Any] | None = None) -> Any:
    """Outputs of a model and an example in float64, also where the forward names another dtype, or takes the default.
    ``prepare``: as of ``run``.

    Raises:
        ValueError: it does not run in float64.
    """
    try:
        return run(wide, example, prepare=prepare)
    except Exception:  # whatever two dtypes in one operation raise
        pass
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _EveryDtypeIsDouble():
            return run(wide, example, prepare=prepare)
    except Exception as failure:
        hidden = [f"{row.layer}: {row.why}." for row in in_containers(wide)]
        advice = "Let its forward take dtypes from its input (x.dtype), and keep its tensors in buffers."
        raise ValueError(
            f"the model does not run in float64, beside which the result is checked: {one_line(failure)}. "
            f"{' '.join(hidden) or advice}"
        ) from failure
    finally:
        torch.set_default_dtype(default)


class _EveryDtypeIsDouble(TorchFunctionMode):
    """``x.to(torch.float32)``, ``x.half()`` and their like give float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.float, Tensor.half, Tensor.bfloat16):
            function = Tensor.double
        args, kwargs = _pytree.tree_map_only(torch.dtype, _wider, (args, kwargs or {}))
        return function(*args, **kwargs)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype

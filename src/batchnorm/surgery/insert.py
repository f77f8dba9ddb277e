"""Batch normalization put into a network: between each affine layer and the nonlinearity, or the sum before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.common.errors import one_line
from batchnorm.ops import split
from batchnorm.ops.arguments import Moments
from batchnorm.population.batches import call_with_inputs, refuse_one_batch
from batchnorm.surgery.affine import ROWS, affine_of
from batchnorm.surgery.checks import AFFINE, checked, hooked, on_all_ranks, only_copies_run, scripted
from batchnorm.surgery.convert import Model
from batchnorm.surgery.copies import cloned, copied, scratch
from batchnorm.surgery.fold_check import TOLERANCE, error, run_in_double, seen_by, to_double
from batchnorm.surgery.norms import norms_of
from batchnorm.surgery.places import layers_of, place_of
from batchnorm.surgery.report import LEFT, Row
from batchnorm.surgery.torchscript import scriptable
from batchnorm.surgery.watch import in_eager, run, tensors_of, watch, watch_in_train
from batchnorm.surgery.weights import outputs_of


@on_all_ranks
def insert(
    model: Model,
    example: Any,
    *,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    skip: Sequence[str] = (),
) -> Model:
    r"""The model with batch normalization between each affine layer and the nonlinearity that reads it (Section 3.2).

        g(W u + b)  ->  g(BN(W u)),    g(W u + b + v)  ->  g(BN(W u) + v)

    The second is a residual block's last layer: each summand is normalized by itself. A layer gets a child
    ``batch_norm`` and loses its bias, which the mean's subtraction cancels. Its name, its weight's name and its class
    (it becomes a subclass) stay: ``inserted.load_state_dict(model.state_dict(), strict=False)`` loads the original's
    weights. The model given is not changed. ``batchnorm_report`` of the result lists what got batch normalization,
    and what did not, with the reason.

    Args:
        model: any module; what nothing but a nonlinearity reads, or a sum that nothing but a nonlinearity reads, is
            normalized, also where a maximum, or what only moves values, stands in between; never what goes to a softmax
            or out, nor what a sigmoid or the like gives out.
        example: an input: a tensor, a tuple of arguments or a dict of keyword arguments. It is run once to see which
            layers a nonlinearity reads.
        batches: for a trained network, training inputs as ``recalibrate`` takes them. gamma = sqrt(Var[Wu] + eps),
            beta = E[Wu + b] and the running statistics are then such that in eval the network computes what it did;
            that is checked. Default: gamma 1, beta 0, for a network that is yet to be trained.
        forward: ``forward(model, batch)`` runs the model on one of the batches; default: ``model(inputs)``.
        skip: names of layers to leave alone, or of modules around them.

    Returns:
        A copy of the model, in its mode.

    Raises:
        ValueError: ``batches`` yielded nothing, or do not reach a layer, or make it give what is not finite; a name in
            ``skip`` that there is not; with batch normalization the model does not run on the example, or, with
            ``batches``, computes something else, with the layer's name.
        TypeError: not a module; ``batches`` is itself a batch (a tensor, a mapping).

    In ``DistributedDataParallel`` it acts on what is inside, and wraps the result alike: call it on all ranks.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(bn.insert(model, torch.randn(2, 4)).batchnorm_report)
        layer  done        why
        0      normalized  before 1
        2      left alone  its output goes to the model's output

    Source: Ioffe & Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167; of trained networks, matconvnet.
    """
    checked(model, "insert")
    if batches is not None:
        refuse_one_batch(batches, "batches")
    inserted = copied(model)
    layers = layers_of(inserted)
    skipped = _skipped(skip, layers)
    norms = [*norms_of(inserted).values()]
    with only_copies_run(model, "insert"):
        seen, in_train = watch(inserted, example, whole=norms), watch_in_train(inserted, example, whole=norms)
    report = scripted(inserted, AFFINE)
    with in_eager(inserted):  # calls are played again, some of them random
        for name, layer in layers.items():
            place = place_of(seen, name, layer)
            if place is None:
                continue
            row, norm = place
            if name in skipped:
                row, norm = Row(name, LEFT, "skipped"), None
            elif row.done != LEFT and in_train is not None and place_of(in_train, name, layer) != place:
                row, norm = Row(name, LEFT, "it, or what reads it, is called differently in train"), None
            if row.done != LEFT and hooked(layer, ("forward", "backward", "backward_pre")):
                row = row._replace(why=f"{row.why}; its hooks now see the normalized output")
            report.append(row)
            if norm is not None:
                report.norms[name] = norm
    names = report.of("normalized")
    moments = {} if batches is None else _moments(inserted, names, batches, forward or call_with_inputs)
    for name in names:
        _give(inserted.get_submodule(name), moments.get(name))
    _without_fast_paths(inserted)
    with only_copies_run(model, "insert"):
        _check_called(inserted, names, example)
        if batches is not None:
            _check(model, inserted, names, example)
    inserted.batchnorm_report = report  # type: ignore[assignment]
    return inserted


def _skipped(skip: Sequence[str], layers: dict[str, Any]) -> set[str]:
    """The layers that ``skip`` names, by themselves or by a module around them."""
    if isinstance(skip, str):
        raise TypeError(f"skip is a list of names, got the string {skip!r}.")
    skip = list(skip) if isinstance(skip, Iterable) else [skip]
    other = next((given for given in skip if not isinstance(given, str)), None)
    if other is not None:
        kind = other if isinstance(other, type) else type(other)
        raise TypeError(
            f"skip is a list of names of layers, got {'the class' if other is kind else 'a'} {kind.__name__}: "
            "[name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Conv2d)], say."
        )
    found = {given: {name for name in layers if f"{name}.".startswith(f"{given}.")} for given in skip}
    unknown = [given for given, names in found.items() if not names]
    if unknown:
        raise ValueError(f"skip names no Linear, Conv or ConvTranspose, nor a module around one: {', '.join(unknown)}.")
    return {name for names in found.values() for name in names}


# ---- a layer with batch normalization behind it ----------------------------------------------------------------------


def _give(layer: Any, moments: Moments | None) -> None:
    row: Any = affine_of(layer)
    norm: Any = row.norm(outputs_of(layer), device=layer.weight.device, dtype=layer.weight.dtype).train(layer.training)
    if moments is not None:
        mean_C, var_C, values = moments
        with torch.no_grad():
            norm.running_mean.copy_(mean_C)
            norm.running_var.copy_(var_C * values / (values - 1).clamp(min=1))
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())
            norm.bias.copy_(mean_C if layer.bias is None or row.needs_bias else mean_C + layer.bias.double())
    if not row.needs_bias:
        layer.bias = None
    layer.batch_norm = norm
    own_kind: Any = type(layer)
    layer.__class__ = with_batch_norm(own_kind)


def _without_fast_paths(model: nn.Module) -> None:
    """Torch's Transformer in eval reads the weights of its layers, past their forward: not where these normalize."""
    for module in model.modules():
        if any(hasattr(type(part), "normalizes") for part in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


@cache
def with_batch_norm(kind: type[nn.Module]) -> type:
    """A subclass of an affine layer's class that normalizes what it computes."""
    last = ROWS[next(k for k in kind.__mro__ if k in ROWS)].channels == -1

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        y: Tensor = kind.forward(self, *args, **kwargs)
        if last and y.dim() > 2:
            return self.batch_norm(y.flatten(0, -2)).view_as(y)
        return self.batch_norm(y)

    def reduced(self: nn.Module, protocol: int) -> Any:
        return _made_again, (kind,), self.__dict__

    content = {"forward": forward, "normalizes": kind, "__reduce_ex__": reduced}
    content["__prepare_scriptable__"] = lambda self: scriptable(self, kind, last)
    return type(kind.__name__, (kind,), content)


def _made_again(kind: type) -> nn.Module:
    made: Any = with_batch_norm(kind)
    return made.__new__(made)


# ---- trained networks ------------------------------------------------------------------------------------------------


def _moments(
    model: nn.Module, names: list[str], batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]
) -> dict[str, Moments]:
    """Of W u, over all batches."""
    each: dict[str, list[Moments]] = {name: [] for name in names}

    def noting(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: Any, y: Tensor) -> None:
            row: Any = affine_of(layer)
            y = y.flatten(0, -2) if row.channels == -1 else y
            bias = None if layer.bias is None or row.needs_bias else layer.bias.double()
            if not y.numel():  # of an empty batch; of an expert that nothing came to
                return
            found = split.statistics(y)[1]
            each[name].append(found if bias is None else found._replace(mean_C=found.mean_C - bias))

        return hook

    model, count = scratch(model).eval(), 0
    for name in names:
        model.get_submodule(name).register_forward_hook(noting(name))
    with torch.no_grad(), torch.random.fork_rng([]):
        for batch in batches:
            forward(model, cloned(batch))
            count += 1
    if names and not count:
        raise ValueError("batches yielded nothing: insert needs at least one batch of model inputs.")
    missed = [name for name, some in each.items() if not some]
    if missed:
        raise ValueError(
            f"insert: no batch reaches {', '.join(missed)}, or only empty ones do: give batches that do, or skip= them."
        )
    moments = {name: split.merged(*(torch.stack(t) for t in zip(*some, strict=True))) for name, some in each.items()}
    wrong = [name for name, found in moments.items() if not (found[0] + found[1]).isfinite().all()]
    if wrong:
        raise ValueError(
            f"insert: on these batches {wrong[0]} gives values that are not finite: look at the batches, or skip= it."
        )
    return moments


def _check_called(inserted: nn.Module, names: list[str], example: Any) -> None:
    """The network runs, and what was inserted is called."""
    called: set[str] = set()

    def prepare(twin: nn.Module) -> None:
        for name in names:
            twin.get_submodule(f"{name}.batch_norm").register_forward_hook(lambda *_, name=name: called.add(name))

    try:
        run(inserted, example, prepare=prepare)
    except Exception as error:
        raise ValueError(
            f"insert refused: with batch normalization in {', '.join(names)} the model does not run on the example "
            f"({one_line(error)}): leave layers alone with skip=."
        ) from error
    missing = [name for name in names if name not in called]
    if missing:
        raise ValueError(f"insert refused: the model does not call what was put into {', '.join(missing)}: skip= it.")


def _check(model: nn.Module, inserted: nn.Module, names: list[str], example: Any) -> None:
    """In eval the network computes what it did, beside itself in float64: each layer, then the outputs."""
    wide, wide_inserted, given = copied(model).double(), copied(inserted).double(), to_double(example)
    limit = max((TOLERANCE.get(p.dtype, 0.0) for p in inserted.parameters()), default=0.0)
    made, expected = seen_by(wide_inserted, given, names)[1], seen_by(wide, given, names)[1]
    pairs = [(name, a, b) for name in expected for a, b in zip(made[name], expected[name], strict=True)]
    outputs = (list(tensors_of(run_in_double(m, given))) for m in (wide_inserted, wide))
    pairs += [(f"output {i} of the model", a, b) for i, (a, b) in enumerate(zip(*outputs, strict=True))]
    for name, a, b in pairs:
        if b.is_floating_point() and not error(a, b) <= limit:
            raise ValueError(
                f"insert refused: with batch normalization {name} is in eval {error(a, b):.1e} of its largest value "
                f"off, more than {limit:.1e}: insert into a wider dtype, or leave layers alone with skip=."
            )

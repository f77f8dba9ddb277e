"""Batch normalization taken out of a network: what ``fold`` computes, and no trace of it in what is trained on."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from batchnorm.functional import parse_activation
from batchnorm.surgery.checks import checked, on_all_ranks, only_copies_run
from batchnorm.surgery.convert import Model
from batchnorm.surgery.copies import copied
from batchnorm.surgery.fold import become, folded_copy, read, unfit
from batchnorm.surgery.fold_check import error, limit_of
from batchnorm.surgery.norms import Rest, check_statistics, is_known, rest_of
from batchnorm.surgery.report import Report, Row
from batchnorm.surgery.watch import Watched, run, tensors_of, watch
from batchnorm.surgery.weights import affine

_HOOKS = ("_forward_", "_backward_", "_is_full_")  # attributes of a module that begin so hold its hooks


@on_all_ranks
def remove(model: Model, example: Any, *, tolerance: float | None = None) -> Model:
    r"""The network without its batch normalization, to be trained as it would have been written: undoes ``insert``.

        W' = gamma / sqrt(var + eps) * W,   b' = gamma / sqrt(var + eps) * (b - mean) + beta

    In eval it computes what the model does. Each layer goes into the Linear, Conv or ConvTranspose before it, or after
    it, as ``fold`` has it; a bias that was None is a parameter then. What goes into none (it comes behind a sum, a
    concatenation or an activation, or a convolution's weight has other users) becomes a ``ChannelAffine``, a weight
    and a bias for each channel, which are trained where the layer's were. A network that is not trained yet (mean 0,
    variance 1, gamma 1, beta 0) has the weights that it was initialized with, times 1 / sqrt(1 + eps), and biases 0.

    No ``nn.Identity`` is in the place of a layer. An ``nn.Sequential`` loses the child, and counts the others anew if
    it counted them (``conv, bn, relu, conv`` with the keys 0 and 3 becomes ``conv, relu, conv`` with 0 and 2). What a
    forward calls by its name (``self.bn1(x)``) is ``passed_on``, a function. Only where a container's places are
    counted by others (an ``nn.ModuleList``, a Sequential whose children are called one by one) there is a ``Removed``
    module. Activations and residuals that were the layer's stay.

    Args:
        model: any module, in train or eval: torch's layers, ours, or others that ``fold`` knows; any dtype.
        example: an input: a tensor, a tuple of arguments or a dict of keyword arguments. It is run to see which layers
            follow one another, and to check the result.
        tolerance: as of ``fold``.

    Returns:
        A copy of the model, in its mode. ``batchnorm_report`` has a row for each layer, by the names of the model
        given: removed, and into what; replaced, by a ``ChannelAffine``, and why; or left alone, and why (it has no
        running statistics, say).

    Raises:
        ValueError: statistics or parameters that are not finite, or negative variances; a lazy layer before its first
            run; a negative tolerance; the error is above the tolerance; the model is compiled, cannot be copied, does
            not run in float64, or gives NaN.
        TypeError: not a module.

    In ``DistributedDataParallel`` it acts on what is inside, and wraps the result alike: call it on all ranks.

    Example:
        >>> import torch, batchnorm as bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> removed = bn.remove(model, torch.randn(2, 4))
        >>> print(removed.batchnorm_report)
        layer  done     why
        1      removed  into 0, before it
        >>> removed
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
        )

    Source: the inverse of Ioffe & Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167, Section 3.2; the
    arithmetic of inference is its Algorithm 2, line 11.
    """
    checked(model, "remove")
    made, report = folded_copy(model, example, tolerance, "remove", _by_itself)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in made.named_modules():
        module.training = modes.get(name, modes[""])
    with only_copies_run(model, "remove"):
        made = _taken_out(made, example, {row.layer for row in report if row.done == "folded"})
    vars(made).pop("batchnorm_recipe", None)  # of ``accelerate``: for training with batch normalization
    rows = (row._replace(done="removed") if row.done == "folded" else row for row in report)
    made.batchnorm_report = Report(rows)  # type: ignore[assignment]
    return made


# ---- what folds into no layer ----------------------------------------------------------------------------------------


class ChannelAffine(nn.Module):
    """weight * x + bias, both (C,), for x (N, C, ...): what batch normalization is in eval.

    What of the layer was a parameter is one here, and is trained; the rest is in buffers.
    """

    if TYPE_CHECKING:  # torch.jit knows no names of types here
        weight: Tensor
        bias: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for key, value_C in zip(("weight", "bias"), affine(layer), strict=True):
            was, value_C = getattr(layer, key, None), value_C.to(layer.running_mean.dtype)
            if isinstance(was, nn.Parameter):
                self.register_parameter(key, nn.Parameter(value_C, requires_grad=was.requires_grad))
            else:
                self.register_buffer(key, value_C)

    def forward(self, input: Tensor) -> Tensor:
        """weight * input + bias"""
        shape = [-1] + [1] * (input.dim() - 2)
        x = input.to(self.weight.dtype)
        return (x * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)

    def extra_repr(self) -> str:
        """C."""
        return str(len(self.weight))


class ChannelAffineThen(ChannelAffine):
    """activation(weight * x + bias + residual): of a layer that had an activation or is given a residual."""

    def __init__(self, layer: Any, rest: Rest) -> None:
        super().__init__(layer)
        self.rest = rest

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(weight * input + bias + residual)"""
        y: Tensor = self.rest(super().forward(input), residual)
        return y


def _by_itself(seen: Watched, row: Row, layer: Any, stated: bool) -> Row:
    """Such a layer in place, or why it stays as it is."""
    calls = seen.of(row.layer)
    why = unfit(layer, calls, stated)
    if why is not None or (not calls and not is_known(layer)):
        return row._replace(why=why or row.why)
    check_statistics(row.layer, layer, "remove")
    rest = rest_of(layer, any(len(call.inputs) > 1 for call in calls))
    why = read(seen, row.layer, rest)
    if why is not None:
        return row._replace(why=why)
    made: nn.Module
    if isinstance(rest, Rest):
        made = ChannelAffineThen(layer, rest)
    else:
        made = ChannelAffine(layer)
        if type(rest) is not nn.Identity:
            behind = rest._modules if type(rest) is nn.Sequential else {"activation": rest}
            behind = {key: child for key, child in behind.items() if type(child) is not nn.Identity}
            made = nn.Sequential(OrderedDict({"affine": made, **behind}))
    hooks = {key: value for key, value in vars(layer).items() if key.startswith(_HOOKS)}
    become(layer, made)
    vars(layer).update(hooks)  # which see in eval what they saw
    return Row(row.layer, "replaced", f"by a weight and a bias per channel: {row.why}")


# ---- the places of those that were folded ----------------------------------------------------------------------------


class Removed(nn.Module):
    """Nothing, where batch normalization was in a container whose places others count."""

    def forward(self, input: Tensor) -> Tensor:
        """input"""
        return input


def passed_on(input: Tensor) -> Tensor:
    """The stand-in that a forward calls by the name of a removed layer."""
    return input


def _taken_out(model: Model, example: Any, names: set[str]) -> Model:
    """Without the modules that are nothing now, if outputs stay what they are, in eval and train."""
    seen = watch(model, example)
    for name, layer in model.named_modules():
        if name in names and type(layer) is nn.Identity:
            become(layer, Removed())
        elif name in names and type(layer) is Rest and all(len(call.inputs) == 1 for call in seen.of(name)):
            become(layer, parse_activation(layer.activation).module())
        elif name in names and type(layer) is nn.Sequential:
            _without(layer, [key for key, child in layer._modules.items() if type(child) is nn.Identity])
    short = copied(model)
    inside = {name: module for name, module in short.named_modules() if type(module) is Removed}
    in_turn = {id(module): {call.owner for call in seen.of(name)} for name, module in inside.items()}
    for name, parent in [*short.named_modules()]:
        gone = [key for key, child in parent._modules.items() if type(child) is Removed]
        if isinstance(parent, nn.ModuleList | nn.ModuleDict):
            continue
        if isinstance(parent, nn.Sequential):
            called = type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent)
            _without(parent, [key for key in gone if called and in_turn[id(parent._modules[key])] == {name}])
            continue
        for key in gone:
            del parent._modules[key]
            setattr(parent, key, passed_on)
    return short if all(_same(model, short, example, train) for train in (False, True)) else model


def _without(sequence: nn.Sequential, keys: list[str]) -> None:
    """Its children but for these; numbers are given anew, as torch's own ``del`` does."""
    children = sequence._modules
    numbered = [*children] == [str(i) for i in range(len(children))]
    left = [(key, child) for key, child in children.items() if key not in keys]
    sequence._modules = {str(i) if numbered else key: child for i, (key, child) in enumerate(left)}


def _same(model: nn.Module, other: nn.Module, example: Any, train: bool) -> bool:
    """Whether both compute the same; True where the model does not run so."""
    try:
        expected = [*tensors_of(run(model, example, train=train))]
    except Exception:  # whatever user code raises in train: one value per channel, no labels
        return True
    try:
        found = [*tensors_of(run(other, example, train=train))]
    except Exception:  # whatever a forward raises that misses a module
        return False
    return len(found) == len(expected) and all(
        error(a, b) <= limit_of(b, model) for a, b in zip(found, expected, strict=True)
    )

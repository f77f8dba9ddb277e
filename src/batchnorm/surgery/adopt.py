"""Layers of other people's classes, subclasses of torch's, that become ours where that is certain or is checked.

timm's ``BatchNormAct2d`` and its like: batch normalization, then the children ``drop`` and ``act``. They become our
layer with that activation when outputs, gradients and statistics in float64 say that this is all they do. A subclass
that only has another ``__init__`` computes what torch's does. All others are left alone, with the reason.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import parse_activation
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.base import FusedBatchNorm
from batchnorm.nn.tracing import OWN
from batchnorm.surgery.checks import hooked, replaced
from batchnorm.surgery.originals import stands
from batchnorm.surgery.report import LEFT, Report, Row
from batchnorm.surgery.results import difference, results
from batchnorm.surgery.rewrite import inputs_of

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_PHASES = 7  # lists that ``results`` gives of what runs in float64, in eval and train
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_HARMLESS = {"__init__", "__repr__", "extra_repr"}


class Fused(nn.Identity):
    """In the place of an activation that a layer took over.

    ``by``: from where it goes to the layer, and that; ``held``: the module whose child it is, and by what name.
    """

    def __init__(
        self,
        activation: nn.Module,
        layer: FusedBatchNorm,
        by: tuple[nn.Module, list[str], FusedBatchNorm] | None = None,
        held: tuple[nn.Module, str] | None = None,
    ) -> None:
        super().__init__()
        self.train(activation.training)
        self.layer = (layer,)  # a tuple hides it from torch
        self.by, self.held = by, held
        self.was = (activation,)

    def forward(self, input: Tensor) -> Tensor:
        """Nothing; the activation, and from then on, where the layer is gone."""
        if self.by is None or stands(*self.by):
            return input
        (activation,), (layer,) = self.was, self.layer
        layer.hand_back()
        return activation.forward(input)

    def __getattr__(self, name: str) -> Any:
        """The activation's, where it is none of its own: its slope, say."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "was" not in vars(self):
                raise
            return getattr(self.was[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """An attribute of the activation's makes it that again, but for ``inplace``, which means nothing before."""
        activation = vars(self).get("was", (None,))[0]
        its_own = activation is not None and name in vars(activation) and name not in vars(self)
        if its_own and name == "inplace":
            setattr(activation, name, value)
        elif its_own:
            self.layer[0].hand_back()
            setattr(self, name, value)  # of its own class now
        else:
            super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> nn.Module:
        """For ``torch.jit.script``."""
        return nn.Identity()

    def is_there(self) -> bool:
        """Whether it is where it was put, alone or in somebody's wrapper."""
        if self.held is None:
            return True
        around, name = self.held
        found = around._modules.get(name)
        return found is self or (found is not None and any(part is self for part in found.modules()))

    def hand_back(self) -> None:
        """Be the activation again, with the mode and the hooks that this has now."""
        (activation,) = self.was
        now = {key: value for key, value in vars(self).items() if key not in ("was", "by", "layer", "held")}
        self.__class__ = type(activation)  # type: ignore[assignment]
        vars(self).clear()
        vars(self).update(vars(activation) | now)


class Former:
    """The class that a layer had, as the layer knows it."""

    def __init__(self, layer: FusedBatchNorm, kind: type) -> None:
        self.layer, self.kind = layer, kind

    def is_there(self) -> bool:
        """Always."""
        return True

    def hand_back(self) -> None:
        """Be of that class again."""
        become_stock(self.layer, self.kind)


def become_ours(layer: Any, kind: type) -> None:
    """The same object as a layer of ours."""
    layer.__class__ = kind
    if layer.running_mean is not None:
        layer.counter(layer.running_mean)


def become_stock(layer: FusedBatchNorm, kind: type) -> None:
    """The same object as a layer of torch's, with nothing that ours have besides."""
    layer.tell_skipped()
    for name in OWN:
        vars(layer).pop(name, None)
    layer.__class__ = kind


def left_alone(model: nn.Module, because: dict[str, str] | None = None) -> Report:
    """A row for each layer of batch normalization that is not ours."""
    return Report(
        Row(
            name,
            LEFT,
            (because or {}).get(name) or _unfit(layer) or f"{_named(layer)} is a class of its own, which may do more",
        )
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, FusedBatchNorm)
    )


def adopt(model: nn.Module, example: Any) -> Report:
    """Make those ours, in place, that can be; a row for each that got its own activation, or is left alone."""
    report, because, stated = Report(), dict[str, str](), dict[str, Any]()
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm) or isinstance(layer, FusedBatchNorm):
            continue
        why = _unfit(layer)
        if why is not None:
            because[name] = why
        elif _computes_torchs(layer):
            kind = type(layer)
            become_ours(layer, OURS[_base(layer)])
            layer.taken_from = (Former(layer, kind),)  # type: ignore[arg-type, assignment]
        else:
            stated[name] = layer
    inputs = inputs_of(model, example, list(stated)) if stated else {}
    for name, layer in stated.items():
        why, child = _adopted(layer, *inputs[name])
        if why is not None:
            because[name] = why
        else:
            report.append(Row(name, "fused", f"with its own {child}"))
    return Report([*report, *left_alone(model, because)])


def _named(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _base(layer: nn.Module) -> Any:
    return next((stock for stock in OURS if isinstance(layer, stock)), None)


def _unfit(layer: _BatchNorm) -> str | None:
    if replaced(layer):
        return f"its forward was replaced on the object: take that away first ({_named(layer)})"
    if _base(layer) is None or isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        lazy = isinstance(layer, nn.modules.lazy.LazyModuleMixin)
        advice = "run the model once before" if lazy else "convert_sync_batchnorm takes torch's SyncBatchNorm"
        return f"a {_named(layer)} is none of torch's BatchNorm1d, 2d, 3d: {advice}"
    return None


def _computes_torchs(layer: _BatchNorm) -> bool:
    """Whether its class changes nothing but what it is built with and how it is printed."""
    mro = type(layer).__mro__
    own = [kind for kind in mro[: mro.index(_base(layer))] if kind is not object]
    changed = {
        key for kind in own for key, value in vars(kind).items() if callable(value) or hasattr(value, "__get__")
    } - {"__dict__", "__weakref__"}
    return changed <= _HARMLESS and not list(layer.children())


def _adopted(layer: Any, calls: list[Any], changes: bool) -> tuple[str | None, str]:
    """Why it is left alone, or None; the name of the child that is its activation."""
    kind, more = type(layer), f"a {_named(layer)} may do more than batch normalization"
    own = {*layer._parameters, *layer._buffers} - _TENSORS
    activations, others = dict[str, nn.Module](), list[str]()
    for name, child in layer.named_children():
        try:
            parse_activation(child)
            activations[name] = child
        except TypeError:
            if type(child) is not nn.Identity:
                others.append(f"{name}, a {type(child).__name__}")
    if own or others or len(activations) != 1 or any(hooked(child) for child in layer.children()):
        what = ", ".join([*others, *sorted(own)]) or ("hooks inside" if activations else "no activation as a child")
        return f"{more}: it has {what}; build it as batch normalization with a module behind", ""
    if len(calls) != 1 or changes:
        return f"{more}, and the example calls it {len(calls)} times: it cannot be checked", ""
    ((name, activation),) = activations.items()
    before = results(layer, calls[0])
    if len(before.tensors) != _PHASES:
        return f"{more}, and it does not run in float64 in train and eval, in which it is checked", ""
    placeholder = Fused(activation, layer, held=(layer, name))
    become_ours(layer, OURS[_base(layer)])
    layer._modules[name] = placeholder
    layer.activation, layer.fused = activation, True
    layer.taken_from = (Former(layer, kind), placeholder)
    wrong = difference(before, results(layer, calls[0]))
    if wrong is None:
        return None, name
    layer.hand_back()
    layer._modules[name] = activation
    return f"{more}: as batch normalization with its {name} it {wrong}", ""

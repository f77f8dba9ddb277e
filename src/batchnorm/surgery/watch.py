"""One forward pass watched: which module or function made each tensor, and which ones read it."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.nn.base import FusedBatchNorm
from batchnorm.surgery import moves
from batchnorm.surgery.copies import cloned, scratch, tensors_of

# What is asked of a tensor without reading its values.
_ABOUT = {
    "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "is_inference", "get_device", "type", "requires_grad_", "data_ptr",
    "register_hook", "__len__", "__get__", "__hash__", "_is_view", "is_same_size", "result_type", "is_tensor",
}  # fmt: skip
# What reads the values of so many of its arguments, and only asks about the others.
_READS = dict.fromkeys(("reshape_as", "view_as", "expand_as", "type_as"), 1) | dict.fromkeys(
    ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
     "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"), 0
)  # fmt: skip


@dataclass
class Call:
    """A module or function that was called, or the model's inputs and outputs, or what keeps tensors after the run.

    ``name``: of a module in the model, of a function in torch; ``owner``: the module in whose forward it was called;
    ``inputs``: the calls that made the tensors it read, ``given``: the arguments (a place or a name) they came in;
    ``readers``: the calls that read a tensor of its own; ``arguments``: as ``moves.noted`` keeps them.
    """

    index: int
    kind: str  # "module", "function", "input", "output", "held"
    name: str
    target: Any
    owner: str
    inputs: list[int] = field(default_factory=list)
    given: list[int | str] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)
    shape: tuple[int, ...] | None = None  # of the first tensor it made
    arguments: Any = None

    @property
    def label(self) -> str:
        """As reports call it."""
        known = {"module": self.name, "function": f"{self.name}()", "held": "what keeps it after the run"}
        return known.get(self.kind, f"the model's {self.kind}")


@dataclass
class Watched:
    """All calls of one forward pass, in their order.

    ``read``: parameters that functions in other modules read; ``asked``: of modules that are one call each by request,
    the attributes that a forward around them reads, and whose forward that is.
    """

    calls: list[Call]
    read: dict[str, str] = field(default_factory=dict)
    asked: dict[str, dict[str, str]] = field(default_factory=dict)

    def of(self, name: str) -> list[Call]:
        """The calls of a module."""
        return [call for call in self.calls if call.kind == "module" and call.name == name]

    def only_reader(self, call: Call) -> Call | None:
        """The only call that reads the tensors of a call, if it reads them once."""
        return self.calls[call.readers[0]] if len(call.readers) == 1 else None

    def maker(self, call: Call, argument: int = 0) -> Call | None:
        """The call that made the first tensor that a call reads."""
        return self.calls[call.inputs[argument]] if len(call.inputs) > argument else None

    def __str__(self) -> str:
        def name(index: int) -> str:
            return self.calls[index].name

        rows = [("", "call", "in", "shape", "reads", "is read by")]
        rows += [
            (str(c.index), c.name, c.owner or "the model", "x".join(map(str, c.shape or ())),
             ", ".join(map(name, c.inputs)), ", ".join(map(name, c.readers)))
            for c in self.calls
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def watch(model: nn.Module, example: Any, train: bool = False, whole: Collection[nn.Module] = ()) -> Watched:
    """Run the model once, in eval or train, and note who made and who read each tensor.

    A module without children is a call, and so is a function of torch in the others. Control flow, several inputs,
    outputs in dicts and modules that are used twice are followed as they come; so are readers that torch's functions
    do not show: scripts, vmap, attributes that keep a tensor. A copy runs: the model notices nothing.

    Args:
        model: any module.
        example: its input: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        train: run it in train mode.
        whole: modules that are one call each, with the children that they have.

    Raises:
        Exception: whatever the model raises on the example.
    """
    twin, example = scratch(model), cloned(example)
    noted = _Noted(model, twin, whole)
    given = [*tensors_of(example)]  # an object among them may hold others afterwards
    noted.made(given, noted.begin("input", "input", None, (), {}))
    out = run_itself(twin, example, noted, train)
    held = noted.held((given, out))
    if held:
        noted.begin("held", "held", None, (held,), {})
    noted.begin("output", "output", None, (out,), {})
    return Watched(noted.calls, noted.read, noted.asked)


def watch_in_train(model: nn.Module, example: Any, whole: Collection[nn.Module] = ()) -> Watched | None:
    """``watch`` in train, which may do more; None where the example cannot be trained on."""
    try:
        return watch(model, example, train=True, whole=whole)
    except Exception:  # whatever user code raises: one value per channel, no labels
        return None


def run(
    model: nn.Module,
    example: Any,
    watched_by: AbstractContextManager[Any] | None = None,
    train: bool = False,
    prepare: Callable[[nn.Module], Any] | None = None,
) -> Any:
    """The output of a copy of the model, hooks included. Random numbers and the example are as before afterwards.

    ``prepare`` gets the copy before it runs, to put hooks of ours on it: those of the model tell nobody outside.
    """
    twin = scratch(model)
    if prepare is not None:
        prepare(twin)
    return run_itself(twin, cloned(example), watched_by, train)


def run_itself(
    model: nn.Module, example: Any, watched_by: AbstractContextManager[Any] | None = None, train: bool = False
) -> Any:
    """The output of the model itself on the example itself; random numbers are as before."""
    positional, named = arguments(example)
    with torch.no_grad(), in_eager(model), watched_by or nullcontext():
        return model.train(train)(*positional, **named)


@contextmanager
def in_eager(model: nn.Module) -> Iterator[None]:
    """Nothing is compiled inside, and random numbers are as before afterwards: torch's, Python's and NumPy's."""
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type in ("cuda", "xpu")}
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy and numpy.random.get_state()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and this would import it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng(devices))
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for a model's forward."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


class _Noted(TorchFunctionMode):
    """Calls while the model runs. Tensors are kept, so that no two have the same identity."""

    def __init__(self, model: nn.Module, twin: nn.Module, whole: Collection[nn.Module]) -> None:
        super().__init__()
        self.names = {module: name for name, module in twin.named_modules()}  # of the copy that runs
        self.targets = dict(model.named_modules())
        self.whole = {module for module, name in self.names.items() if self.targets[name] in {*whole}}
        self.parameters = {id(p): name for name, p in twin.named_parameters()}
        self.read: dict[str, str] = {}
        self.asked: dict[str, dict[str, str]] = {}
        self.calls: list[Call] = []
        self.maker: dict[int, Call] = {}
        self.kept: list[Tensor] = []
        self.owners = [""]
        self.inside: list[tuple[nn.Module, Call]] = []  # the module without children that runs now
        self.given: list[set[int]] = [set()]  # what the module or function that runs now was given
        self.unseen = _Unseen(self)

    def begin(self, kind: str, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = Call(len(self.calls), kind, name, target, self.owners[-1])
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in given:
            for t in tensors_of(value):
                parameter = self.parameters.get(id(t), "") if kind == "function" else ""
                if parameter and parameter.rpartition(".")[0] != call.owner:
                    self.read[parameter] = call.label
                maker = self.maker.get(id(t))
                if maker is not None:
                    call.inputs.append(maker.index)
                    call.given.append(place)
                    maker.readers.append(call.index)
        self.calls.append(call)
        return call

    def made(self, values: Any, call: Call) -> None:
        for t in tensors_of(values):
            self.kept.append(t)
            self.maker[id(t)] = call
            call.shape = call.shape or tuple(t.shape)

    def __enter__(self) -> Any:
        self.hooks = [
            hook
            for module in self.names
            if not isinstance(module, torch.jit.ScriptModule)  # has no hooks; its operations are seen
            for hook in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            )
        ]
        for module in self.whole:
            module.__class__ = _telling(type(module), self._asked)
        self.unseen.__enter__()
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.unseen.__exit__(*details)
        super().__exit__(*details)

    def held(self, shown: Any) -> list[Tensor]:
        """Tensors that outlive the run unseen: in attributes, lists of hooks, closures in an output."""
        known = {id(each) for t in tensors_of(shown) for each in (t, t._base)}
        found = [weakref.ref(t) for t in self.kept]
        self.kept.clear()

        def alive() -> list[Tensor]:
            return [t for one in found if (t := one()) is not None and id(t) not in known]

        if alive():
            gc.collect()  # a function that calls itself keeps what it uses
        return alive()

    def _asked(self, module: nn.Module, key: str) -> None:
        """Somebody reads an attribute: a forward around the module, if not the module in its own call."""
        inside = self.inside[-1][0] if self.inside else None
        if len(self.owners) > 1 and inside is not module:
            who = self.owners[-1] if inside is None else self.names[inside]
            self.asked.setdefault(self.names[module], {}).setdefault(key, who)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.inside:
            return
        if self._is_one_call(module):
            name = self.names[module]
            self.inside.append((module, self.begin("module", name, self.targets[name], args, kwargs)))
            self.calls[-1].arguments = moves.noted(args, kwargs)
            self.given.append({id(t) for t in tensors_of((args, kwargs))})
        else:
            self.owners.append(self.names[module])

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.inside:
            if self.inside[-1][0] is module:
                self.given.pop()
                self.made(output, self.inside.pop()[1])
        elif not self._is_one_call(module):
            self.owners.pop()

    def _is_one_call(self, module: nn.Module) -> bool:
        return is_leaf(module) or module in self.whole

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", str(function))
        asks = name in _ABOUT
        call = None if asks else self.begin("function", name, function, args[: _READS.get(name)], kwargs)
        self.given.append({id(t) for t in tensors_of((args, kwargs))})
        try:
            out = function(*args, **kwargs)
        finally:
            self.given.pop()
        if call is None and next(iter(tensors_of(out)), None) is not None:  # x.T, where x.shape is none
            call = self.begin("function", name, function, args, kwargs)
        if call is not None:
            call.arguments = moves.noted(args, kwargs)
            self.made(out, call)
        return out


class _Unseen(TorchDispatchMode):
    """Operations on known tensors that were not given to what runs now: in scripts, in vmap."""

    supports_higher_order_operators = True

    def __init__(self, noted: _Noted) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [
            t for t in tensors_of((args, kwargs)) if id(t) in self.noted.maker and id(t) not in self.noted.given[-1]
        ]
        if read:
            self.noted.begin("function", function.name().split("::")[-1], function, (read,), {})
        with torch._C.DisableTorchFunction():  # it is no call of the model's
            return function(*args, **(kwargs or {}))


class _Unregistered(nn.Module):
    """Before another base: what this wants of its subclasses (a name, an entry in a registry) is not asked for."""

    def __init_subclass__(cls) -> None:
        """Nothing."""


def _telling(kind: Any, tell: Callable[[nn.Module, str], None]) -> Any:
    """A subclass of a module's class that tells which attributes are read."""

    def read(self: nn.Module, key: str) -> Any:
        tell(self, key)
        return kind.__getattribute__(self, key)

    return type(kind)(kind.__name__, (_Unregistered, kind), {"__getattribute__": read, "__module__": kind.__module__})


def is_leaf(module: nn.Module) -> bool:
    """Whether what happens in its forward is its own business."""
    known = isinstance(module, torch.jit.ScriptModule | FusedBatchNorm)
    return known or all(name == "parametrizations" for name, _ in module.named_children())

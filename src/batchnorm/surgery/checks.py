"""Models that the verbs of surgery cannot change: wrappers that know the model as it is, and what hides its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from batchnorm.population.snapshots import check_materialized
from batchnorm.surgery.report import LEFT, Report, Row

# Classes of torch's, by name, since an import of most costs time: what they did to the model; its name inside.
_WRAPPERS = {
    "DistributedDataParallel": ("wrapped by DistributedDataParallel, which knows its parameters", "module", "wrap"),
    "DataParallel": ("wrapped by DataParallel", "module", "wrap"),
    "FullyShardedDataParallel": ("wrapped by FullyShardedDataParallel, which cut its parameters", "", "wrap"),
    "FSDPModule": ("cut by fully_shard, which knows its parameters", "", "shard"),
    "OptimizedModule": ("compiled by torch.compile", "_orig_mod", "compile"),
}
Verb = TypeVar("Verb", bound=Callable[..., Any])
_BATCH_NORM = ("batch_norm",)
AFFINE = ("linear", "conv", "addmm")  # operations, or parts of their names


def checked(model: Any, verb: str, *, runs: bool = True) -> None:
    """Refuse what a verb could only do half, or not at all; ``runs``: it runs the model.

    Raises:
        TypeError: not a module.
        ValueError: a wrapper, or a scripted model, with what to pass instead; where the verb runs the model, a lazy
            layer, or one on the meta device.
    """
    check_materialized(model, verb, weights=runs, runs=runs)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{verb}: the model is a {type(model).__name__}, which can be neither changed nor seen into: pass the "
            "module that it was made from, and script or trace the result."
        )
    for name, module in model.named_modules():
        kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")]
        wrapper = next((kind for kind in kinds if kind in _WRAPPERS), None)
        if wrapper is None:
            continue
        done, inside, again = _WRAPPERS[wrapper]
        if not inside:
            advice = f"call {verb} before, and {again} the result"
        elif name:
            advice = f"put its {inside} in its place, and {again} the result"
        else:
            advice = f"pass model.{inside}, and {again} the result"
        raise ValueError(f"{verb}: {name or 'the model'} is {done}: {advice}.")


@contextmanager
def only_copies_run(model: nn.Module, verb: str) -> Iterator[None]:
    """Inside, copies of a model run. What belongs to the model given does not: it raises before anything is computed.

    Raises:
        ValueError: a module of the model was called, whatever became of the error that it raised.
    """
    own, thread, called = {module: name for name, module in model.named_modules()}, get_ident(), list[str]()

    def refuse(module: nn.Module, inputs: Any) -> None:
        if module in own and get_ident() == thread:
            called.append(own[module])
            raise RuntimeError("a module of the model given was called")

    hook = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()
        if called:
            name = f"layer {called[0]} of the model given" if called[0] else "the model given"
            raise ValueError(
                f"{verb}: {name} was called when a copy of it ran: something that is not copied holds it (an object "
                "that gives itself as its copy, a registry, a function elsewhere). Have the forward take it from an "
                "attribute of self."
            )


def on_all_ranks(verb: Verb) -> Verb:
    """A verb that gives a new network, also for one in ``DistributedDataParallel``: what is inside is changed, and a
    new wrapper like the old one put around it, which gives all ranks what rank 0 has. All ranks call it."""

    @wraps(verb)
    def called(model: Any, *args: Any, **kwargs: Any) -> Any:
        if type(model) is not nn.parallel.DistributedDataParallel:
            return verb(model, *args, **kwargs)
        if model._comm_hooks or model.mixed_precision is not None:
            raise ValueError(
                f"{verb.__name__}: the model is wrapped by DistributedDataParallel with a communication hook or mixed "
                "precision, which a new wrapper would not have: pass model.module, and wrap the result."
            )
        skip = kwargs.get("skip")
        if isinstance(skip, Iterable) and not isinstance(skip, str):
            kwargs["skip"] = [name.removeprefix("module.") if isinstance(name, str) else name for name in skip]
        made = verb(model.module, *args, **kwargs)
        again = nn.parallel.DistributedDataParallel(
            made,
            device_ids=model.device_ids,
            output_device=model.output_device,
            dim=model.dim,
            broadcast_buffers=model.broadcast_buffers,
            process_group=model.process_group,
            bucket_cap_mb=model.bucket_bytes_cap / 2**20,
            find_unused_parameters=model.find_unused_parameters,
            gradient_as_bucket_view=model.gradient_as_bucket_view,
            static_graph=model.static_graph,
        ).train(model.training)
        rows = (row._replace(layer=f"module.{row.layer}") for row in made.batchnorm_report)
        norms = {f"module.{layer}": f"module.{norm}" for layer, norm in made.batchnorm_report.norms.items()}
        report = Report(rows, norms)
        again.batchnorm_report = report
        if hasattr(made, "batchnorm_recipe"):
            again.batchnorm_recipe = made.batchnorm_recipe
        return again

    return called  # type: ignore[return-value]


def replaced(module: nn.Module) -> bool:
    """Whether the object has a forward that is not its class's: ``accelerate`` puts hooks there, say."""
    return "forward" in vars(module)


def hooked(module: nn.Module, kinds: tuple[str, ...] = ("forward", "forward_pre", "backward", "backward_pre")) -> bool:
    """Whether somebody looks at what comes in or goes out."""
    return any(getattr(module, f"_{kind}_hooks") for kind in kinds)


def in_containers(model: nn.Module) -> Report:
    """A row for each batch normalization that a module keeps in a list or the like, where torch does not see it."""
    known, found = {*model.modules()}, Report()
    for name, module in model.named_modules():
        for key, value in vars(module).items() if not isinstance(module, torch.jit.ScriptModule) else ():
            held = (
                value.items() if isinstance(value, dict) else enumerate(value) if type(value) in (list, tuple) else ()
            )
            for place, part in held if key not in ("_modules", "taken_from") else ():
                inside = part.modules() if isinstance(part, nn.Module) and part not in known else ()
                if any(isinstance(each, _BatchNorm) for each in inside):
                    kind = "ModuleDict" if isinstance(value, dict) else "ModuleList"
                    why = f"it is in a {type(value).__name__}, in which torch sees no modules: use nn.{kind}"
                    found.append(Row(f"{name}.{key}[{place!r}]".lstrip("."), LEFT, why))
    return found


def scripted(model: nn.Module, operations: tuple[str, ...] = _BATCH_NORM) -> Report:
    """A row for each scripted part in which one of these operations is done."""
    found = Report()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{row.layer}.") for row in found)
        if isinstance(module, torch.jit.ScriptModule) and not inside and _does(module, operations):
            why = (
                f"a {type(module).__name__} can be neither changed nor seen into: use the module that it was made from"
            )
            found.append(Row(name, LEFT, why))
    return found


def _does(module: torch.jit.ScriptModule, operations: tuple[str, ...]) -> bool:
    """By its program; a container that has none, by its parts'."""
    try:
        program = str(module.inlined_graph)
    except Exception:  # whatever torch.jit raises where there is no forward
        return any(_does(part, operations) for part in module.children() if isinstance(part, torch.jit.ScriptModule))
    return any(operation in program for operation in operations)

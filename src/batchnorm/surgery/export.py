"""A model written for deployment, and read back to be compared: weights, torch.export, ONNX.

Comes from: ``fold``. Goes to: ``cli/fold.py``; a file, whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from batchnorm.surgery.fold_check import error
from batchnorm.surgery.watch import arguments, run, tensors_of


def write(model: nn.Module, example: Any, file: Path) -> str:
    """Write the model in the format of the file's suffix; what was found about what was written.

    Raises:
        ValueError: the model cannot be exported, with what the exporter says; a package is missing.
    """
    part = file.with_name(f"{file.stem}.part{os.getpid()}{file.suffix}")
    try:
        found = FORMATS[file.suffix](model, example, part)
        part.replace(file)
    finally:
        for leftover in file.parent.glob(f"{part.name}*"):
            leftover.unlink()
    return found


def _state_dict(model: nn.Module, example: Any, file: Path) -> str:
    state = {key: t.contiguous() for key, t in model.state_dict().items()}
    if file.suffix == ".safetensors":
        with _needs("safetensors"):
            from safetensors.torch import save_file
        seen: set[int] = set()
        for key, t in state.items():  # of tensors that share memory each has its own there
            memory = t.untyped_storage().data_ptr()
            state[key] = t.clone() if memory in seen else t
            seen.add(memory)
        save_file(state, file)
    else:
        torch.save(state, file)
    return "Load it into bn.fold(your_model().eval(), example)."


def _program(model: nn.Module, example: Any, file: Path) -> str:
    program, batch = _exported(model, example)
    torch.export.save(program, file)
    positional, named = arguments(example)
    with torch.no_grad():
        again = torch.export.load(file).module()(*positional, **named)
    return f"Exported for {batch}; read again, {_beside(model, example, again)}."


def _onnx(model: nn.Module, example: Any, file: Path) -> str:
    with _needs("onnxscript"):
        import onnxscript  # noqa: F401
    program, batch = _exported(model, example)
    with _quiet("torch.onnx", "onnxscript"), _says("ONNX export"):
        torch.onnx.export(program, f=str(file), dynamo=True, external_data=False, verbose=False)
    try:
        import onnxruntime
    except ImportError:
        return f"Exported for {batch}; not run again: pip install onnxruntime."
    with _says("onnxruntime"):
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        inputs = zip((i.name for i in session.get_inputs()), tensors_of(example), strict=True)
        again = session.run(None, {name: t.detach().cpu().numpy() for name, t in inputs})
    return f"Exported for {batch}; in onnxruntime, {_beside(model, example, [torch.from_numpy(y) for y in again])}."


FORMATS: dict[str, Callable[[nn.Module, Any, Path], str]] = {
    ".pt": _state_dict,
    ".safetensors": _state_dict,
    ".pt2": _program,
    ".onnx": _onnx,
}


def _exported(model: nn.Module, example: Any) -> tuple[torch.export.ExportedProgram, str]:
    """The program, for any number of examples where that can be."""
    sizes = {len(t) if t.dim() else 0 for t in tensors_of(example)}
    with _quiet("torch.export", "torch._dynamo"), torch.no_grad():
        if len(sizes) == 1 and min(sizes) > 1:
            with contextlib.suppress(Exception):  # a size that the model fixes
                copied = _pytree.tree_map_only(Tensor, torch.clone, example)  # torch marks what is dynamic
                positional, named = arguments(copied)
                sizes_of = _pytree.tree_map(_any_batch, named or positional)
                return torch.export.export(model, positional, named, dynamic_shapes=sizes_of), "any batch size"
        positional, named = arguments(example)
        with _says("torch.export"):
            program = torch.export.export(model, positional, named)
    return program, f"inputs of {', '.join('x'.join(map(str, t.shape)) for t in tensors_of(example))}"


def _any_batch(value: Any) -> dict[int, Any] | None:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(value, Tensor) else None


def _beside(model: nn.Module, example: Any, again: Any) -> str:
    pairs = list(zip(tensors_of(again), tensors_of(run(model, example)), strict=True))
    worst = max((error(a.double(), b.double()) for a, b in pairs if b.is_floating_point()), default=0.0)
    return f"{worst:.1e} of the largest output off"


@contextmanager
def _says(who: str) -> Iterator[None]:
    """What an exporter raises, as one line."""
    try:
        yield
    except Exception as failure:
        first = (str(failure).strip().splitlines() or [""])[0]
        raise ValueError(f"{who} cannot take the model: {type(failure).__name__}: {first}") from failure


@contextmanager
def _needs(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as failure:
        raise ValueError(f"that format needs {package}: pip install 'batchnorm[export]'.") from failure


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Exporters talk: of versions, of passes."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

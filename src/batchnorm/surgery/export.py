"""A model written for deployment, and read back to be compared: weights, torch.export, ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from batchnorm.common.errors import one_line
from batchnorm.common.files import replacing
from batchnorm.surgery.fold_check import beside
from batchnorm.surgery.watch import arguments, run, tensors_of


def write(model: nn.Module, example: Any, file: Path, tolerance: float | None = None) -> str:
    """Write the model in the format of the file's suffix; what was found about what was written.

    Raises:
        ValueError: the model cannot be exported, with what the exporter says; an output is none that the format has,
            with its name, or there is no tensor among them; what was written computes something
            else, beyond the tolerance (as of ``fold``), with the output that is most off; a package is missing.
            Nothing is written then.
    """
    if file.suffix in _NO_OUTPUT:
        _check_outputs(run(model, example), file.suffix)
    with replacing(file, suffix=file.suffix) as part, _quiet():
        return FORMATS[file.suffix](model, example, part, tolerance)


def _state_dict(model: nn.Module, example: Any, file: Path, tolerance: float | None) -> str:
    state = {key: t.contiguous() if isinstance(t, Tensor) else t for key, t in model.state_dict().items()}
    if file.suffix == ".safetensors":
        with _needs("safetensors"):
            from safetensors.torch import save_file
        with _says("safetensors"):
            save_file(_apart(state), file)
    else:
        torch.save(state, file)
    return "Load it into bn.fold(your_model().eval(), example)."


def _apart(state: dict[str, Any]) -> dict[str, Any]:
    """Tied tensors under each of their names: the format has no others."""
    seen: set[int] = set()
    for key, t in state.items():
        if isinstance(t, Tensor) and t.untyped_storage().data_ptr() in seen:
            state[key] = t.clone()
        elif isinstance(t, Tensor):
            seen.add(t.untyped_storage().data_ptr())
    return state


def _program(model: nn.Module, example: Any, file: Path, tolerance: float | None) -> str:
    program, batch = _exported(model, example)
    torch.export.save(program, file)
    positional, named = arguments(example)
    with torch.no_grad(), _says("torch.export"):
        again = torch.export.load(file).module()(*positional, **named)
    return f"Exported for {batch}; read again, {_beside(file.suffix, model, example, again, tolerance)}."


def _onnx(model: nn.Module, example: Any, file: Path, tolerance: float | None) -> str:
    with _needs("onnxscript"):
        import onnxscript  # noqa: F401
    program, batch = _exported(model, example)
    with _says("ONNX export"):
        torch.onnx.export(program, f=str(file), dynamo=True, external_data=False, verbose=False)
    try:
        import onnxruntime
    except ImportError:
        return f"Exported for {batch}; not run again: pip install onnxruntime."
    with _says("onnxruntime"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it raises says it too
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        inputs = zip((i.name for i in session.get_inputs()), tensors_of(example), strict=True)
        again = session.run(None, {name: t.detach().cpu().numpy() for name, t in inputs})
    found = _beside("onnxruntime", model, example, [torch.from_numpy(y) for y in again], tolerance)
    return f"Exported for {batch}; in onnxruntime, {found}."


FORMATS: dict[str, Callable[[nn.Module, Any, Path, float | None], str]] = {
    ".pt": _state_dict,
    ".safetensors": _state_dict,
    ".pt2": _program,
    ".onnx": _onnx,
}
# What a format cannot give out beside tensors.
_NO_OUTPUT: dict[str, tuple[type, ...]] = {".pt2": (str, bytes), ".onnx": (str, bytes, int, float, complex)}


def _check_outputs(outputs: Any, suffix: str) -> None:
    for path, leaf in _pytree.tree_leaves_with_path(outputs):
        if isinstance(leaf, _NO_OUTPUT[suffix]):
            raise ValueError(
                f"output {_place(path)} of the model is {leaf!r:.40}, which {suffix} cannot give out: leave it out of "
                "what forward returns, or make it a tensor."
            )
    if not [*tensors_of(outputs)]:
        raise ValueError(f"there is no tensor among the model's outputs ({type(outputs).__name__}): nothing to export.")


def _exported(model: nn.Module, example: Any) -> tuple[torch.export.ExportedProgram, str]:
    """The program, for any number of examples where that can be."""
    sizes = {len(t) if t.dim() else 0 for t in tensors_of(example)}
    with torch.no_grad():
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


def _beside(who: str, model: nn.Module, example: Any, again: Any, tolerance: float | None) -> str:
    found = [t for t in tensors_of(again) if isinstance(t, Tensor)]
    names = [*_names(run(model, example))]
    if len(found) != len(names):
        raise ValueError(f"{who} gives {len(found)} outputs, the model {len(names)}. Nothing was written.")
    worst, off, limit = beside(model, example, found, tolerance)
    if not off <= limit:
        raise ValueError(
            f"{who} computes something else: output {names[worst]} is {off:.1e} of its largest value off, more than "
            f"{limit:.1e}. Nothing was written: look for an operation that the format takes otherwise."
        )
    return f"{off:.1e} of the largest output off"


def _names(outputs: Any) -> Iterator[str]:
    """Of the tensors in a model's outputs: their place in it, their key."""
    for path, leaf in _pytree.tree_leaves_with_path(outputs):
        place = _place(path)
        inside = [*tensors_of(leaf)]
        yield from [place] if isinstance(leaf, Tensor) else (f"{place}.{i}" for i in range(len(inside)))


def _place(path: Any) -> str:
    return re.sub(r"\W+", ".", _pytree.keystr(path)).strip(".") or "0"


@contextmanager
def _says(who: str) -> Iterator[None]:
    """An exporter's error in one line: that of its cause, where that says more."""
    try:
        yield
    except Exception as failure:
        cause: BaseException = failure
        while cause.__cause__ is not None and type(failure).__module__.startswith("torch.onnx"):
            cause = cause.__cause__
        raise ValueError(f"{who} cannot take the model: {one_line(cause)}") from failure


@contextmanager
def _needs(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as failure:
        raise ValueError(f"that format needs {package}: pip install 'batchnorm[export]'.") from failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk: of versions, of passes, of graphs. What matters they raise."""
    before, silence = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""Contents of files of ``torch.save`` and safetensors; errors that say what an unreadable file is, and what to do."""

from __future__ import annotations

import mmap
import re
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

# How files begin that are given for checkpoints, and what to do with those.
_BEGINNINGS = {
    rb"\Z": "is empty: get it again.",
    rb"version https://git-lfs": "is a git-lfs pointer, not what it points to: run git lfs pull.",
    rb"\s*<(!doctype|html|\?xml|head)": "is a web page, not a checkpoint: download the file that it is about.",
    rb"\x80(?!\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19)": "is a plain pickle: save model.state_dict() by torch.save.",
    rb"[\t\n\r -~]+\Z": "is text, not a checkpoint.",
}
_SAFE = re.compile(rb".{6}\0\0\{", re.DOTALL)  # the header's length, below 2^48, and the header
_IN_EVERY_MODULE = b"_backward_hooks"  # pickled with it
_NUMBERS = "biufcSUmM"  # numpy's kinds, without objects and what is put together


class Saved(NamedTuple):
    """``safe``: the file is of safetensors, with this ``metadata``."""

    content: dict[Any, Any]
    safe: bool
    metadata: dict[str, str] | None


def read(file: Path) -> Saved:
    """The contents of a file of either format, recognized by its first bytes; no code in it runs.

    Raises:
        ValueError: it is something else, or holds something else than a dict.
    """
    with file.open("rb") as opened:
        beginning = opened.read(256)
    if _SAFE.match(beginning):
        return _read_safetensors(file)
    try:
        with numpys_data(), warnings.catch_warnings(), file.open("rb") as opened:  # a name tells torch the format
            warnings.simplefilter("ignore")
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} {_why(file, beginning, error)}") from error
    if isinstance(content, torch.nn.Module):
        raise whole_model(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a state_dict: save model.state_dict().")
    return Saved(content, False, None)


def whole_model(file: Path) -> ValueError:
    """The error for a model that was saved as it is."""
    return ValueError(
        f"{file} holds a whole model: save model.state_dict() instead. Where you trust the file, "
        f'torch.load("{file}", weights_only=False) gives what is in it.'
    )


def numpys_data() -> AbstractContextManager[None]:
    """Inside ``weights_only=True`` takes numpy's scalars and arrays of numbers, of texts and of times too."""
    try:
        import numpy as np
    except ImportError:
        return torch.serialization.safe_globals([])
    functions: tuple[Any, ...] = (np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0])
    made_by = [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in functions for core in ("_core", "core")]
    kinds = {type(np.dtype(kind)) for kind in np.typecodes["All"] if np.dtype(kind).kind in _NUMBERS}
    mine: Iterable[Any] = (*made_by, np.ndarray, np.dtype, *kinds)
    users = torch.serialization.get_safe_globals()  # which stay afterwards
    return torch.serialization.safe_globals([one for one in mine if one not in users])


def _why(file: Path, beginning: bytes, error: Exception) -> str:
    """Why it cannot be read, and what to do."""
    with file.open("rb") as opened:
        if beginning and mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ).find(_IN_EVERY_MODULE) >= 0:
            return str(whole_model(file)).removeprefix(f"{file} ")
    if beginning.startswith(b"PK") and not zipfile.is_zipfile(file):
        return "is cut off or damaged: get it again."
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    objects = _objects(file) or re.findall(r"Unsupported global: GLOBAL (\S+)", text)
    if objects:
        return (
            f"holds objects that may run code when they are loaded ({few(objects)}), so they are refused: "
            f"save model.state_dict() by itself, or, where you trust the file, {_allowing(objects)}."
        )
    for begins, what in _BEGINNINGS.items():
        if re.match(begins, beginning, re.IGNORECASE):
            return what
    reason = _first_line(text) or type(error).__name__
    return f"cannot be read as tensors and plain values ({reason}): save model.state_dict() by torch.save."


def _objects(file: Path) -> list[str]:
    """What ``weights_only=True`` refuses in there, by name."""
    try:
        with numpys_data():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # of the format before torch 1.6, or no checkpoint
        return []


def _allowing(objects: list[str]) -> str:
    """The lines that allow them; of a script's own objects, once they are in the file of functions."""
    of_script = {name: name.removeprefix("__main__.") for name in objects if name.startswith("__main__.")}
    given = [f'({of_script[name]}, "{name}")' if name in of_script else name for name in objects]
    modules = sorted({name.rpartition(".")[0] for name in objects if name not in of_script} - {"", "torch"})
    moved = f"define or import {', '.join(of_script.values())} and " if of_script else ""
    lines = f"import {', '.join(['torch', *modules])}; torch.serialization.add_safe_globals([{', '.join(given)}])"
    return f"{moved}add in the file of your functions: {lines}"


def _first_line(text: str) -> str:
    """Of what torch says, the first sentence that tells the reason."""
    text = text.partition("WeightsUnpickler error:")[2] or text
    return re.split(r"\.\s|\n", text.strip())[0].rstrip(".")


def _read_safetensors(file: Path) -> Saved:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ValueError(f"{file}: its format is safetensors: pip install safetensors.") from error
    try:
        with safe_open(file, "pt") as tensors:
            content = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
            return Saved(content, True, tensors.metadata())
    except Exception as error:
        raise ValueError(f"{file} cannot be read as safetensors ({_first_line(str(error))}): get it again.") from error


def few(names: Iterable[Any]) -> str:
    """The first four, and how many more."""
    names = [str(name) for name in names] or ["nothing"]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

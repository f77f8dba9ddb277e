"""Users' functions by name, and the files that commands read and write."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from batchnorm.common.errors import one_line
from batchnorm.common.names import NoSuchName, is_path, named

_VERBS = ("batchnorm.population.", "batchnorm.surgery.")  # what raises in there knows what the user gave


def end(command: str, error: Exception) -> NoReturn:
    """The error in one line, under the command's name alone."""
    print(f"{command}: {re.sub(f'^{command}( refused)?: ', '', str(error))}", file=sys.stderr)
    sys.exit(2)


def check_files(checkpoint: Path, out: Path, overwrite: bool) -> None:
    """One is there, the other may be written."""
    if not checkpoint.is_file():
        raise ValueError(f"--checkpoint {checkpoint}: there is no such file.")
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory: name a file.")
    if out.exists() and not overwrite:
        raise ValueError(f"--out {out} is there already: name another one, or pass --overwrite.")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {out.absolute().parent}.")


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Whatever the user's code raises in there, as one line that begins so. A ValueError of ours speaks for itself."""
    try:
        yield
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and frame.f_globals.get("__name__", "").startswith(_VERBS):
            raise
        raise ValueError(f"{what}: {one_line(error)}") from error


def made(option: str, spec: str) -> Any:
    """The result of the user's function."""
    if not is_path(spec):
        raise ValueError(f"{option} {spec}: expected a function of yours, package.module:function.")
    try:
        return named(spec)()
    except NoSuchName as error:
        raise ValueError(f"{option} {spec}: {error}") from None
    except Exception as error:
        raise ValueError(f"{option} {spec}: {one_line(error)}") from error


def model_of(spec: str) -> nn.Module:
    """The model that the user's function returns."""
    model = made("--model", spec)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {spec} returned a {type(model).__name__}, not a torch.nn.Module.")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(f"--model {spec} returned a model on the meta device, without values: make it on the cpu.")
    return model

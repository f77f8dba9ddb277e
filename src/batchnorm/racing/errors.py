"""What can go wrong with a race, apart from mistakes of ours."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

_OURS = str(Path(__file__).parent.parent)
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


class RaceError(ValueError):
    """The race cannot be run as asked: an unknown name, a wrong value, missing data. The command exits with 2."""


class WorkerError(RuntimeError):
    """A training process was killed or raised; the race can be resumed. The command exits with 1."""


class UnreadableFile(RaceError):
    """A file is damaged: only the process that reads it knows, so that one tells of it, whichever it is."""


def one_line(error: BaseException) -> str:
    """An exception's type, the first line of its message, and where in the user's own code it came from."""
    said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(("<", _OURS, *_INSTALLED))]
    return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})" if own else said

"""Other people's exceptions, in one line."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

_NOT_THEIRS = re.compile(
    rf"<|{re.escape(str(Path(__file__).parent.parent))}|{re.escape(str(Path(os.__file__).parent))}"
    r"|.*[/\\](site|dist)-packages[/\\]"
)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without a terminal's colors."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip()
    return (text.splitlines() or [""])[0]


def one_line(error: BaseException) -> str:
    """An exception's type, the first line of its message, and the line of the user's own code that it came from."""
    said = f"{type(error).__name__}: {first_line(error)}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _NOT_THEIRS.match(frame.filename)]
    return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})" if own else said

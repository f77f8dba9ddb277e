"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path, *, suffix: str = "") -> Iterator[Path]:
    """Yield a path beside ``file`` to write to; it takes the file's place at the end, and is gone after an error.

    Args:
        file: the file that is written or replaced.
        suffix: what the name to write to ends in, for writers that look at it.
    """
    part = file.with_name(f"{file.name}.part{os.getpid()}{suffix}")
    try:
        yield part
        part.replace(file)
    finally:
        for leftover in (part, *file.parent.glob(f"{glob.escape(part.name)}.*")):
            leftover.unlink(missing_ok=True)

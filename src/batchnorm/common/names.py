"""Objects that users name on the command line: ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


class NoSuchName(AttributeError):
    """The module is there, and has nothing of this name."""


def is_path(spec: str) -> bool:
    """Whether it has the form ``package.module:name``."""
    module, colon, name = spec.partition(":")
    return bool(module and colon and name)


def named(spec: str) -> Any:
    """What ``package.module:name`` is; modules in the current directory are found too, as ``python -m`` finds them.

    Raises:
        NoSuchName: the module has no such name. Importing it may raise anything.
    """
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = importlib.import_module(module_name)
    if not hasattr(module, name):
        raise NoSuchName(f"{module_name} has no {name}.")
    return getattr(module, name)

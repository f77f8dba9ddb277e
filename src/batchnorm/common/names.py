"""Objects that users name on the command line: ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from operator import attrgetter
from typing import Any


class NoSuchName(AttributeError):
    """The module is there, and has nothing of this name."""


def is_path(spec: str) -> bool:
    """Whether it has the form ``package.module:name``."""
    module, colon, name = spec.partition(":")
    return bool(module and colon and name)


def named(spec: str) -> Any:
    """The object ``package.module:name``, or ``:Class.name``; modules in the current directory are found too.

    Raises:
        NoSuchName: the module has no such name. Importing it may raise anything.
    """
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = importlib.import_module(module_name)
    try:
        return attrgetter(name)(module)
    except AttributeError:
        raise NoSuchName(f"{module_name} has no {name}.") from None

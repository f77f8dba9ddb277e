"""The paper's claims as experiments, one file each. A new experiment is a file and a name here.

An experiment's module has ``CLAIM``, ``cells(quick)``, ``measure(**cell)`` and ``conclude(records)``; see ``claim.py``.
"""

from __future__ import annotations

import importlib

from batchnorm.experiments.claim import Experiment

NAMES = ("mnist", "capacity", "scale", "saturation", "initialization", "convolution")


def load(name: str) -> Experiment:
    """An experiment by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f'unknown experiment "{name}". Known: {", ".join(NAMES)}.')
    module = importlib.import_module(f"batchnorm.experiments.{name.replace('-', '_')}")
    return Experiment(module.CLAIM, module.cells, module.measure, module.conclude)

"""The paper's claims as experiments, one file each. A new experiment is a file and a name here.

An experiment's module has ``CLAIM``, ``cells(quick, seeds)``, ``measure(**cell)`` and ``conclude(records)``, and where
it takes times ``alone(cell)``; see ``claim.py``.
"""

from __future__ import annotations

import importlib

from batchnorm.experiments.claim import Experiment

NAMES = (
    "steps", "mnist", "shift", "capacity", "scale", "saturation", "initialization", "learning-rate", "gradients",
    "regularization", "gradient-quality", "throughput", "inference", "convolution", "ensemble", "cost",
    "worth",
)  # fmt: skip


def load(name: str) -> Experiment:
    """An experiment by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f'unknown experiment "{name}". Known: {", ".join(NAMES)}.')
    module = importlib.import_module(f"batchnorm.experiments.{name.replace('-', '_')}")
    optional = {"alone": module.alone} if hasattr(module, "alone") else {}
    return Experiment(module.CLAIM, module.cells, module.measure, module.conclude, **optional)

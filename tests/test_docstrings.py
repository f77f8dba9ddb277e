"""The examples in docstrings run and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import batchnorm

SOURCE = Path(batchnorm.__file__).parent
MODULES = sorted(
    ".".join(("batchnorm", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.name != "__main__.py"  # importing it runs it
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_layers_and_function_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "batch_norm"):
        assert any(test.examples for test in finder.find(getattr(batchnorm, name), name)), name

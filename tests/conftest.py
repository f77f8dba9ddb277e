"""Makes `cases` and `helpers` importable from every test file; fixes the seed; what a test compiled is forgotten."""

import gc
import sys
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_finish() -> None:
    """The collector looks at what tests make, and no longer at all modules: surgery calls it, a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def programs() -> Iterator[None]:
    """Layers share the code of their forward, of which torch.compile makes eight programs at the most."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()

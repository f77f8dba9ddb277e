"""Makes `cases` and `helpers` importable from every test file; fixes the seed; what a test compiled is forgotten."""

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def programs() -> Iterator[None]:
    """Layers share the code of their forward, of which torch.compile makes eight programs at the most."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()

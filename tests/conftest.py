"""Makes `cases` and `helpers` importable from every test file; fixes the seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)

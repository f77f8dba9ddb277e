"""A training step of a whole network, timed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from batchnorm.bench import networks


class Network(nn.Module):
    """What bench_network needs of those of transformers."""

    config = SimpleNamespace(num_labels=4)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
        self.layers(torch.zeros(2, 3, 8, 8))

    def forward(self, pixel_values, labels):
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.layers(pixel_values), labels))


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_step_is_timed_with_each_kind_of_layer(monkeypatch, channels_last):
    monkeypatch.setitem(networks.NETWORKS, "small", Network)
    seen = []
    row = networks.bench_network(
        "small", batch=4, size=8, channels_last=channels_last, steps=3, report=lambda: seen.append(1)
    )
    assert set(row.seconds) == set(row.spread) == {"torch", "ours"}
    assert min(row.seconds.values()) > 0
    assert 0 < row.share < 1
    assert len(seen) == 2 * 5

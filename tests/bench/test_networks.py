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

    def forward(self, pixel_values, labels=None):
        logits = self.layers(pixel_values)
        return Output(loss=None if labels is None else nn.functional.cross_entropy(logits, labels), logits=logits)


class Output(dict):
    """As those of transformers."""

    loss = property(lambda self: self["loss"])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("training", "kinds"), [(True, {"torch", "ours", "fused"}), (False, {"torch", "ours", "fused", "folded"})]
)
def test_a_step_is_timed_with_each_kind_of_layer(monkeypatch, channels_last, training, kinds):
    monkeypatch.setitem(networks.NETWORKS, "small", Network)
    seen = []
    row = networks.bench_network(
        "small", batch=4, size=8, channels_last=channels_last, steps=3, training=training, report=lambda: seen.append(1)
    )
    assert set(row.seconds) == set(row.spread) == kinds
    assert min(row.seconds.values()) > 0
    assert 0 < row.share < 1
    assert len(seen) == len(kinds) * 5

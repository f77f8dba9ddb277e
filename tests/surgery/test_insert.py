"""Batch normalization put into networks, trained and not: pain 33."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn


class Network(nn.Module):
    """Modules and functions, features last, a layer read twice, a softmax, an output, batch normalization already."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.has = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 1)
        self.norm, self.act, self.never = nn.BatchNorm2d(4), nn.GELU(), nn.Linear(3, 3)
        self.tokens, self.twice, self.gate = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.shared, self.head, self.weights = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 6)

    def forward(self, x):
        y = self.act(self.conv(x))
        y = torch.tanh(self.up(y))
        y = F.relu(self.norm(self.has(y)))
        y = F.silu(self.tokens(y.flatten(2).transpose(1, 2)))  # (N, L, C)
        z = self.twice(y)
        y = F.relu(z) + z
        y = y * self.weights(y).softmax(-1)
        y = torch.sigmoid(self.shared(F.relu(self.shared(y))))
        return self.head(y.mean(1)), torch.sigmoid(self.gate(y))


X = torch.randn(4, 3, 6, 6)


def test_before_each_nonlinearity_that_alone_reads_a_layer():
    model = Network()
    text, state = repr(model), copy.deepcopy(model.state_dict())
    inserted = bn.insert(model, X, skip=["gate"])
    assert {row.layer: row.why for row in inserted.batchnorm_report} == {
        "conv": "before act",
        "up": "before tanh()",
        "has": "it has batch normalization, norm",
        "never": "the example does not reach it",
        "tokens": "before silu()",
        "twice": "its output is read more than once",
        "gate": "skipped",
        "shared": "it is called 2 times",
        "head": "its output goes to the model's output",
        "weights": "its output goes to softmax()",
    }
    assert isinstance(inserted.conv, nn.Conv2d)
    assert inserted.conv.bias is None
    assert type(inserted.tokens.batch_norm) is bn.BatchNorm1d
    assert {k for k in inserted.state_dict() if k.startswith("conv")} == {
        "conv.weight",
        *(f"conv.batch_norm.{k}" for k in bn.BatchNorm2d(4).state_dict()),
    }
    assert repr(model) == text
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    keys = inserted.load_state_dict(state, strict=False)
    assert sorted(keys.unexpected_keys) == ["conv.bias", "tokens.bias", "up.bias"]
    assert all("batch_norm" in key for key in keys.missing_keys)
    assert torch.equal(inserted.conv.weight, model.conv.weight)


def test_what_is_inserted_normalizes_and_trains():
    inserted = bn.insert(Network(), X)
    seen = []
    for name in ("conv.batch_norm", "tokens.batch_norm"):
        inserted.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    sum(out.sum() for out in inserted(X)).backward()
    conv, tokens = seen
    torch.testing.assert_close(conv.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert tokens.dim() == 2
    torch.testing.assert_close(tokens.var(0, correction=0), torch.ones(6), atol=2e-2, rtol=0)
    assert inserted.conv.batch_norm.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trained_network_computes_in_eval_what_it_did(dtype):
    model = Network().to(dtype).eval()
    batches = [torch.randn(n, 3, 6, 6, dtype=dtype) for n in (8, 3, 5)]
    inserted = bn.insert(model, X.to(dtype), batches=batches)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for a, b in zip(inserted(X.to(dtype)), model(X.to(dtype)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    whole = F.conv2d(torch.cat(batches), model.conv.weight)
    norm = inserted.conv.batch_norm
    torch.testing.assert_close(norm.running_mean, whole.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var, whole.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.weight.detach(), (norm.running_var + norm.eps).sqrt())
    assert inserted.training is False


def test_what_was_inserted_folds_away_again():
    model = Network().double().eval()
    inserted = bn.insert(model, X.double(), batches=[torch.randn(8, 3, 6, 6, dtype=torch.float64)])
    folded = bn.fold(inserted, X.double())
    assert folded.batchnorm_report.of("folded") == [
        *(f"{name}.batch_norm" for name in ("conv", "up", "tokens", "gate")),
        "norm",
    ]
    assert [type(m) for m in folded.modules()].count(nn.Identity) == 1
    assert type(folded.conv) is nn.Conv2d
    for a, b in zip(folded(X.double()), model(X.double()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_copies_and_pickles():
    inserted = bn.insert(Network(), X).eval()
    again = pickle.loads(pickle.dumps(copy.deepcopy(inserted)))
    for a, b in zip(again(X), inserted(X), strict=True):
        torch.testing.assert_close(a, b)


def test_what_insert_refuses():
    with pytest.raises(TypeError, match=r"insert takes a torch.nn.Module, got list"):
        bn.insert([], X)
    with pytest.raises(ValueError, match=r"skip names layers that there are not: convv"):
        bn.insert(Network(), X, skip=["convv"])
    with pytest.raises(ValueError, match="batches yielded nothing"):
        bn.insert(Network(), X, batches=[])
    with pytest.raises(RuntimeError, match="channels"):
        bn.insert(Network(), X[:, :2])

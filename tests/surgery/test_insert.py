"""Batch normalization put into networks, trained and not."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn
from batchnorm.surgery.fold_check import TOLERANCE


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
        "never": "its forward is not called on the example",
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
        *(f"{name}.batch_norm" for name in ("conv", "up", "tokens")),
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
    with pytest.raises(
        ValueError, match=r"skip names no Linear, Conv or ConvTranspose, nor a module around one: convv"
    ):
        bn.insert(Network(), X, skip=["convv"])
    with pytest.raises(ValueError, match="batches yielded nothing"):
        bn.insert(Network(), X, batches=[])
    for batch, name in ((X, "Tensor"), ({"x": X}, "dict")):
        with pytest.raises(TypeError, match=f"batches is a {name}.*would be taken for batches"):
            bn.insert(Network(), X, batches=batch)
    with pytest.raises(RuntimeError, match="channels"):
        bn.insert(Network(), X[:, :2])


class Scaled(nn.Conv2d):
    """A subclass that computes what the class does."""

    def __init__(self):
        super().__init__(3, 4, 3)


class Custom(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(max=1)


class QuickGELUActivation(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Residual(nn.Module):
    """Sums before nonlinearities, Identities in between, subclasses, activations of other packages."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Scaled(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.d, self.e, self.f = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), Custom(4, 4, 1)
        self.g, self.h = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act, self.nothing = QuickGELUActivation(), nn.Identity()

    def forward(self, x):
        y = self.act(self.nothing(self.a(x)))
        y = F.relu(self.nothing(self.b(y) + self.c(y)) + y)
        z = self.d(y) + y  # a sum read twice
        y = F.relu(z) + z
        y = F.relu(self.e(y) * 2) + F.relu(self.f(y))
        y = self.g(y).add_(y)
        y = torch.relu(y)
        return self.h(y) + y


def test_sums_before_a_nonlinearity_and_what_passes_on():
    model = Residual()
    inserted = bn.insert(model, X)
    assert {row.layer: row.why for row in inserted.batchnorm_report} == {
        "a": "before act",
        "b": "before add() and relu()",
        "c": "before add() and relu()",
        "d": "its output goes to add()",
        "e": "its output goes to mul()",
        "f": "a Custom with a forward of its own may do more than its weights",
        "g": "before add_() and relu()",
        "h": "its output goes to add()",
    }
    assert isinstance(inserted.a, Scaled)
    trained = bn.insert(model.double().eval(), X.double(), batches=[X.double()])
    torch.testing.assert_close(trained(X.double()), model(X.double()), rtol=1e-12, atol=1e-12)
    folded = bn.fold(trained, X.double())
    assert type(folded.a) is Scaled
    torch.testing.assert_close(folded(X.double()), model(X.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [False, True])
def test_torchs_transformer_does_not_read_past_what_is_inserted(mask):
    """In eval its fast path takes the weights of the layers and computes by itself."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(4, 5, 8)
    inserted = bn.insert(model, x)
    assert inserted.batchnorm_report.of("normalized") == ["layers.0.linear1", "layers.1.linear1"]
    inserted.train()(x)  # statistics that are not 0 and 1
    padded = torch.zeros(4, 5, dtype=torch.bool)
    padded[:, 4] = mask
    arguments = {"src_key_padding_mask": padded} if mask else {}
    slow = copy.deepcopy(inserted).eval()
    for part in slow.modules():
        part.register_forward_hook(lambda module, args, out: None)  # with hooks torch calls every layer
    with torch.no_grad():
        torch.testing.assert_close(inserted.eval()(x, **arguments), slow(x, **arguments))
        assert not torch.allclose(model(x), slow(x), atol=1e-3)


class Heads(nn.Module):
    """What a model gives out through a nonlinearity; a layer that train reads once more; a head behind a maximum."""

    def __init__(self):
        super().__init__()
        self.conv, self.aux, self.image, self.classes = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.mask, self.hidden = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv(x), 2))
        y = self.aux(x)
        z = F.relu(self.hidden(torch.sigmoid(self.mask(x))))
        out = torch.tanh(self.image(F.relu(y) + z)), torch.sigmoid(self.classes(z)).flatten(1)
        return (*out, y) if self.training else out


def test_never_before_what_a_model_gives_out_and_the_same_in_train_as_in_eval():
    inserted = bn.insert(Heads(), X)
    assert {row.layer: row.why for row in inserted.batchnorm_report} == {
        "conv": "before relu()",
        "aux": "it, or what reads it, is called differently in train",
        "image": "its output goes to the model's output through tanh()",
        "classes": "its output goes to the model's output through sigmoid()",
        "mask": "before sigmoid()",
        "hidden": "before relu()",
    }


def test_a_maximum_may_stand_between():
    """PyTorch's own MNIST example: relu(max_pool2d(conv)) is max_pool2d(relu(conv))."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Dropout(0.0), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert bn.insert(model, X).batchnorm_report.of("normalized") == ["0"]
    assert (
        bn.insert(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1), nn.ReLU()), X).batchnorm_report[0].done
        == "left alone"
    )


def test_empty_batches_count_for_nothing():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(8, 4)
    found = [bn.insert(model, x, batches=given).state_dict() for given in ([x], [x[:0], x, x[:0]])]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"no batch reaches 0, or only empty ones do: give batches"):
        bn.insert(model, x, batches=[x[:0]])


def test_skip_takes_modules_around_layers():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    for given in (["2"], (name for name in ["2"])):
        assert bn.insert(model, X, skip=given).batchnorm_report.of("normalized") == ["0"]
    with pytest.raises(TypeError, match="skip is a list of names, got the string '0'"):
        bn.insert(model, X, skip="0")
    for given, got in (([nn.Linear], "the class Linear"), (nn.Linear, "the class Linear"), ([model[0]], "a Linear")):
        with pytest.raises(
            TypeError, match=rf"skip is a list of names of layers, got {got}: \[name for name, layer in"
        ):
            bn.insert(model, X, skip=given)
    with pytest.raises(ValueError, match=r"skip names no Linear.*: 1"):
        bn.insert(model, X, skip=["1"])


class LayerNormGELU(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return F.gelu(F.layer_norm(x, (6,), self.weight))


def test_what_only_sounds_like_a_nonlinearity_and_what_has_been_given_already():
    model = nn.Sequential(nn.Linear(6, 6), LayerNormGELU(), nn.Linear(6, 6), nn.ReLU())
    once = bn.insert(model, X)
    assert [row.why for row in once.batchnorm_report] == ["its output goes to 1", "before 3"]
    assert [row.why for row in bn.insert(once, X).batchnorm_report][1] == "it has batch normalization, 2.batch_norm"


def test_an_example_without_a_batch():
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU())
    (row,) = bn.insert(model, torch.randn(3, 8)).batchnorm_report
    assert row.why == "its output has no batch dimension: give an example with one"
    (row,) = bn.insert(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(3)).batchnorm_report
    assert row.done == "left alone"


class ReadsTheBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return F.relu(self.a(x)) * self.a.bias.sum()


class CountsTheBias(ReadsTheBias):
    def forward(self, x):
        return F.relu(self.a(x)) * len(self.a.bias)


def test_a_forward_that_does_not_go_through_what_was_inserted():
    assert bn.insert(ReadsTheBias(), X).batchnorm_report == [("a", "left alone", "sum() reads its bias too")]
    with pytest.raises(ValueError, match=r"batch normalization in a the model does not run .*NoneType.*skip="):
        bn.insert(CountsTheBias(), X)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model[0].forward = lambda x: F.linear(x, model[0].weight, model[0].bias)  # as wrappers do it
    (row,) = bn.insert(model, X).batchnorm_report
    assert row.why == "a Linear with a forward of its own may do more than its weights"
    assert bn.insert(nn.Sequential(nn.ReLU()), X, batches=[X]).batchnorm_report == []


class Moves(nn.Module):
    """What moves values before a nonlinearity; dropout that only train has; another package's batch normalization."""

    def __init__(self):
        super().__init__()
        self.tokens, self.squeezed, self.dropped = nn.Linear(6, 4), nn.Conv2d(3, 4, (6, 1)), nn.Linear(6, 4)
        self.function, self.gate, self.has = nn.Linear(6, 4), nn.Linear(6, 4), nn.Conv2d(3, 4, 1)
        self.drop, self.norm = nn.Dropout(0.5), type("Subclass", (nn.BatchNorm2d,), {})(4)
        self.norm.add_module("act", nn.ReLU())

    def forward(self, x):
        out = F.relu(self.tokens(x).transpose(1, 3).contiguous()), torch.tanh(self.squeezed(x).squeeze(2)) * 2
        out += F.relu(self.drop(self.dropped(x))), F.relu(F.dropout(self.function(x), 0.5, self.training))
        return (*out, torch.sigmoid(self.gate(x)).flatten(2).transpose(1, 2), F.relu(self.norm(self.has(x))))


def test_what_moves_values_may_stand_between():
    model = Moves()
    inserted = bn.insert(model, X)
    assert {row.layer: row.why for row in inserted.batchnorm_report} == {
        "tokens": "before relu()",
        "squeezed": "before tanh()",
        "dropped": "its output goes to drop",
        "function": "it, or what reads it, is called differently in train",
        "gate": "its output goes to the model's output through sigmoid()",
        "has": "it has batch normalization, norm",
    }
    trained = bn.insert(model.double().eval(), X.double(), batches=[X.double()])
    torch.testing.assert_close(trained(X.double()), model(X.double()), rtol=1e-10, atol=1e-10)


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return F.relu(self.b(x)) if len(x) == 4 else F.relu(self.a(x))


def test_what_batches_do_not_tell_is_said_with_the_layers_name(monkeypatch):
    with pytest.raises(
        ValueError, match=r"insert: no batch reaches b, or only empty ones do: give batches that do, or skip= them"
    ):
        bn.insert(TwoPaths(), X, batches=[X[:3]])
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()).eval()
    with pytest.raises(ValueError, match=r"insert: on these batches 0 gives values that are not finite: look at"):
        bn.insert(model, X, batches=[X, X * torch.inf])
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-30)
    with pytest.raises(ValueError, match=r"with batch normalization 0 is in eval .* off, more than 1.0e-30"):
        bn.insert(model, X, batches=[X])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*.grad attribute:UserWarning")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("plain", "x"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU()), torch.randn(4, 3, 6, 6)),
        (nn.Sequential(nn.ConvTranspose1d(3, 4, 3, stride=2), nn.GELU()), torch.randn(4, 3, 5)),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(4, 5, 3)),
    ],
    ids=["conv", "transposed", "features last"],
)
def test_what_is_inserted_is_scripted(plain, x, train):
    inserted = bn.insert(plain, x).train(train)
    scripted = torch.jit.script(copy.deepcopy(inserted))
    assert list(scripted.state_dict()) == list(inserted.state_dict())
    for given in (x, 3 * x[:, :, 1:]) if plain[0].weight.dim() > 2 else (x, x[:, 0]):
        torch.testing.assert_close(scripted(given), inserted(given))
    torch.testing.assert_close(dict(scripted.state_dict()), dict(inserted.state_dict()))
    torch.jit.save(scripted, io.BytesIO())

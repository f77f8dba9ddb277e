"""Frozen layers: nothing moves in train, whatever is saved and loaded, until unfreeze."""

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm as bn


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 4, 3), bn.BatchNorm2d(4)
    )


X = torch.randn(6, 3, 9, 9) * 3 + 1


def test_frozen_statistics_survive_train_and_normalize_as_in_eval():
    model = network()
    model(X)
    expected, before = model.eval()(X), copy.deepcopy(model.state_dict())
    bn.freeze(model)
    for _ in range(2):
        y = model.train()(X)
        torch.testing.assert_close(y, expected)
    y.sum().backward()
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert model[1].weight.grad is not None
    bn.unfreeze(model)
    model(X)
    assert model.state_dict().keys() == before.keys()
    assert model[1].num_batches_tracked == 2


def test_affine_parameters_are_frozen_and_set_free_as_they_were():
    model = network()
    model[3].bias.requires_grad_(False)  # the user's own choice
    bn.freeze(model, running_stats=False, affine=True)
    assert not any(p.requires_grad for layer in (model[1], model[3]) for p in layer.parameters())
    model(X)
    assert model[1].num_batches_tracked == 1  # statistics move
    bn.freeze(model)  # what is frozen stays so
    assert not model[1].weight.requires_grad
    assert model[1].frozen_statistics
    bn.unfreeze(model)
    assert [p.requires_grad for layer in (model[1], model[3]) for p in layer.parameters()] == [True, True, True, False]


@pytest.mark.parametrize("affine", [True, False])
def test_freezing_is_saved_and_loaded(affine, tmp_path):
    model = network()
    bn.freeze(model, affine=affine)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = network()
    assert loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)).missing_keys == []
    for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(twin) == repr(model)
        assert twin[1].frozen_statistics
        assert twin[1].weight.requires_grad is not affine
        twin.train()(X)
        assert twin[1].num_batches_tracked == 0
        bn.unfreeze(twin)
        assert twin[1].weight.requires_grad
        twin(X)
        assert twin[1].num_batches_tracked == 1


def test_a_state_without_it_loads_into_a_frozen_model_and_leaves_it_frozen():
    model, state = network(), network().state_dict()
    bn.freeze(model)
    model.load_state_dict(state)
    assert model[1].frozen_statistics
    assert "1.frozen_statistics" in model.state_dict()


def test_repr_says_what_is_frozen():
    layer = bn.BatchNorm1d(3)
    plain = repr(layer)
    bn.freeze(layer, affine=True)
    assert repr(layer) == plain[:-1] + ", frozen=statistics+affine)"
    bn.unfreeze(layer)
    assert repr(layer) == plain


def test_recalibrate_leaves_frozen_statistics_alone():
    model = network()
    bn.freeze(model[1])
    report = bn.recalibrate(model, [X])
    assert [row.layer for row in report] == ["3"]
    assert model[1].running_mean.abs().max() == 0


def test_a_frozen_model_exports_in_train_as_inference():
    layer = bn.BatchNorm2d(3)
    bn.freeze(layer)
    graph = torch.export.export(layer.train(), (X,)).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls if "batch_norm" in str(node.target)] == [torch.ops.aten.batch_norm.default]
    assert all(node.args[5] is False for node in calls if node.target is torch.ops.aten.batch_norm.default)


def test_a_frozen_model_compiles_to_one_graph():
    layer = bn.BatchNorm2d(3)
    bn.freeze(layer)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(X), layer(X))


def test_single_values_are_no_trouble_for_a_frozen_layer():
    layer = bn.BatchNorm1d(3)
    bn.freeze(layer)
    assert layer.train()(torch.randn(1, 3)).shape == (1, 3)


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (nn.Sequential(nn.BatchNorm1d(3)), {}, TypeError, r"found 0 \(BatchNorm1d\).*from_torch\(model\) first"),
        (nn.SyncBatchNorm(3), {}, TypeError, r"SyncBatchNorm.*convert_sync_batchnorm\(model\) first"),
        (nn.InstanceNorm1d, {}, TypeError, "freeze takes a torch.nn.Module, got the class InstanceNorm1d"),
        (nn.Sequential(bn.BatchNorm1d(3), nn.SyncBatchNorm(3)), {}, TypeError, r"found 1 \(SyncBatchNorm\)"),
        (nn.Linear(3, 3), {}, ValueError, "no batch normalization layer in Linear"),
        (bn.BatchNorm1d(3, track_running_stats=False), {}, ValueError, "no running statistics to keep in the model"),
        (bn.BatchNorm1d(3), {"running_stats": False}, ValueError, "nothing to freeze"),
    ],
)
def test_what_cannot_be_frozen_is_named_and_nothing_is_changed(model, options, error, words):
    before = repr(model)
    with pytest.raises(error, match=words):
        bn.freeze(model, **options)
    assert repr(model) == before


class Stubborn(bn.BatchNorm2d):
    """Cannot be frozen, and says so when the others already are."""

    def set_frozen(self, statistics, affine):
        raise RuntimeError("not this one")


def test_all_layers_are_frozen_or_none():
    model = nn.Sequential(network(), Stubborn(4))
    bn.freeze(model[0][3], affine=True)
    before, wanted = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    text = repr(model)
    with pytest.raises(RuntimeError, match="not this one"):
        bn.freeze(model, affine=True)
    assert repr(model) == text
    assert [p.requires_grad for p in model.parameters()] == wanted
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    bn.unfreeze(model[0])
    assert model[0][3].weight.requires_grad


def test_statistics_that_are_not_tracked_any_more_can_be_frozen():
    """They are there, and evaluation reads them."""
    model = network()
    model(X)
    expected = model.eval()(X)
    model[1].track_running_stats = False
    bn.freeze(model)
    torch.testing.assert_close(model.train()(X), expected)

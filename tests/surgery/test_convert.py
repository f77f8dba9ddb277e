"""from_torch: the same model with our layers, sharing its parameters."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn


def stock():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)
    )


def test_layers_are_ours_parameters_are_the_same_objects_and_the_given_model_keeps_its_own():
    model = stock()
    converted = bn.from_torch(model)
    assert [type(converted[i]) for i in (1, 5)] == [bn.BatchNorm2d, bn.BatchNorm1d]
    assert [type(model[i]) for i in (1, 5)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    for kind in ("named_parameters", "named_buffers"):
        old, new = dict(getattr(model, kind)()), dict(getattr(converted, kind)())
        assert all(new.pop(name) is t for name, t in old.items())
        assert all(name.endswith("skipped_batches") for name in new)  # not saved


def test_trains_and_evaluates_as_before():
    model, x = stock(), torch.randn(6, 3, 6, 6)
    twin = copy.deepcopy(model)
    converted = bn.from_torch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made for the given model, valid for the new one
    y, expected = converted(x), twin(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    optimizer.step()
    torch.testing.assert_close(converted.eval()(x), model.eval()(x))


def test_subclasses_and_other_layers_are_left_alone():
    class Mine(nn.BatchNorm2d):
        pass

    converted = bn.from_torch(nn.Sequential(Mine(3), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3)))
    assert [type(layer) for layer in converted] == [Mine, nn.SyncBatchNorm, nn.InstanceNorm2d]


def test_hooks_modes_and_a_layer_as_the_model():
    layer = nn.BatchNorm1d(3).eval()
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    converted = bn.from_torch(layer)
    assert type(converted) is bn.BatchNorm1d
    assert not converted.training
    converted(torch.randn(2, 3))
    assert seen == [1]


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got list"):
        bn.from_torch([nn.BatchNorm1d(3)])


@pytest.mark.parametrize("verb", [bn.from_torch, bn.to_torch, bn.convert_sync_batchnorm, bn.revert_sync_batchnorm])
def test_weights_that_hooks_compute_before_each_forward(verb):
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv1d(3, 4, 3)), nn.BatchNorm1d(4), nn.utils.spectral_norm(nn.Conv1d(4, 4, 1))
    )
    x = torch.randn(2, 3, 8)
    done = verb(model).eval()
    model.eval()
    with torch.no_grad():
        model[0].weight_g.mul_(2)  # the same object in both
    torch.testing.assert_close(done(x), model(x))
    done(x).sum().backward()
    assert model[0].weight_g.grad is not None


def test_weight_norm_beside_fused_layers():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(3, 4, 3)), nn.BatchNorm1d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8)
    fused = bn.from_torch(model, example=x)
    assert fused.batchnorm_report.of("fused") == ["1"]
    torch.testing.assert_close(fused(x), model(x))

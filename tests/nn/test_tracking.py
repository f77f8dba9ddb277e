"""Which layers have running statistics, update them, read them: as torch's do, after users changed their minds."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.nn.tracking import has_running_statistics, updates_running_statistics

X = torch.randn(16, 3) * 2 + 1


def off(layer):
    """Virtual adversarial training: no updates for a while."""
    layer.track_running_stats = False


def gone(layer):
    """Test-time adaptation: normalize by the batch, whatever the mode."""
    layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None


def buffers_gone(layer):
    """The same by the buffers alone: torch goes on counting."""
    layer.running_mean = layer.running_var = None


def without_count(layer):
    layer.num_batches_tracked = None


def count_deleted(layer):
    del layer.num_batches_tracked


def accumulated(layer):
    with bn.accumulate_statistics(layer):
        return layer(X)


def masked(layer):
    return layer(X[..., None], mask=torch.ones(len(X), 1, dtype=torch.bool))


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer(X),
        masked,
        accumulated,
        lambda layer: bn.recalibrate(layer, [X * 2, X + 1])[0].mean_shift,
        lambda layer: buffers_gone(layer) or layer(X),
        lambda layer: torch.fx.symbolic_trace(layer)(X),
    ],
    ids=["train", "mask", "accumulate", "recalibrate", "no statistics", "fx"],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_count_that_was_deleted_is_as_one_of_none(use, momentum):
    layers = bn.BatchNorm1d(3, momentum=momentum), bn.BatchNorm1d(3, momentum=momentum)
    outputs = []
    for layer, change in zip(layers, (without_count, count_deleted), strict=True):
        change(layer)
        outputs.append(use(layer))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    torch.testing.assert_close(*(dict(layer.state_dict()) for layer in layers), rtol=0, atol=0)


def test_recalibrate_forgets_what_was_skipped_without_a_count_too():
    layer = bn.BatchNorm1d(3)
    without_count(layer)
    layer.skipped_batches[0] = 2
    with pytest.warns(UserWarning, match="2 batches were not finite"):
        bn.recalibrate(layer, [X])
    assert layer.skipped_batches.tolist() == [0, 0, 0]


@pytest.mark.parametrize("change", [lambda layer: None, off, gone, buffers_gone])
@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_layers_do_as_torchs_and_the_predicates_tell(change, built, train):
    layers = bn.BatchNorm1d(3, track_running_stats=built), nn.BatchNorm1d(3, track_running_stats=built)
    outputs = []
    for layer in layers:
        change(layer.train(train))
        before = None if layer.running_mean is None else layer.running_mean.clone()
        outputs.append(layer(X))
        moved = before is not None and not torch.equal(before, layer.running_mean)
        assert moved is (train and updates_running_statistics(layer))
        assert (before is not None) is has_running_statistics(layer)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(dict(layer.state_dict()) for layer in layers))


def test_frozen_statistics_are_not_updated():
    layer = bn.BatchNorm1d(3)
    bn.freeze(layer)
    assert has_running_statistics(layer)
    assert not updates_running_statistics(layer)


@pytest.mark.parametrize("train", [True, False])
def test_renorm_without_statistics_to_correct_towards_is_batch_normalization(train):
    layer = bn.BatchNorm1d(3, statistics=bn.Renorm(schedule=((0, 0), (0, 0)))).train(train)
    gone(layer)
    torch.testing.assert_close(layer(X), nn.BatchNorm1d(3)(X))


def test_renorm_corrects_towards_statistics_that_do_not_move():
    renorm = bn.Renorm(r_max=torch.inf, d_max=torch.inf, schedule=((0, 0), (0, 0)))
    layer = bn.BatchNorm1d(3, statistics=renorm)
    off(layer)
    torch.testing.assert_close(layer(X), nn.BatchNorm1d(3).eval()(X))
    assert layer.num_batches_tracked == layer.renorm_steps == 0


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16])
def test_a_count_that_was_averaged_goes_on_from_there(dtype, momentum):
    layers = bn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    for layer in layers:
        layer.num_batches_tracked = torch.tensor(2.5).to(dtype)
        layer(X)
        layer(X)
    torch.testing.assert_close(*(dict(layer.state_dict()) for layer in layers))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_one_of_the_two_running_statistics_alone_is_an_error(name, training):
    for layer in (bn.BatchNorm1d(3).train(training), nn.BatchNorm1d(3).train(training)):
        setattr(layer, name, None)
        with pytest.raises((ValueError, RuntimeError), match=name):
            layer(X)

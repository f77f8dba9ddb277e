"""Recalibration and accumulation of layers whose training statistics are not those of a plain batch."""

import copy

import pytest
import torch
from processes import on_ranks
from torch import nn

import batchnorm as bn

NOW = ((0, 0), (0, 0))
SOURCES = [bn.Ghost(4), bn.Renorm(2, 1, NOW), bn.Renorm()]


def rows(x, mask):
    return x.movedim(1, -1)[mask]


@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_recalibrate_finds_the_population_and_leaves_the_source(source):
    x = torch.randn(50, 3, 5, dtype=torch.float64) * 2 + 1
    layer = bn.BatchNorm1d(3, dtype=torch.float64, statistics=source)
    layer(x)
    steps = copy.deepcopy(layer._buffers.get("renorm_steps"))
    bn.recalibrate(layer, x.split(8))
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.running_var, x.transpose(0, 1).flatten(1).var(1), rtol=1e-12, atol=0)
    assert layer.statistics == source
    assert layer._buffers.get("renorm_steps") == steps


def test_a_layer_behind_renorm_is_told_what_it_saw_in_training():
    x = torch.randn(8, 3, dtype=torch.float64) * 3 + 1
    model = nn.Sequential(bn.BatchNorm1d(3, statistics=bn.Renorm(9, 9, NOW)), bn.BatchNorm1d(3)).double()
    model[0].running_mean.normal_(), model[0].running_var.uniform_(0.5, 2)
    seen = torch.cat([copy.deepcopy(model[0])(part) for part in x.split(2)])
    bn.recalibrate(model, x.split(2))
    torch.testing.assert_close(model[1].running_mean, seen.mean(0))
    torch.testing.assert_close(model[1].running_var, seen.var(0))
    torch.testing.assert_close(model[0].running_var, x.var(0))
    assert model[0].renorm_steps == 0
    model[0].running_mean.fill_(torch.nan)  # nothing to correct towards
    bn.recalibrate(model, x.split(2))
    assert model[1].running_var.isfinite().all()


def test_recalibrate_counts_the_places_that_a_mask_selects():
    x, mask = torch.randn(50, 3, 5, dtype=torch.float64), torch.rand(50, 5) > 0.4
    mask[8:16] = False
    mask[16:24] = False
    mask[17, 2] = True  # a batch with one place that counts
    layer = bn.BatchNorm1d(3, dtype=torch.float64)
    batches = list(zip(x.split(8), mask.split(8), strict=True))
    (row,) = bn.recalibrate(layer, batches, forward=lambda layer, batch: layer(batch[0], mask=batch[1]))
    assert row.values == mask.sum()
    torch.testing.assert_close(layer.running_mean, rows(x, mask).mean(0), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(layer.running_var, rows(x, mask).var(0), rtol=1e-12, atol=0)


def test_accumulation_with_masks():
    x, mask = torch.randn(32, 3, 5), torch.rand(32, 5) > 0.4
    layer, whole = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    with bn.accumulate_statistics(layer):
        for part, places in zip(x.split(8), mask.split(8), strict=True):
            layer(part, mask=places)
    whole(x, mask=mask)
    torch.testing.assert_close(layer.state_dict(), whole.state_dict())


def test_one_value_in_all_moves_the_mean_alone():
    x, mask = torch.randn(4, 3, 5), torch.zeros(4, 5, dtype=torch.bool)
    mask[2, 1] = True
    layer = bn.BatchNorm1d(3)
    with bn.accumulate_statistics(layer):
        layer(x, mask=mask)
    torch.testing.assert_close(layer.running_mean, 0.1 * x[2, :, 1])
    assert (layer.running_var == 1).all()
    assert not layer.skipped_batches.any()
    with pytest.raises(ValueError, match="the BatchNorm1d saw a single value per channel, which has no variance"):
        bn.recalibrate(layer, [x], forward=lambda layer, batch: layer(batch, mask=mask))
    batches = [(x, mask), (x, ~mask)]
    with pytest.raises(ValueError, match="or estimator='pooled' where only some have one value"):
        bn.recalibrate(layer, batches, forward=lambda layer, b: layer(b[0], mask=b[1]), estimator="batch_mean")


def test_accumulation_with_renorm_corrects_towards_what_there_was():
    x = torch.randn(32, 3, 5)
    layer = bn.BatchNorm1d(3, statistics=bn.Renorm(2, 1, ((0, 0), (0, 4))))
    layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    each, start = [copy.deepcopy(layer)(part) for part in x.split(8)], copy.deepcopy(layer)
    with bn.accumulate_statistics(layer):
        found = [layer(part) for part in x.split(8)]
    torch.testing.assert_close(found, each)
    assert layer.renorm_steps == 1
    start.statistics = bn.Batch()
    start(x)
    torch.testing.assert_close(layer.running_var, start.running_var)
    layer(x)  # and goes on as ever
    assert layer.renorm_steps == 2


def of_ranks(rank, world, sizes):
    x = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = bn.convert_sync_batchnorm(nn.BatchNorm1d(3, dtype=torch.float64))
    with bn.accumulate_statistics(layer):
        for part in x.split(12):
            layer(part.split(sizes)[rank])
    accumulated = copy.deepcopy(layer.state_dict())
    bn.recalibrate(layer, x[12:].split(4) if rank else [x])
    alone = copy.deepcopy(layer.state_dict())
    bn.recalibrate(
        layer, x.split(12)[rank].split(4) if rank == 0 else [x[12:]], process_group=torch.distributed.group.WORLD
    )
    return x, accumulated, alone, layer.state_dict(), layer.statistics


def test_synchronized_layers():
    for rank, (x, accumulated, alone, pooled, source) in enumerate(on_ranks(2, of_ranks, (9, 3))):
        whole = bn.BatchNorm1d(3, dtype=torch.float64)
        whole(x)
        torch.testing.assert_close(accumulated, whole.state_dict())
        mine = x[12:] if rank else x
        torch.testing.assert_close(alone["running_var"], mine.var(0))  # no communication
        torch.testing.assert_close(pooled["running_mean"], x.mean(0))
        torch.testing.assert_close(pooled["running_var"], x.var(0))
        assert source == bn.Synced()

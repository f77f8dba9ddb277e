"""population.py: the population statistics are those of all values, and nothing else changes."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from torch import Tensor, nn

import batchnorm as bn

LAYERS = [nn.BatchNorm1d, bn.BatchNorm1d]


def network(layer: type[nn.Module] = bn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), layer(6, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6), layer(6)
    ).double()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("layer", LAYERS)
def test_statistics_are_the_mean_and_unbiased_variance_of_all_values(layer: type[nn.Module]) -> None:
    """Algorithm 2; PEERS row 20: batches of different sizes count by their values."""
    model, x = network(layer), torch.randn(60, 4, dtype=torch.float64) * 3 + 5
    bn.recalibrate(model, x.split([10, 20, 30]))
    hidden = model[0](x)
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].running_var, hidden.var(0, correction=1), rtol=1e-12, atol=1e-12)
    assert model[1].num_batches_tracked == 3


def test_another_split_of_the_same_data_gives_the_same_statistics() -> None:
    """For the first layer; a layer above it sees inputs that depend on the batch."""
    x = torch.randn(64, 4, dtype=torch.float64)
    first, second = network(), network()
    second.load_state_dict(first.state_dict())
    bn.recalibrate(first, x.split(8))
    bn.recalibrate(second, x.split(27))
    torch.testing.assert_close(first[1].running_var, second[1].running_var, rtol=1e-12, atol=0)


def test_large_mean_does_not_cancel() -> None:
    """PEERS row 19: E[x^2] - E[x]^2 would leave nothing of this variance."""
    layer = bn.BatchNorm1d(3).double()
    x = torch.randn(100, 3, dtype=torch.float64) + 1e8
    bn.recalibrate(layer, x.split(10))
    torch.testing.assert_close(layer.running_var, x.var(0, correction=1), rtol=1e-6, atol=0)


def test_places_count_as_values_and_convolutions_work() -> None:
    layer, x = bn.BatchNorm2d(3).double(), torch.randn(10, 3, 5, 4, dtype=torch.float64)
    report = bn.recalibrate(layer, x.split(4))
    torch.testing.assert_close(layer.running_var, x.transpose(0, 1).flatten(1).var(1, correction=1))
    assert report[0].values == 10 * 5 * 4


@pytest.mark.parametrize("training", [True, False])
def test_everything_but_the_statistics_is_as_before(training: bool) -> None:
    """Modes (mixed ones too), momentum, hooks, weights, random numbers: dropout is off during the pass."""
    model = network().train(training)
    model[1].eval()
    before, modes = state(model), [m.training for m in model.modules()]
    torch.manual_seed(7)
    bn.recalibrate(model, torch.randn(30, 4, dtype=torch.float64).split(10))
    after_pass = torch.rand(1)
    torch.manual_seed(7)
    torch.randn(30, 4, dtype=torch.float64)
    assert torch.equal(after_pass, torch.rand(1))
    assert [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[5].momentum) == (0.3, 0.1)
    assert not any(m._forward_hooks for m in model.modules())
    same = [key for key, value in state(model).items() if torch.equal(value, before[key])]
    assert same == [key for key in before if "running" not in key and "batches" not in key]


def test_nan_statistics_are_mended() -> None:
    """PEERS row 11: one inf batch must not stay for ever."""
    for layer in (nn.BatchNorm1d(2), bn.BatchNorm1d(2)):
        layer.running_mean.fill_(float("nan"))
        layer.running_var.fill_(float("inf"))
        x = torch.randn(50, 2)
        bn.recalibrate(layer, [x])
        torch.testing.assert_close(layer.running_mean, x.mean(0))
        torch.testing.assert_close(layer.running_var, x.var(0))


def test_an_exception_in_the_middle_leaves_the_model_untouched() -> None:
    """PEERS row 20."""

    def batches() -> Iterator[Tensor]:
        yield torch.randn(10, 4, dtype=torch.float64)
        raise OSError("the disk is gone")

    model = network()
    before = state(model)
    with pytest.raises(OSError, match="the disk is gone"):
        bn.recalibrate(model, batches())
    assert_same(state(model), before)
    assert model.training
    assert model[1].momentum == 0.3
    assert not any(m._forward_hooks for m in model.modules())


def test_forward_and_max_batches() -> None:
    model, x = network(), torch.randn(40, 4, dtype=torch.float64)
    seen = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        seen.append(batch)
        model(batch["image"])

    bn.recalibrate(model, ({"image": part} for part in x.split(10)), forward=forward, max_batches=2)
    assert len(seen) == 2
    torch.testing.assert_close(model[1].running_mean, model[0](x[:20]).mean(0))


def test_layer_used_twice_pools_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bn.BatchNorm1d(2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x + 1)

    model, x = Twice(), torch.randn(20, 2, dtype=torch.float64)
    bn.recalibrate(model, [x])
    torch.testing.assert_close(model.norm.running_mean, torch.cat([x, 3 * x + 1]).mean(0))


def test_layers_without_statistics_or_not_reached_are_left_alone() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = bn.BatchNorm1d(2), bn.BatchNorm1d(2)
            self.bare = bn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.bare(self.used(x))

    model = Partly()
    model.unused.running_mean.fill_(4)
    report = bn.recalibrate(model, [torch.randn(20, 2)])
    assert [row.layer for row in report] == ["used"]
    assert model.unused.running_mean.tolist() == [4, 4]


def test_report_says_how_far_the_moving_average_was_off() -> None:
    layer, x = bn.BatchNorm1d(1).double(), torch.randn(4000, 1, dtype=torch.float64) * 2 + 6
    row = bn.recalibrate(layer, [x])[0]
    assert row.mean_shift == pytest.approx((x.mean() / x.std()).item())  # the buffers were 0 and 1
    assert row.variance_ratio == pytest.approx((1 / x.var().item(),) * 2)


def test_broken_eval_mode_is_mended() -> None:
    """PEERS row 1: good in train, bad in eval, since the moving average lags."""
    model, x = network(), torch.randn(500, 4, dtype=torch.float64) * 10 + 50
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1e-4
    target = copy.deepcopy(model)
    for part in x.split(50):
        model(part)
    target[3].eval()
    train_output = target(x)
    assert (model.eval()(x) - train_output).abs().max() > 1
    bn.recalibrate(model, [x])
    torch.testing.assert_close(model(x), train_output, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {"upstream": "population"}, "batches yielded nothing"),
        (iter([]), {"upstream": "population"}, "several times, got an iterator"),
        ([], {"upstream": "running"}, 'unknown upstream "running". Known: batch, population'),
        ([], {"estimator": "ema"}, 'unknown estimator "ema". Known: pooled, batch_mean'),
        ([], {"process_group": object()}, "init_process_group"),
        ([], {}, "batches yielded nothing"),
        ([torch.zeros(4, 4).double()], {"max_batches": 0}, r"max_batches must be a whole number, at least 1 \(got 0\)"),
        ([torch.zeros(4, 4).double()], {"max_batches": 2.5}, "max_batches must be a whole number"),
        ([torch.zeros(0, 4).double()], {}, "none of the 2 layers of batch normalization saw a value"),
        ([torch.zeros(4, 4).double()], {"forward": lambda model, x: network()(x)}, "runs another model"),
        (
            [torch.zeros(1, 4).double()],
            {},
            "batch 1 gives .* one value per channel, .*Expected more than 1 value per",
        ),
    ],
)
def test_refused_with_nothing_changed(batches: list[Tensor], options: dict[str, object], message: str) -> None:
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        bn.recalibrate(model, batches, **options)
    assert_same(state(model), before)


def test_a_model_without_batch_normalization_has_no_rows() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)).double()
    for upstream in ("batch", "population"):
        assert bn.recalibrate(model, [torch.randn(5, 4).double()], upstream=upstream) == []
    with bn.accumulate_statistics(model):
        model(torch.randn(5, 4).double())


# ---- estimators, upstream, several processes -------------------------------------------------------------------------


def test_batch_mean_is_algorithm_2_to_the_letter() -> None:
    layer, x = bn.BatchNorm1d(3).double(), torch.randn(60, 3, dtype=torch.float64)
    batches = x.split(20)
    bn.recalibrate(layer, batches, estimator="batch_mean")
    torch.testing.assert_close(layer.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert layer.num_batches_tracked == 3


class Branches(nn.Module):
    """Layers one after the other, side by side, over a skip connection, in an order that is not that of the modules."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.last, self.left, self.right, self.first = (layer(4) for _ in range(4))
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        both = torch.cat([self.left(x)[:, :2], self.right(self.mix(x) ** 2)[:, 2:]], 1)
        return self.last(self.mix(both) + x)


@pytest.mark.parametrize("layer", LAYERS)
def test_with_population_upstream_no_layer_depends_on_the_split(
    layer: type[nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    x, model = torch.randn(96, 4, dtype=torch.float64) * 2 + 1, Branches(layer).double()
    results = []
    for size in (96, 32, 7):
        twin = copy.deepcopy(model)
        report = bn.recalibrate(twin, x.split(size), upstream="population")
        assert [row.layer for row in report] == ["last", "left", "right", "first"]
        results.append({key: value for key, value in state(twin).items() if "batches" not in key})
        assert "3 times" in capsys.readouterr().err  # left and right in one pass
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)
    twin.eval()
    hidden = twin.first(x).relu()
    torch.testing.assert_close(twin.left.running_mean, hidden.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin.right.running_var, (twin.mix(hidden) ** 2).var(0), rtol=1e-12, atol=1e-12)


def test_with_batch_upstream_the_second_layer_does_depend_on_it() -> None:  # why the other exists
    x, model = torch.randn(96, 4, dtype=torch.float64), Branches(bn.BatchNorm1d).double()
    variances = []
    for size in (96, 7):
        bn.recalibrate(model, x.split(size))
        variances.append(model.left.running_var.clone())
    assert not torch.allclose(*variances, rtol=1e-3)


def test_batches_of_a_dataloader_with_labels_are_taken_as_they_come() -> None:
    x = torch.randn(40, 4, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, torch.zeros(40))
    model = network()
    bn.recalibrate(model, torch.utils.data.DataLoader(data, batch_size=10, shuffle=True), device="cpu", progress=True)
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))


def test_random_numbers_are_as_before() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model, x = nn.Sequential(Noisy(), bn.BatchNorm1d(3)), torch.randn(20, 3)
    torch.manual_seed(5)
    bn.recalibrate(model, [x])
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


def test_averaged_weights_get_their_statistics() -> None:
    model, x = network(), torch.randn(64, 4, dtype=torch.float64)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for p in model.parameters():
        p.data.mul_(-3)
    averaged.update_parameters(model)
    bn.recalibrate(averaged, [x])
    torch.testing.assert_close(averaged.module[1].running_mean, averaged.module[0](x).mean(0))


def test_a_nan_batch_before_does_not_stay() -> None:
    layer = bn.BatchNorm1d(2)
    layer(torch.full((4, 2), torch.nan))
    bn.recalibrate(layer, [torch.randn(9, 2)])
    assert layer.running_var.isfinite().all()


@pytest.mark.parametrize("estimator", ["pooled", "batch_mean"])
def test_many_batches_of_all_sizes_with_layers_that_some_do_not_reach(estimator: str) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = bn.BatchNorm1d(4).double(), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.always(input=x)
            return self.sometimes(x.float()) if len(x) > 9 else x

    model = Sometimes()
    batches = torch.randn(1000, 4, dtype=torch.float64).split([2 + i % 15 for i in range(110)] + [24, 11])
    reached = [x for x in batches if len(x) > 9]
    report = bn.recalibrate(model, batches, estimator=estimator)
    assert [row.values for row in report] == [1000, sum(map(len, reached))]
    assert [model.always.num_batches_tracked, model.sometimes.num_batches_tracked] == [len(batches), len(reached)]
    for layer, seen, rtol in ((model.always, batches, 1e-12), (model.sometimes, reached, 1e-5)):
        sets = [torch.cat(seen)] if estimator == "pooled" else seen
        expected = torch.stack([torch.stack([x.mean(0), x.var(0)]) for x in sets]).mean(0)
        found = torch.stack([layer.running_mean, layer.running_var]).double()
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("layer", LAYERS)
def test_under_torch_compile(layer: type[nn.Module]) -> None:
    model, x = network(layer), torch.randn(120, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    bn.recalibrate(torch.compile(model, fullgraph=True, backend="aot_eager"), x.split(10))  # more than may recompile
    bn.recalibrate(twin, x.split(10))
    torch.testing.assert_close(state(model), state(twin))


def _rank(rank: int, ranks: int, sizes: list[int], estimator: str) -> tuple[dict[str, Tensor], Any]:
    torch.manual_seed(0)
    model, x = network(), torch.randn(60, 4, dtype=torch.float64)
    mine = x.split(sizes)[rank]
    batches = mine.split(10) if len(mine) else []
    report = bn.recalibrate(model, batches, estimator=estimator, upstream="population", process_group=dist.group.WORLD)
    return model.state_dict(), report


@pytest.mark.parametrize(("estimator", "sizes"), [("pooled", [40, 20, 0]), ("batch_mean", [20, 40])], ids=str)
def test_values_of_all_ranks_are_pooled(estimator: str, sizes: list[int]) -> None:
    ranks = on_ranks(len(sizes), _rank, sizes, estimator)
    torch.manual_seed(0)
    model, x = network(), torch.randn(60, 4, dtype=torch.float64)
    report = bn.recalibrate(model, x.split(10), estimator=estimator, upstream="population")
    for state_of_rank, report_of_rank in ranks:
        torch.testing.assert_close(dict(state_of_rank), dict(model.state_dict()), rtol=1e-12, atol=1e-12)
        assert all(torch.equal(state_of_rank[key], ranks[0][0][key]) for key in state_of_rank)  # the same bits
        assert [row.values for row in report_of_rank] == [row.values for row in report]

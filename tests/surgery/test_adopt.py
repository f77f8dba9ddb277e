"""Subclasses of torch's layers: ours where that is certain or was checked, with the way back; else a reason."""

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm as bn
from tests.surgery.test_fuse import assert_back, same, shaken

X = torch.randn(3, 4, 6, 6, dtype=torch.float64)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's."""

    def __init__(self, channels, act, drop=None):
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class OtherDefaults(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-3, momentum=0.01)


class Halved(BatchNormAct2d):
    def forward(self, x):
        return super().forward(x) / 2


class NoisyStatistics(BatchNormAct2d):
    """The same outputs, other running statistics."""

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.running_mean.data.add_(1)
        return y


class Functional(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Scaled(BatchNormAct2d):
    def __init__(self, channels, act):
        super().__init__(channels, act)
        self.scale = nn.Parameter(torch.ones(()))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def network():
    return shaken(
        nn.Sequential(
            nn.Conv2d(4, 4, 1), BatchNormAct2d(4, nn.SiLU()), nn.Conv2d(4, 4, 1), BatchNormAct2d(4, nn.LeakyReLU(0.2))
        )
    )


@pytest.mark.parametrize("first", [lambda model: model, copy.deepcopy, pickled], ids=["itself", "copied", "pickled"])
def test_batch_normalization_with_an_activation_is_ours_and_goes_back(first):
    model = network()
    fused = first(bn.from_torch(model, example=X))
    assert [tuple(row) for row in fused.batchnorm_report] == [(name, "fused", "with its own act") for name in "13"]
    assert [type(fused[i]) for i in (1, 3)] == [bn.BatchNorm2d] * 2
    assert [fused[i].activation for i in (1, 3)] == ["silu", ("leaky_relu", 0.2)]
    assert fused.state_dict().keys() == model.state_dict().keys()
    same(model, fused, X)
    back = bn.to_torch(fused)
    assert repr(back) == repr(model)
    assert [type(back[i]) for i in (1, 3)] == [BatchNormAct2d] * 2
    same(model, back, X)
    assert fused[1].eps == 1e-5  # read by other people's code
    assert [type(fused[1]), type(fused[3])] == [BatchNormAct2d, bn.BatchNorm2d]
    same(model, fused, X)


def test_to_torch_shares_tensors_with_what_was_given():
    model = network()
    assert_back(model, bn.from_torch(model, example=X))


def test_a_subclass_that_only_has_other_defaults_is_torchs_layer():
    model = shaken(nn.Sequential(OtherDefaults(4), nn.ReLU()))
    fused = bn.from_torch(model, example=X)
    assert [tuple(row) for row in fused.batchnorm_report] == [("0", "fused", "with 1")]
    same(model, fused, X)
    assert_back(model, fused)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (
            BatchNormAct2d(4, nn.Softplus()),
            "it has act, a Softplus; build it as batch normalization",
        ),
        (BatchNormAct2d(4, nn.ReLU(), nn.Dropout(0.1)), "it has drop, a Dropout; build it as"),
        (Functional(4), "it has no activation as a child; build it as"),
        (Scaled(4, nn.ReLU()), "it has scale; build it as"),
        (Halved(4, nn.ReLU()), "as batch normalization with its act it gives other values"),
        (NoisyStatistics(4, nn.ReLU()), "as batch normalization with its act it gives other values"),
        (nn.SyncBatchNorm(4), "none of torch's BatchNorm1d, 2d, 3d"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else "",
)
def test_others_are_left_alone_with_their_name_and_a_reason(layer, why):
    model = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.BatchNorm2d(4), nn.ReLU())).eval()
    fused = bn.from_torch(model, example=X)
    left, other = fused.batchnorm_report
    assert (left.layer, left.done) == ("1", "left alone")
    assert f"{type(layer).__module__}.{type(layer).__qualname__}" in left.why
    assert why in left.why
    assert other.done == "fused"
    assert type(fused[1]) is type(layer)
    torch.testing.assert_close(fused(X), model(X))
    assert_back(model, fused)


def test_without_an_example_there_is_a_row_for_each_layer_too():
    report = bn.from_torch(nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4, nn.ReLU()))).batchnorm_report
    assert tuple(report[0]) == ("0", "replaced", "by batchnorm.BatchNorm2d")
    assert report[1].why.endswith("BatchNormAct2d is a class of its own, which may do more")


def test_the_report_of_accelerate_is_kept_beside():
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    fused = bn.from_torch(bn.accelerate(plain, torch.randn(3, 4)), example=torch.randn(3, 4))
    assert [row.layer for row in fused.batchnorm_report] == ["0", "2", "0.batch_norm"]

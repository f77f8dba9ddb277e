"""Code that reads a layer's eps, to fold or convert it without its activation, is stopped; nobody else is."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.mkldnn import to_mkldnn

import batchnorm as bn

X = torch.randn(2, 3, 8, 8)


def folds_by_hand(conv, norm):
    return conv.weight * (norm.weight / torch.sqrt(norm.eps + norm.running_var)).reshape(-1, 1, 1, 1)


def freezes_by_hand(conv, norm):
    frozen = nn.BatchNorm2d(norm.num_features)
    frozen.eps = norm.eps
    return frozen


@pytest.mark.parametrize(
    "reads",
    [
        fuse_conv_bn_eval,
        folds_by_hand,
        freezes_by_hand,
        lambda conv, norm: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(conv, norm)),
        lambda conv, norm: to_mkldnn(nn.Sequential(conv, norm)),
    ],
    ids=["torch's fold", "a fold by hand", "a conversion by hand", "SyncBatchNorm", "mkldnn"],
)
def test_code_that_would_drop_the_activation_is_stopped(reads):
    conv = nn.Conv2d(3, 4, 3).eval()
    reads(copy.deepcopy(conv), bn.BatchNorm2d(4).eval())
    with pytest.raises(TypeError, match=r"eps of BatchNorm2d\(activation='relu'\) cannot be read.*layer\.epsilon"):
        reads(conv, bn.BatchNorm2d(4, activation="relu").eval())


def test_eps_is_torchs_otherwise():
    layer = bn.BatchNorm2d(3, eps=1e-3)
    assert layer.eps == layer.epsilon == 1e-3
    layer.eps = 0.5
    twin = copy.deepcopy(layer)
    assert repr(twin) == repr(nn.BatchNorm2d(3, eps=0.5))
    torch.testing.assert_close(twin(X), nn.BatchNorm2d(3, eps=0.5)(X))
    assert dict(inspect.getmembers(layer))["eps"] == 0.5
    layer = bn.BatchNorm2d(3, activation="relu")
    layer.eps = 0.5
    assert layer.epsilon == 0.5
    assert "eps=0.5" in repr(layer)


class Owner:
    def __init__(self):
        self.times = 0

    def hand_back(self):
        self.times += 1


def test_an_activation_from_the_network_goes_back_once():
    layer, owners = bn.BatchNorm2d(3), (Owner(), Owner())
    layer.activation, layer.fused, layer.taken_from = "relu", True, owners
    assert layer.epsilon == 1e-5  # which reads nothing off
    assert layer.activation == "relu"
    assert layer.eps == 1e-5
    assert (layer.activation, layer.fused, layer.taken_from) == (None, False, ())
    assert layer.eps == 1e-5
    assert [owner.times for owner in owners] == [1, 1]

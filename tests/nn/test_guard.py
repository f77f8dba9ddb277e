"""What is not finite never enters the running statistics, and that is said."""

import copy
import os
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import batchnorm as bn
from batchnorm import ops

X = torch.randn(8, 3, 4, 4)


def broken(value: float = torch.inf) -> torch.Tensor:
    """A batch with one such value, in channel 1."""
    x = X.clone()
    x[2, 1, 3, 3] = value
    return x


@pytest.fixture(params=["kernels", "aten", "compiled"])
def call(request, monkeypatch):
    """A way to run a layer: on our kernels, on torch's, and under torch.compile."""
    if request.param == "aten":
        monkeypatch.setattr(ops, "has_kernel", lambda *arguments: False)

    def run(layer, x):
        if request.param == "compiled":
            return torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        return layer(x)

    return run


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_the_other_channels_go_on_and_this_one_waits(call, momentum, value):
    layer, clean = bn.BatchNorm2d(3, momentum=momentum), bn.BatchNorm2d(3, momentum=momentum)
    for x in (X, broken(value), X * 2 + 1):
        y = call(layer, x)
        assert bool(y.isfinite().all()) is bool(x.isfinite().all())  # it is normalized as it is
    for x in (X, X * 2 + 1):
        call(clean, x)
    torch.testing.assert_close(layer.running_mean[1], clean.running_mean[1])
    torch.testing.assert_close(layer.running_var[1], clean.running_var[1])
    assert layer.running_mean.isfinite().all()
    assert (layer.running_var > 0).all()
    assert layer.skipped_batches.tolist() == [0, 1, 0]
    if momentum is None:  # one count for all channels: the batch enters in none, and is not counted
        torch.testing.assert_close(layer.running_mean, clean.running_mean)
        torch.testing.assert_close(layer.running_var, clean.running_var)
    assert layer.num_batches_tracked == (2 if momentum is None else 3)


def test_what_the_dtype_of_the_statistics_does_not_hold_is_left_out_too():
    layer = bn.BatchNorm2d(3).half()
    layer(torch.randn(8, 3, 4, 4).half() * 3000)  # a variance of 9e6
    assert layer.running_var.eq(1).all()
    assert layer.skipped_batches.eq(1).all()


def test_it_is_said_once_when_somebody_looks():
    for look in (lambda m: m.eval(), lambda m: m.state_dict(), lambda m: bn.recalibrate(m, [X])):
        model = nn.Sequential(bn.BatchNorm2d(3))
        model(broken())
        with pytest.warns(UserWarning, match=r"1 batches were not finite in 1 channels of BatchNorm2d\(3\)"):
            look(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.train().eval()
            model.state_dict()


def test_a_layer_that_saw_nothing_of_it_says_nothing_and_saves_nothing_more():
    layer = bn.BatchNorm2d(3)
    layer(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(layer.eval().state_dict()) == list(nn.BatchNorm2d(3).state_dict())


def test_layers_of_a_converted_model_are_guarded():
    model = bn.from_torch(nn.Sequential(nn.BatchNorm2d(3)))
    copy.deepcopy(model)(broken())
    model(broken())
    assert model[0].running_var.isfinite().all()
    assert model[0].skipped_batches.tolist() == [0, 1, 0]


def test_in_forward_mode():
    layer = bn.BatchNorm2d(3)
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(broken(), X))
    assert layer.skipped_batches.tolist() == [0, 1, 0]
    assert layer.running_mean.isfinite().all()


def test_under_torch_func_where_buffers_are_arguments():
    layer = bn.BatchNorm2d(3)
    saved = {name: t.clone() for name, t in layer.state_dict().items()}  # not the counter

    def loss(x):
        state = {name: t.clone() for name, t in saved.items()}
        y = torch.func.functional_call(layer, state, x)
        return y[:, 0].sum(), (state["running_mean"], state["running_var"])

    _, statistics = torch.func.grad(loss, has_aux=True)(broken())
    assert all(t.isfinite().all() for t in statistics)
    assert not layer.skipped_batches.any()


def test_the_function_is_torchs():
    mean, var = torch.zeros(3), torch.ones(3)
    bn.batch_norm(broken(), mean, var, training=True)
    assert mean.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, bn.BatchNorm2d])
def test_recalibrate_refuses_such_batches_and_changes_nothing(layer):
    model = nn.Sequential(layer(3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layer 0 saw values that are not finite"):
        bn.recalibrate(model, [X, broken()])
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_the_kernels_are_what_is_tested():
    served = ops.dtypes_served("cpu")
    assert served or os.environ.get("BATCHNORM_TRITON_ON_CPU")


@pytest.mark.parametrize("name", ["kernels", "aten"])
def test_a_loaded_average_does_not_count_what_was_skipped_before(name, monkeypatch):
    if name == "aten":
        monkeypatch.setattr(ops, "has_kernel", lambda *arguments: False)
    layer = bn.BatchNorm1d(3, momentum=None)
    for _ in range(3):
        layer(torch.full((4, 3), torch.inf))
    layer.load_state_dict(torch.nn.BatchNorm1d(3).state_dict())
    x = torch.randn(4, 3)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))
    layer.num_batches_tracked.zero_()  # by hand, where 3 were skipped
    layer.skipped_batches.fill_(3)
    layer(x)
    assert layer.running_var.isfinite().all()

"""Torch's tools and others walk over a layer's state in parallel, average, slice, cast, allocate it: it stays right."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

X = torch.randn(4, 16, 3, generator=torch.Generator().manual_seed(1)) * 2 + 1  # four batches


def network(**options):
    return nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, **options))


def mean_of(batches):
    return torch.stack([x.double().mean(0) for x in batches]).mean(0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", [bn.Batch(), bn.Ghost(4)])
def test_buffers_are_torchs_also_after_training_and_freezing(momentum, statistics):
    layer, stock = bn.BatchNorm1d(3, momentum=momentum, statistics=statistics), nn.BatchNorm1d(3)
    layer(X[0])
    layer(X[1] * torch.inf)
    bn.freeze(layer, affine=True)
    assert [name for name, _ in layer.named_buffers()] == [name for name, _ in stock.named_buffers()]


def test_an_average_made_before_the_model_is_frozen_goes_on():
    model = nn.Sequential(nn.Linear(3, 5), bn.BatchNorm1d(5), nn.Linear(5, 4), bn.BatchNorm1d(4))
    averages = AveragedModel(model), AveragedModel(model, use_buffers=True)
    model(X[0])
    bn.freeze(model)
    for average in averages:
        average.update_parameters(model)
        for name, t in model.named_buffers():
            torch.testing.assert_close(average.module.get_buffer(name), t)


def equal_clients(state):
    return {key: sum(1 / 13 * t for _ in range(13)) for key, t in state.items()}


def ema(state):
    average = {key: t.clone().float() for key, t in state.items()}
    for _ in range(3):
        for key, t in state.items():
            average[key].lerp_(t.float(), 0.0005)
    return {key: t.to(state[key].dtype) for key, t in average.items()}


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("running_stats", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "through",
    [
        equal_clients,
        ema,
        saved,
        lambda state: {key: t.half() for key, t in state.items()},
        lambda state: {key: t.double() for key, t in state.items()},
        lambda state: {key: t.numpy().copy() for key, t in state.items()},
        lambda state: {key: t[torch.arange(len(t))] if t.dim() else t for key, t in state.items()},
    ],
    ids=["FedAvg", "EMA", "saved", "half", "double", "numpy", "indexed"],
)
def test_what_is_frozen_survives_what_people_do_with_states(through, running_stats, affine):
    if not (running_stats or affine):
        return
    model, loaded = network(), network()
    model[1].bias.requires_grad_(False)  # the user's own choice
    bn.freeze(model, running_stats=running_stats, affine=affine)
    state = {key: torch.as_tensor(t) for key, t in through(model.state_dict()).items()}
    loaded[1].bias.requires_grad_(False)
    loaded.load_state_dict(state)
    assert (loaded[1].frozen_statistics, loaded[1].frozen_affine) == (running_stats, affine)
    bn.unfreeze(loaded)
    assert [p.requires_grad for p in loaded[1].parameters()] == [True, False]


def test_an_average_of_average_models_keeps_what_is_frozen():
    model = network()
    bn.freeze(model, affine=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9995), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    loaded = network()
    loaded.load_state_dict(average.module.state_dict())
    assert loaded[1].frozen_statistics
    assert loaded[1].frozen_affine


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_from_the_meta_device(assign, frozen):
    model = network(momentum=None)
    model(X[0])
    if frozen:
        bn.freeze(model)
    with torch.device("meta"):
        empty = network(momentum=None)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    for each in (model, empty):
        each(X[1])
    torch.testing.assert_close(dict(empty.state_dict()), dict(model.state_dict()))
    assert empty[1].frozen_statistics is frozen


def test_memory_that_nobody_filled_is_not_read(monkeypatch):
    """As transformers' from_pretrained leaves it: tensors put in place one by one, no loading by the module."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):
            layer = bn.BatchNorm1d(3, momentum=None)
        layer.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, t in bn.BatchNorm1d(3).state_dict().items():
        (layer._parameters if name in layer._parameters else layer._buffers)[name].data = t
    for x in X:
        layer(x)
    torch.testing.assert_close(layer.running_mean.double(), mean_of(X))
    assert layer.skipped_batches.tolist() == [0, 0, 0]


def one_by_one(layer, state):
    """As from_pretrained does it."""
    for name, t in list(layer.named_buffers()):
        setattr(layer, name, state[name] if name in state else torch.empty_like(t, device="cpu"))


def all_at_once(layer, state):
    layer.to_empty(device="cpu").load_state_dict(state)


WAYS = [one_by_one, all_at_once, lambda layer, state: layer.load_state_dict(state, assign=True)]


@pytest.mark.parametrize("start", ["meta", "moved to meta", "copied", "saved", "inside a model"])
@pytest.mark.parametrize("fill", WAYS, ids=["one by one", "to_empty", "assign"])
def test_steps_that_a_checkpoint_lacks_are_zero_from_the_meta_device(fill, start, monkeypatch):
    with torch.device("cpu" if start == "moved to meta" else "meta"):
        layer = bn.BatchNorm1d(3, affine=False, statistics=bn.Renorm())
    if start == "moved to meta":
        layer.renorm_steps.fill_(7)
        layer.to("meta")
    elif start == "copied":
        layer = copy.deepcopy(layer)
    elif start == "saved":
        layer = pickle.loads(pickle.dumps(layer))
    elif start == "inside a model":
        torch.nn.Sequential(layer).bfloat16().to("meta").float()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # memory that nobody filled is the largest integer then
    try:
        fill(layer, bn.BatchNorm1d(3, affine=False).state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert type(layer.renorm_steps) is torch.Tensor
    assert layer.renorm_steps == 0
    layer(X[0].float())
    assert layer.renorm_steps == 1


def test_steps_stay_where_memory_is_made_anew():
    layer, plain = bn.BatchNorm1d(3, statistics=bn.Renorm()), bn.BatchNorm1d(3)
    layer.renorm_steps.fill_(7)
    layer.to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert layer.share_memory().double().renorm_steps == 7
    with torch.device("meta"):
        empty = bn.BatchNorm1d(3, statistics=bn.Renorm())
    assert empty(torch.empty(4, 3, device="meta")).is_meta
    file = io.BytesIO()
    torch.save(empty.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["renorm_steps"].is_meta


def test_a_plain_average_goes_on_after_a_resume_with_a_batch_that_was_left_out():
    broken = X[1].clone()
    broken[0, 1] = torch.nan
    resumed = bn.BatchNorm1d(3, momentum=None)
    for x in (X[0], broken, X[2]):
        resumed(x)
    with pytest.warns(UserWarning, match="not finite"):
        state = saved(resumed.state_dict())
    twin = bn.BatchNorm1d(3, momentum=None)
    twin.load_state_dict(state)
    for layer in (resumed, twin):
        layer(X[3])
        torch.testing.assert_close(layer.running_mean.double(), mean_of([X[0], X[2], X[3]]))
        assert layer.num_batches_tracked == 3


def test_channels_that_are_pruned_away():
    layer, stock = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    kept = torch.tensor([0, 2])
    for each in (layer, stock):
        each(X[0])
        for name in ("weight", "bias"):
            setattr(each, name, nn.Parameter(getattr(each, name).data[kept]))
        for name in ("running_mean", "running_var"):
            setattr(each, name, getattr(each, name)[kept])
        each.num_features = 2
        each(X[1][:, kept])
    torch.testing.assert_close(dict(layer.state_dict()), dict(stock.state_dict()))
    layer(X[2][:, kept] * torch.inf)
    assert layer.skipped_batches.tolist() == [1, 1]


def test_functional_call_with_the_models_own_state():
    for layer in (bn.BatchNorm1d(3), bn.BatchNorm1d(3, statistics=bn.Renorm())):
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        functional_call(layer, state, X[0], strict=True)
        torch.testing.assert_close(state["running_mean"].double(), 0.1 * X[0].double().mean(0))
        assert not layer.running_mean.any()


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int16]
)
@pytest.mark.parametrize("statistics", [bn.Batch(), bn.Ghost(100)])  # the fused op, and the ops by themselves
def test_batches_are_counted_in_any_dtype(dtype, momentum, statistics):
    layer, stock = bn.BatchNorm1d(3, momentum=momentum, statistics=statistics), nn.BatchNorm1d(3, momentum=momentum)
    for each in (layer, stock):
        each.load_state_dict(each.state_dict() | {"num_batches_tracked": torch.tensor(0, dtype=dtype)}, assign=True)
        for x in X:
            each(x)
    assert layer.num_batches_tracked.dtype == dtype
    torch.testing.assert_close(dict(layer.state_dict()), dict(stock.state_dict()))


def test_a_copy_on_another_device_counts_by_itself():
    layer = bn.BatchNorm1d(3)
    layer(X[0] * torch.inf)
    moved = copy.deepcopy(layer).to("meta")
    assert moved.skipped_batches is None
    assert layer.skipped_batches.tolist() == [1, 1, 1]
    assert copy.deepcopy(layer).double().skipped_batches.tolist() == [1, 1, 1]


def test_update_bn_leaves_frozen_statistics_alone():
    model = network()
    model(X[0])
    before = model[1].running_mean.clone()
    bn.freeze(model)
    torch.optim.swa_utils.update_bn([X[1]], model)
    torch.testing.assert_close(model[1].running_mean, before)
    assert model[1].num_batches_tracked == 1


def test_distributed_checkpoints_find_what_is_frozen(tmp_path):
    model, loaded = network(), network()
    bn.freeze(model, affine=True)
    assert get_model_state_dict(model).keys() == model.state_dict().keys()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    bn.freeze(loaded)
    state = {"model": loaded.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    loaded.load_state_dict(state["model"])
    assert loaded[1].frozen_statistics


def test_who_lets_all_parameters_train_lets_frozen_ones_train_too():
    model, loaded = network(), network()
    bn.freeze(model, affine=True)
    model.requires_grad_(True)
    assert not model[1].frozen_affine
    assert model[1].frozen_statistics
    loaded.load_state_dict(model.state_dict())
    bn.unfreeze(model)
    for each in (model, loaded):
        assert all(p.requires_grad for p in each.parameters())


def test_parameters_of_other_names_go_on_training():
    class Conditional(bn.BatchNorm1d):
        def __init__(self, channels):
            super().__init__(channels)
            self.weight_embedding, self.bias_net = nn.Embedding(4, channels), nn.Linear(4, channels)

    layer = Conditional(3)
    bn.freeze(layer, affine=True)
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {"weight", "bias"}


def under_fake_tensors(layer):
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.empty(4, 3))


@pytest.mark.parametrize(
    "trace",
    [under_fake_tensors, lambda layer: make_fx(layer)(X[0]), lambda layer: functionalize(layer)(X[0])],
    ids=["fake", "make_fx", "functionalize"],
)
def test_what_is_traced_leaves_nothing_in_a_layer_whose_counter_does_not_fit(trace):
    layer = bn.BatchNorm1d(3)
    layer.skipped_batches = None  # as from the meta device
    trace(layer)
    layer.reset_running_stats()
    pickle.loads(pickle.dumps(layer))(X[0])
    layer(X[0] * torch.nan)
    assert layer.running_mean.isfinite().all()
    assert layer.skipped_batches.tolist() == [1, 1, 1]


def test_swapped_tensors_load_after_reentrant_checkpointing():
    model = network()
    checkpoint(model, X[0].clone().requires_grad_(), use_reentrant=True).sum().backward()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(network().state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)

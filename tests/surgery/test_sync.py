"""The converters to synchronized statistics and back: pains 4, 5 and 6."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.nn.norm import AnyBatchNorm


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        bn.BatchNorm2d(4, activation="relu"),
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4 * 4, affine=False, dtype=torch.float64)),
        nn.SyncBatchNorm(16, eps=1e-3),
    )


def test_layers_keep_all_they_have_and_come_back_as_they_were():
    model = network()
    calls = []
    model[1].register_forward_hook(lambda layer, inputs, output: calls.append(layer))
    model[1].eval()
    model[2].weight.requires_grad_(False)
    converted = bn.convert_sync_batchnorm(model)
    assert [type(m) for m in converted] == [nn.Conv2d, bn.BatchNorm2d, bn.BatchNorm2d, nn.Sequential, AnyBatchNorm]
    assert [m.statistics.layer for m in converted.modules() if hasattr(m, "statistics")] == ["1", "2", "3.1", "4"]
    assert converted[2].activation == "relu"
    assert converted[1].momentum is None
    assert converted[4].eps == 1e-3
    assert [m.training for m in converted.modules()] == [m.training for m in model.modules()]
    back = bn.revert_sync_batchnorm(converted)
    assert [type(m) for m in back.modules()][:-1] == [type(m) for m in model.modules()][:-1]
    assert type(back[4]) is AnyBatchNorm  # torch's does not know what it was
    assert "Synced" not in repr(back)
    assert "Synced" not in repr(model)
    for other in (converted, back):
        assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
        assert model.state_dict().keys() == other.state_dict().keys()
        buffers = dict(other.named_buffers())
        assert all(buffers[name] is t for name, t in model.named_buffers())
        other[1](torch.randn(2, 4, 5, 5))
    assert [type(layer) for layer in calls] == [bn.BatchNorm2d, nn.BatchNorm2d]  # hooks too
    assert type(model[1]) is nn.BatchNorm2d


class Recorder:
    def __init__(self):
        self.calls = 0

    def hook(self, layer, inputs, output):
        self.calls += 1


@pytest.mark.parametrize("convert", [bn.convert_sync_batchnorm, bn.revert_sync_batchnorm, bn.from_torch])
def test_hooks_that_are_methods_of_others_are_shared(convert):
    recorder, model = Recorder(), nn.Sequential(nn.BatchNorm1d(3)).eval()
    model[0].register_forward_hook(recorder.hook)
    convert(model)(torch.randn(4, 3))
    assert recorder.calls == 1


def test_a_layer_that_was_restored_is_torchs_own():
    layer = bn.revert_sync_batchnorm(bn.convert_sync_batchnorm(nn.BatchNorm2d(4)))
    stock = nn.BatchNorm2d(4)
    assert layer.__dict__.keys() == stock.__dict__.keys()
    assert layer._buffers.keys() == stock._buffers.keys()
    stream = io.BytesIO()
    torch.save(layer, stream)
    assert repr(copy.deepcopy(layer)) == repr(stock)
    assert bn.convert_sync_batchnorm(layer).statistics == bn.Synced()  # the model itself has no name


def test_shared_layers_and_a_second_conversion():
    layer = nn.BatchNorm1d(3)
    converted = bn.convert_sync_batchnorm(nn.ModuleDict({"a": layer, "b": layer}))
    assert converted["a"] is converted["b"]
    again = bn.convert_sync_batchnorm(converted)
    assert again["a"].statistics == bn.Synced(layer="a")
    assert type(bn.revert_sync_batchnorm(again)["a"]) is nn.BatchNorm1d


def test_a_frozen_layer_stays_frozen_on_the_way_back():
    model = bn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    bn.freeze(model)
    back = bn.revert_sync_batchnorm(model)
    assert back[0].frozen_statistics
    assert type(back[0]) is bn.BatchNorm1d
    assert back[0].statistics == bn.Batch()


class Louder(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Ours(bn.BatchNorm2d):
    pass


def test_subclasses_are_refused_by_name_unless_told_what_to_make_of_them():
    for kind in (Louder, Ours):
        model = nn.Sequential(nn.Sequential(kind(4)))
        with pytest.raises(
            TypeError, match=rf"layer '0.0' is a test_sync.{kind.__name__}.*subclasses={{{kind.__name__}: ...}}"
        ):
            bn.convert_sync_batchnorm(model)
        assert type(bn.convert_sync_batchnorm(model, subclasses={kind: bn.BatchNorm2d})[0][0]) is bn.BatchNorm2d
        left = bn.convert_sync_batchnorm(model, subclasses={kind: None})[0][0]
        assert type(left) is kind
        assert "Synced" not in repr(left)
    same = bn.convert_sync_batchnorm(nn.Sequential(Ours(4)), subclasses={Ours: Ours})
    assert type(same[0]) is Ours
    assert same[0].statistics == bn.Synced(layer="0")
    assert type(bn.revert_sync_batchnorm(same)[0]) is Ours
    restored = bn.revert_sync_batchnorm(
        bn.convert_sync_batchnorm(nn.Sequential(Louder(4)), subclasses={Louder: bn.BatchNorm2d})
    )
    assert type(restored[0]) is Louder
    with pytest.raises(TypeError, match="subclasses takes our layers"):
        bn.convert_sync_batchnorm(nn.Sequential(Louder(4)), subclasses={Louder: nn.BatchNorm2d})


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match=r"0 \(LazyBatchNorm1d\) does not know its shapes yet: run the model once"):
        bn.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))
    with pytest.raises(
        ValueError, match=r"layer '0' has statistics=Ghost\(size=4, shuffle=False\), which synchronizing"
    ):
        bn.convert_sync_batchnorm(nn.Sequential(bn.BatchNorm1d(3, statistics=bn.Ghost(4))))
    for verb in (bn.convert_sync_batchnorm, bn.revert_sync_batchnorm):
        with pytest.raises(TypeError, match=rf"{verb.__name__} takes a torch.nn.Module, got list"):
            verb([])


def test_torchs_converter_refuses_layers_that_ours_made():
    model = bn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(TypeError, match=r"drop the statistics of BatchNorm1d\(statistics=Synced\(layer='0'\)\)"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_eval_and_export_need_no_processes():
    model = bn.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 1, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))

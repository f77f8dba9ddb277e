"""A checkpoint is loaded under whatever wrapper it was saved, and gets the statistics under the names that it has."""

import argparse
import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from batchnorm.population.checkpoint import Checkpoint

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


class Holds(nn.Module):
    """The network under a name, as in a LightningModule."""

    def __init__(self, name: str, *others: str) -> None:
        super().__init__()
        self.add_module(name, network())
        for other in others:
            self.add_module(other, nn.Linear(2, 2))


def other_weights(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.data.add_(1)
    return model


def round_trip(saved: nn.Module, model: nn.Module, file: Path, **options: Any) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Saved, loaded into the model, recalibrated, written; what is in the file then."""
    torch.save(saved.state_dict(), file)
    content = Checkpoint(file, **options)
    content.load_into(model)
    bn.recalibrate(model, [X], forward=lambda m, x: next(c for c in m.modules() if isinstance(c, nn.Sequential))(x))
    content.update_from(model)
    content.write(file)
    return content, torch.load(file, weights_only=True)


def compiled_inside(model: nn.Module) -> nn.Module:
    model[2] = torch.compile(model[2], backend="eager")  # type: ignore[index, operator]
    return model


@pytest.mark.parametrize(
    ("saved", "made", "left_off"),
    [
        (network, network, ""),
        (lambda: Holds("net"), network, '"net." before the file\'s names'),
        (lambda: Holds("net", "loss"), network, '"net." before the file\'s names'),
        (lambda: Holds("backbone"), lambda: Holds("module"),
         '"backbone." before the file\'s names, "module." before the model\'s names'),
        (network, lambda: Holds("net"), '"net." before the model\'s names'),
        (lambda: Holds("a"), lambda: Holds("a"), ""),
        (lambda: nn.ModuleDict({"x": nn.ModuleDict({"y": network()})}), network, '"x.y." before the file\'s names'),
        (lambda: torch.compile(network()), network, '"_orig_mod." in names'),
        (lambda: compiled_inside(network()), network, '"_orig_mod." in names'),
        (network, lambda: torch.compile(network(), backend="eager"), '"_orig_mod." in names'),
        (lambda: nn.ModuleDict({"module": torch.compile(network())}), network,
         '"module." before the file\'s names, "_orig_mod." in names'),
    ],
)  # fmt: skip
def test_what_wrappers_put_before_names_is_left_off_and_said(
    saved: Callable[[], Any], made: Callable[[], Any], left_off: str, tmp_path: Path
) -> None:
    source, model, file = other_weights(saved()), made(), tmp_path / "model.pt"
    before = copy.deepcopy(source.state_dict())
    content, after = round_trip(source, model, file)
    assert content.said == (f"{file}: left off: {left_off}" if left_off else "")
    assert list(after) == list(before)
    for key, t in before.items():
        statistics = key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(after[key], t) is not statistics, key
    first = next(m for m in source.modules() if isinstance(m, nn.Linear) and m.in_features == 3)
    (key,) = (key for key in after if key.endswith("1.running_mean") and "2." not in key)
    torch.testing.assert_close(after[key], first(X).mean(0))


def test_several_sets_of_names_that_fit_are_for_the_user_to_choose(tmp_path: Path) -> None:
    both = nn.ModuleDict({"student": network(), "teacher": other_weights(network())})
    torch.save(both.state_dict(), tmp_path / "both.pt")
    model = network()
    with pytest.raises(ValueError, match=r"several sets of names that fit Sequential, under student., teacher.: name"):
        Checkpoint(tmp_path / "both.pt").load_into(model)
    for prefix in ("teacher", "teacher."):
        _, after = round_trip(both, model, tmp_path / "both.pt", prefix=prefix)
        assert torch.equal(model[0].weight, both["teacher"][0].weight)
        assert torch.equal(after["student.1.running_mean"], both["student"][1].running_mean)
        torch.testing.assert_close(after["teacher.1.running_mean"], model[0](X).mean(0))
    with pytest.raises(ValueError, match=r"missing: 0.bias, .*; not in the model: student.0.bias"):
        Checkpoint(tmp_path / "both.pt", prefix="").load_into(model)
    with pytest.raises(ValueError, match=r"does not fit Sequential: missing"):
        Checkpoint(tmp_path / "both.pt", prefix="ema").load_into(model)


def test_a_prefix_that_all_but_the_models_own_tensors_have(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r'missing: n_averaged \(left off: "module." before the model\'s names\)'):
        Checkpoint(tmp_path / "plain.pt").load_into(AveragedModel(network()))
    averaged = AveragedModel(other_weights(network()))
    for model in (network(), AveragedModel(network())):
        round_trip(averaged, model, tmp_path / "averaged.pt")
        assert torch.equal(next(model.parameters()), next(averaged.parameters()))


def test_a_name_too_many_or_too_few_under_the_prefix_is_refused(tmp_path: Path) -> None:
    state = {f"net.{key}": t for key, t in network().state_dict().items()}
    for change, words in (
        ({"net.3.weight": torch.ones(1)}, r'not in the model: net.3.weight \(left off: "net." before the file'),
        ({"net.0.bias": None}, r"missing: 0.bias"),
        ({"net.0.bias": torch.ones(9)}, r"size mismatch for 0.bias"),
    ):
        changed = {key: t for key, t in (state | change).items() if t is not None}  # type: ignore[operator]
        torch.save(changed, tmp_path / "in.pt")
        with pytest.raises(ValueError, match=words):
            Checkpoint(tmp_path / "in.pt").load_into(network())


class Shared(nn.Module):
    """One head for two levels, and a weight that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.heads = nn.ModuleList([self.net, self.net])
        self.out, self.back = nn.Linear(4, 4), nn.Linear(4, 4)
        self.back.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(self.out(self.heads[1](x)))
        return y


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_shared_modules_and_tied_weights(suffix: str, tmp_path: Path) -> None:
    """safetensors' own save_model leaves out all names of a tensor but one."""
    source, model, file = other_weights(Shared()), Shared(), tmp_path / f"in{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), file)
    else:
        save_model(source, str(file))
    content = Checkpoint(file)
    content.load_into(model)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    bn.recalibrate(model, [X])
    content.update_from(model)
    content.write(file)
    again = Shared()
    if suffix == ".pt":
        again.load_state_dict(torch.load(file, weights_only=True))
    else:
        load_model(again, str(file), strict=False)  # which takes the shared counters for unexpected
    torch.testing.assert_close(again.net[1].running_mean, source.net[0](X).mean(0))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_files_from_before_num_batches_tracked_stay_without(tmp_path: Path) -> None:
    state = {key: t for key, t in network().state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pt")
    content, model = Checkpoint(tmp_path / "old.pt"), network()
    content.load_into(model)
    bn.recalibrate(model, [X])
    content.update_from(model)
    content.write(tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert new.keys() == state.keys()
    torch.testing.assert_close(new["1.running_mean"], model[0](X).mean(0))


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"bits": 8}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.bits = state["bits"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_extra_state_of_modules_is_part_of_it(prefix: str, tmp_path: Path) -> None:
    def made() -> nn.Sequential:
        return nn.Sequential(Extra(3, 3), nn.BatchNorm1d(3))

    saved, model = {f"{prefix}{key}": value for key, value in made().state_dict().items()}, made()
    torch.save({"epoch": 1, "model": saved}, tmp_path / "in.pt")
    content = Checkpoint(tmp_path / "in.pt")
    content.load_into(model)
    assert model[0].bits == 8
    bn.recalibrate(model, [X])
    content.update_from(model)
    content.write(tmp_path / "out.pt")
    new = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert new[f"{prefix}0._extra_state"] == {"bits": 8}
    torch.testing.assert_close(new[f"{prefix}1.running_mean"], model[0](X).mean(0))


class Settings:
    """Of the user's."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"),
        ({"settings": Settings()}, f"{__name__}.Settings"),
    ],
    ids=["Namespace", "user"],
)
def test_objects_that_are_refused_are_named(content: Any, named: str, zipped: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="may run code") as refused:
        Checkpoint(tmp_path / "in.pt")
    assert named in str(refused.value)
    assert "save model.state_dict() by itself" in str(refused.value)
    assert "\x1b" not in str(refused.value)
    module = named.rpartition(".")[0]
    lines = f"import torch, {module}; torch.serialization.add_safe_globals([{named}])"
    assert str(refused.value).endswith(f"add in the file of your functions: {lines}.")


def test_objects_that_the_user_allows_are_kept(tmp_path: Path) -> None:
    torch.save({"model": network().state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "in.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = Checkpoint(tmp_path / "in.pt")
        content.load_into(network())
        content.write(tmp_path / "out.pt")
        assert torch.load(tmp_path / "out.pt", weights_only=True)["args"].lr == 0.1


def test_an_object_of_a_script_is_read_as_the_error_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "__module__", "__main__")
    monkeypatch.setattr("__main__.Settings", Settings, raising=False)
    torch.save({"model": network().state_dict(), "settings": Settings()}, tmp_path / "in.pt")
    with pytest.raises(ValueError, match="define or import Settings and add") as refused:
        Checkpoint(tmp_path / "in.pt")
    (given,) = re.findall(r"add_safe_globals\((.*)\)", str(refused.value))
    assert given == '[(Settings, "__main__.Settings")]'
    with torch.serialization.safe_globals(eval(given)):
        assert isinstance(Checkpoint(tmp_path / "in.pt").content["settings"], Settings)


@pytest.mark.parametrize("zipped", [True, False])
def test_numpys_numbers_and_arrays_are_kept(zipped: bool, tmp_path: Path) -> None:
    held = [
        np.float64(0.5),
        np.int64(3),
        np.bool_(True),
        np.arange(3),
        np.array(["a"]),
        np.random.RandomState(0).get_state(),
    ]
    torch.save(
        {"model": network().state_dict(), "held": held}, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped
    )
    with torch.serialization.safe_globals([np.dtype]):
        Checkpoint(tmp_path / "in.pt").write(tmp_path / "out.pt")
        assert {np.dtype, np.ndarray} & {*torch.serialization.get_safe_globals()} == {np.dtype}
    np.testing.assert_equal(torch.load(tmp_path / "out.pt", weights_only=False)["held"], held)


@pytest.mark.parametrize("array", [np.array([None]), np.zeros(1, [("a", "f8")])], ids=["objects", "structured"])
def test_numpys_arrays_of_anything_else_are_refused(array: Any, tmp_path: Path) -> None:
    torch.save({"model": network().state_dict(), "held": array}, tmp_path / "in.pt")
    with pytest.raises(ValueError, match=r"cannot be read as tensors and plain values \(.*DType"):
        Checkpoint(tmp_path / "in.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("allowed", [[], [nn.Linear, nn.BatchNorm1d, nn.Sequential]], ids=["refused", "allowed"])
@pytest.mark.parametrize("content", [network(), {"model": network(), "epoch": 1}], ids=["alone", "inside"])
def test_a_whole_model_is_told_apart(content: Any, allowed: list[Any], zipped: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    for key in (None, "model"):
        with (
            torch.serialization.safe_globals([*allowed, set]),
            pytest.raises(ValueError, match=r"in.pt holds a whole model: save model.state_dict\(\)") as refused,
        ):
            Checkpoint(tmp_path / "in.pt", key)
        assert "add_safe_globals" not in str(refused.value)


STATE = dict(network().state_dict())
OTHER = {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"model": {"state_dict": STATE}, "epoch": 3}, None),
        ({"model": {"state_dict": STATE}, "epoch": 3}, "model"),
        ({"model": {"state_dict": STATE}, "epoch": 3}, "model.state_dict"),
        ({"model": {"ema": {}, "net": STATE}, "optimizer": OTHER, "rng": {"cpu": torch.ones(1)}}, None),
        ({"state_dict": STATE, "ema": {}, "optimizer": OTHER}, None),
        ({"net": STATE, "loss": torch.ones(1)}, None),
        ({**STATE, "epoch": 3, 4: torch.ones(1)}, None),
        ({"ema": {**STATE, "decay": 0.9}, "model": STATE}, "ema"),
        ({"model.state_dict": STATE, "ema": {**STATE}}, "model.state_dict"),
    ],
)
def test_the_state_is_found_and_the_rest_stays(content: dict[Any, Any], key: str | None, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "in.pt")
    found, model = Checkpoint(tmp_path / "in.pt", key), network()
    found.load_into(model)
    torch.testing.assert_close(model.state_dict(), STATE, rtol=0, atol=0)
    model[1].running_mean.fill_(7)
    found.update_from(model)
    found.write(tmp_path / "out.pt")
    new = torch.load(tmp_path / "out.pt", weights_only=True)
    before, after = ([*torch.utils._pytree.tree_leaves_with_path(tree)] for tree in (content, new))
    assert [path for path, _ in before] == [path for path, _ in after]
    changed = [path for (path, x), (_, y) in zip(before, after, strict=True) if not np.array_equal(x, y)]
    assert [str(path[-1].key) for path in changed] == ["1.running_mean"]


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({}, None, "is an empty dict: save"),
        ({1: torch.ones(1)}, None, r"holds no state_dict: it has 1 \(Tensor\). Save"),
        ({"epoch": 3}, None, r"holds no state_dict: it has epoch \(int\)"),
        ({"net": STATE, "ema": STATE}, None, "which state_dict is the model's\\? Name it with --key: net, ema"),
        ({"model": {"a": STATE, "b": STATE}}, "model", "Name it with --key: model.a, model.b"),
        ({"net": STATE}, "ema", 'under "ema": it has one under net'),
        (STATE, "net", 'under "net": it is one itself, leave --key away'),
        ([STATE], None, "holds a list, not a state_dict"),
    ],
)
def test_where_no_state_is_found_the_error_says_what_is_there(
    content: Any, key: str | None, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path / "in.pt", key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "git-lfs pointer.*: run git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"hello", "is text"),
        (b'{"a": 1}', "is text"),
        (pickle.dumps({"a": 1}), "is a plain pickle"),
        (b"PK\x03\x04" + bytes(99), "is cut off"),
        (save(STATE)[:90], "cannot be read as safetensors"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_is_no_checkpoint_is_told_by_how_it_begins(
    content: bytes, message: str, suffix: str, tmp_path: Path
) -> None:
    (tmp_path / f"in.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path / f"in.{suffix}")


def test_a_file_under_the_other_formats_name_keeps_its_format(tmp_path: Path) -> None:
    (tmp_path / "in.pt").write_bytes(save(STATE))
    torch.save(STATE, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "in.safetensors")
    for name in ("in.pt", "in.safetensors"):
        content = Checkpoint(tmp_path / name)
        content.write(tmp_path / "again")
        torch.testing.assert_close(content.state, STATE, rtol=0, atol=0)
        assert (tmp_path / "again").read_bytes()[:2] == (tmp_path / name).read_bytes()[:2]

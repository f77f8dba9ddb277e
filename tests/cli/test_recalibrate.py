"""A checkpoint gets population statistics from the command line; whatever else it holds stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import invoke
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from batchnorm.cli.recalibrate import recalibrate

USER = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

def wide():
    return nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7))

def batches():
    torch.manual_seed(1)
    x = torch.randn(60, 4) * 3 + 1
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(60)), batch_size=20)

def nothing():
    return []

def number():
    return 3

def tensor():
    return torch.randn(60, 4)

def keys():
    return [{"input": torch.randn(60, 4), "label": 1}]

def shapes():
    return [torch.randn(60, 5)]

def lines():
    raise RuntimeError("one\\ntwo")

def bare():
    with torch.device("meta"):
        return model()
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def expected() -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(60, 4) * 3 + 1
    return network()[0](x).mean(0)


GIVEN = ("--model", "mine:model", "--batches", "mine:batches")


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    (folder / "mine.py").write_text(USER)
    command = [sys.executable, "-m", "batchnorm", "recalibrate", *GIVEN, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def run_here(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(USER)
    return invoke(recalibrate, folder, *GIVEN, *options)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "net."])
@pytest.mark.parametrize("place", [None, "state_dict", "weights"])
def test_running_statistics_alone_are_exchanged(tmp_path: Path, place: str | None, prefix: str) -> None:
    state = {prefix + key: t for key, t in network().state_dict().items()}
    content = state if place is None else {place: state, "epoch": 7, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "in.pt")
    key = ("--key", place) if place == "weights" else ()
    done = run_here(tmp_path, "--checkpoint", "in.pt", "--out", "out.pt", *key)
    assert done.returncode == 0, done.stderr
    assert "1 layers recalibrated, on up to 60 values" in done.stdout
    assert ("left off: " in done.stdout) is bool(prefix)
    new = torch.load(tmp_path / "out.pt", weights_only=True)
    if place is not None:
        assert (new["epoch"], new["optimizer"]) == (7, {"state": {}})
        new = new[place]
    assert list(new) == list(state)
    torch.testing.assert_close(new[f"{prefix}1.running_mean"], expected())
    assert all(torch.equal(new[key], state[key]) for key in state if "running" not in key and "batches" not in key)
    assert set(os.listdir(tmp_path)) - {"__pycache__"} == {"in.pt", "mine.py", "out.pt"}


def test_safetensors_with_their_metadata(tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / "in.safetensors", {"format": "pt", "run": "42"})
    done = run(tmp_path, "--checkpoint", "in.safetensors", "--out", "in.safetensors", "--overwrite")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(tmp_path / "in.safetensors")["1.running_mean"], expected())
    with safe_open(tmp_path / "in.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "run": "42"}


class Anything:
    """An object that a checkpoint should not make."""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--checkpoint", "none.pt", "--out", "o.pt"), "there is no such file"),
        (("--checkpoint", "in.pt", "--out", "in.pt"), "pass --overwrite"),
        (("--checkpoint", "in.pt", "--out", "no/o.pt"), "there is no directory"),
        (("--checkpoint", "in.pt", "--out", "o.safetensors"), "its format is kept"),
        (("--checkpoint", "object.pt", "--out", "o.pt"), "may run code when they are loaded"),
        (("--checkpoint", "mine.py", "--out", "o.pt"), "mine.py is text, not a checkpoint"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--key", "ema"), 'no state_dict under "ema": it is one itself'),
        (("--checkpoint", "epoch.pt", "--out", "o.pt"), "holds no state_dict: it has epoch (int)"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--model", "mine:wide"),
         "does not fit Sequential: not in the model: 3.bias, 3.weight"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--model", "mine:number"), "returned a int"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--model", "mine"), "package.module:function"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--model", "mine:no"), "--model mine:no: mine has no no."),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--batches", "mine:nothing"), "batches yielded nothing"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--upstream", "mean"), "Known: batch, population"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--batches", "mine:tensor"), "whose rows would be taken"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--batches", "mine:keys"), "Sequential.forward takes input"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--batches", "mine:shapes"),
         "--batches mine:shapes: the model does not run on them: RuntimeError: "),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--prefix", "net"), "does not fit Sequential: missing"),
        (("--checkpoint", "in.pt", "--out", ".", "--overwrite"), "--out . is a directory: name a file"),
        (("--checkpoint", "in.pt", "--out", "o" * 300), "File name too long"),
        (("--checkpoint", "in.pt", "--out", "o" * 250), "cannot be written: "),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--device", "toaster"), "--device toaster: RuntimeError: "),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--batches", "mine:lines"), "mine:lines: RuntimeError: one"),
        (("--checkpoint", "in.pt", "--out", "o.pt", "--model", "mine:bare"), "on the meta device, without values"),
        (("--checkpoint", "empty.pt", "--out", "o.pt"), "empty.pt is empty"),
    ],
)  # fmt: skip
def test_what_does_not_fit_ends_in_one_line_and_writes_nothing(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    torch.save(network().state_dict(), tmp_path / "in.pt")
    torch.save({"model": network().state_dict(), "thing": Anything()}, tmp_path / "object.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    (tmp_path / "empty.pt").touch()
    before = (tmp_path / "in.pt").read_bytes()
    done = run_here(tmp_path, *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.removesuffix("\n").count("\n") == ("reads the batches" in done.stderr)
    assert {file.suffix for file in tmp_path.iterdir()} <= {".pt", ".py", ""}  # no .part
    assert not (tmp_path / "o.pt").exists()
    assert (tmp_path / "in.pt").read_bytes() == before

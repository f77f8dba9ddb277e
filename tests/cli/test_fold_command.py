"""A checkpoint is folded from the command line: as weights, as a program, as ONNX."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke
from safetensors.torch import load_file
from torch import nn

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.cli.fold import fold

USER = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid())

def example():
    return torch.ones(2, 3, 8, 8)

def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyBatchNorm2d(), nn.Sigmoid())

def number():
    return 3

def divides():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2, divisor_override=3))
"""


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid())
    model(torch.randn(8, 3, 8, 8) * 3 + 1)
    return model.eval()


X = torch.randn(5, 3, 8, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(USER)
    torch.save({k: t for k, t in network().state_dict().items() if k[0] in "01"}, tmp_path / "divides.pt")
    torch.save({"state_dict": {f"module.{k}": t for k, t in network().state_dict().items()}}, tmp_path / "in.pt")
    return tmp_path


GIVEN = ("--checkpoint", "in.pt", "--model", "mine:model")


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command = [sys.executable, "-m", "batchnorm", "fold", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def run_here(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return invoke(fold, folder, *options)


@pytest.mark.parametrize(("run", "out"), [(run, "out.pt"), (run_here, "out.safetensors")])
def test_weights_load_into_the_folded_model(folder: Path, run: Any, out: str) -> None:
    done = run(folder, *GIVEN, "--example", "2x3x8x8", "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"{out}: 1 layers folded, 1 left alone. Load it into bn.fold(your_model().eval(), example)." in done.stdout
    assert "3: left alone: " in done.stdout
    assert 'in.pt: left off: "module." before the file\'s names' in done.stdout
    assert done.stderr == ""
    state = load_file(folder / out) if out.endswith("safetensors") else torch.load(folder / out, weights_only=True)
    torch.manual_seed(1)
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid())
    folded = bn.fold(fresh.eval(), X)
    folded.load_state_dict(state)
    torch.testing.assert_close(folded(X), network()(X))


def test_a_program_runs_at_any_batch_size(folder: Path) -> None:
    done = run_here(folder, *GIVEN, "--example", "mine:example", "--out", "out.pt2")
    assert done.returncode == 0, done.stderr
    assert "Exported for any batch size; read again, 0.0e+00 of the largest output off." in " ".join(
        done.stdout.split()
    )
    torch.testing.assert_close(torch.export.load(folder / "out.pt2").module()(X), network()(X))


def test_onnx(folder: Path) -> None:
    import onnxruntime

    done = run_here(folder, *GIVEN, "--example", "2x3x8x8", "--out", "out.onnx")
    assert done.returncode == 0, done.stderr
    assert "Exported for any batch size; in onnxruntime, " in " ".join(done.stdout.split())
    session = onnxruntime.InferenceSession(folder / "out.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), network()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--example", "2x3x8x8", "--out", "out.tflite"], "out.tflite: a file that ends in one of .pt, .safetensors, "),
        (["--example", "2x3x8x8", "--out", "in.pt"], "--out in.pt is there already"),
        (
            ["--example", "2x5x8x8", "--out", "out.pt"],
            "--example 2x5x8x8: the model does not run on it: RuntimeError: ",
        ),
        (["--example", "3x8x8", "--out", "out.pt"], "--example 3x8x8: the model does not run on it: ValueError: "),
        (["--example", "2x3x8x8", "--out", "out.pt", "--tolerance", "nan"], "tolerance must be 0 or more (got nan)"),
        (["--example", "2x3x8x8", "--out", "out.pt", "--tolerance", "-1"], "tolerance must be 0 or more (got -1.0)"),
        (["--example", "2x3x8x8", "--out", "out.pt", "--model", "mine:lazy"], "run the model once, on an example"),
        (["--example", "0x3x8x8", "--out", "out.pt"], "--example 0x3x8x8: expected a shape NxCxHxW, "),
        (["--example", "2x3x8x8", "--out", f"{'o' * 300}.pt"], "File name too long"),
        (
            ["--example", "2,3,8,8", "--out", "out.pt"],
            "--example 2,3,8,8: expected a shape NxCxHxW, 2x3x224x224 say, or a function",
        ),
        (["--example", "2x3x8x8", "--out", "out.pt", "--tolerance", "0"], "fold: 0 with 1 folded in is "),
        (
            ["--example", "2x3x8x8", "--out", "out.pt", "--model", "mine:number"],
            "returned a int, not a torch.nn.Module",
        ),
        (["--example", "2x3x8x8", "--out", "out.pt", "--key", "ema"], 'holds no state_dict under "ema"'),
        (
            ["--example", "2x3x8x8", "--out", "out.onnx", "--checkpoint", "divides.pt", "--model", "mine:divides"],
            "onnxruntime computes something else: output 0 is ",
        ),
    ],
)
def test_refused_in_one_line(folder: Path, options: list[str], message: str) -> None:
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    model = [] if "--model" in options else ["--model", "mine:model"]
    checkpoint = [] if "--checkpoint" in options else ["--checkpoint", "in.pt"]
    done = run_here(folder, *checkpoint, *model, *options)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert re.match("fold: (?!fold)", output)
    assert message in output
    assert len(output.strip().splitlines()) == 1
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["batchnorm", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"batchnorm {bn.__version__}\n"

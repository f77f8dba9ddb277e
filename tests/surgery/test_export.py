"""surgery/export.py: folded and unfolded models leave torch: torch.export and ONNX, run in onnxruntime beside torch."""

import copy
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from surgery.test_fold import shaken
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.export import write


class Block(nn.Module):
    """Residual, functional activation, grouped and transposed convolutions, a Linear with BN, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.up, self.up_norm = nn.ConvTranspose2d(4, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.linear, self.linear_norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.norm(self.conv(x)) + x)
        y = F.silu(self.up_norm(self.up(y))) * scale[:, None, None, None]
        return {"classes": self.linear_norm(self.linear(y.mean((2, 3)))), "maps": y}


EXAMPLE = (torch.randn(3, 4, 6, 6), torch.rand(3))
VARIANTS: dict[str, Any] = {
    "torch's": lambda model: model,
    "ours": bn.from_torch,
    "ours, fused": lambda model: bn.from_torch(model, example=EXAMPLE),
    "folded": lambda model: bn.fold(model, EXAMPLE),
    "ours, fused, folded": lambda model: bn.fold(bn.from_torch(model, example=EXAMPLE), EXAMPLE),
}


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    return shaken(Block(), torch.float32).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_program_runs_without_us_at_any_batch_size(model: Block, variant: str, tmp_path: Path) -> None:
    made, file = VARIANTS[variant](model), tmp_path / "model.pt2"
    assert write(made, EXAMPLE, file).startswith("Exported for any batch size; read again, ")
    program = torch.export.load(file)
    assert "batchnorm" not in str(program.graph)
    assert ("batch_norm" in str(program.graph)) == ("folded" not in variant)
    other = (torch.randn(5, 4, 6, 6), torch.rand(5))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*other), model(*other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_onnxruntime_computes_what_torch_does(model: Block, variant: str, tmp_path: Path) -> None:
    made, file = VARIANTS[variant](model), tmp_path / "model.onnx"
    assert write(made, EXAMPLE, file).startswith("Exported for any batch size; in onnxruntime, ")
    assert {node.domain for node in onnx.load(file).graph.node} == {""}  # ONNX's own operators
    session = onnxruntime.InferenceSession(file)
    other = (torch.randn(5, 4, 6, 6), torch.rand(5))
    found = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), other, strict=True)})
    with torch.no_grad():
        expected = model(*other)
    for y, wanted in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(y), wanted, rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == [file]


def test_inserted_and_accelerated_models_are_exported_too(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(4, 3, 6, 6)
    model = shaken(bn.accelerate(plain, x), torch.float32).eval()
    state = copy.deepcopy(model.state_dict())
    for made in (model, bn.fold(model, x)):
        assert "in onnxruntime, " in write(made, x, tmp_path / "model.onnx")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_size_that_the_model_fixes_is_said(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 12)

    assert "Exported for inputs of 2x3x4; read again, 0.0e+00" in write(
        Fixed(), torch.randn(2, 3, 4), tmp_path / "m.pt2"
    )


class GivesOut(nn.Module):
    def __init__(self, *others: Any) -> None:
        super().__init__()
        self.others = others

    def forward(self, x: Tensor) -> Any:
        return {"values": x + 1, "more": self.others} if self.others else None


@pytest.mark.parametrize(
    ("suffix", "others", "message"),
    [
        (".onnx", (None, 3), r"output more\.1 of the model is 3, which .onnx cannot give out: leave it out"),
        (".onnx", (3.5,), r"output more\.0 of the model is 3.5, which"),
        (".onnx", (True,), r"output more\.0 of the model is True, which"),
        (".pt2", (3, "a"), r"output more\.1 of the model is 'a', which .pt2 cannot"),
        (".onnx", (), r"no tensor among the model's outputs \(NoneType\): nothing to export"),
        (".pt2", (), r"no tensor among the model's outputs"),
    ],
)
def test_outputs_that_a_format_has_not_are_named(
    suffix: str, others: tuple[Any, ...], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        write(GivesOut(*others), torch.randn(2, 3), tmp_path / f"m{suffix}")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_numbers_among_the_outputs_of_a_program_stay(tmp_path: Path) -> None:
    assert "read again, 0.0e+00 of" in write(
        GivesOut(3, 3.5, True, None), torch.randn(2, 3), file := tmp_path / "m.pt2"
    )
    assert torch.export.load(file).module()(torch.zeros(2, 3))["more"] == (3, 3.5, True, None)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_what_cannot_be_exported_is_said_and_leaves_no_file(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.export cannot take the model: "):
        write(Reads(), torch.randn(2, 3), tmp_path / f"m{suffix}")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_what_onnxruntime_cannot_run_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).bfloat16().eval()
    with pytest.raises(ValueError, match=r"onnxruntime cannot take the model: \w+: "):
        write(model, torch.randn(2, 3, 6, 6).bfloat16(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class Divides(nn.Module):
    """A divisor that the ONNX exporter drops; the first output is right."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"same": x * 2, "pooled": F.avg_pool2d(x, 2, divisor_override=3)}


class PoolsClasses(nn.Module):
    """Alike where what is given out are integers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, divisor_override=3).floor().long()


@pytest.mark.parametrize(
    ("model", "output"), [(Divides(), "pooled"), (PoolsClasses(), "0")], ids=["values", "integers"]
)
@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_what_computes_something_else_is_not_written(
    model: nn.Module, output: str, tolerance: float | None, tmp_path: Path
) -> None:
    file = tmp_path / "m.onnx"
    file.write_text("what was there")
    with pytest.raises(ValueError, match=rf"onnxruntime computes something else: output {output} is \d.* off, more"):
        write(model, torch.randn(2, 3, 8, 8) * 9, file, tolerance)
    assert [f.read_text() for f in tmp_path.iterdir()] == ["what was there"]
    assert "off." in write(model, torch.randn(2, 3, 8, 8) * 9, file, tolerance=1.0)


def test_a_program_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = torch.export.load

    def half(file: Path) -> Any:
        program = load(file)
        with torch.no_grad():
            program.state_dict["weight"].mul_(0.5)
        return program

    monkeypatch.setattr(torch.export, "load", half)
    with pytest.raises(ValueError, match=r"\.pt2 computes something else: output 0 is .* Nothing was written"):
        write(nn.Linear(3, 4, bias=False), torch.randn(2, 3), tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


class Masks(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        return x.masked_fill(x > 0, float("-inf")), x > 0, None


def test_outputs_that_are_infinite_or_no_floating_point_numbers_are_compared(tmp_path: Path) -> None:
    assert "in onnxruntime, 0.0e+00 of" in write(Masks(), torch.randn(2, 3), tmp_path / "m.onnx")


def test_an_operator_that_onnx_lacks_is_named_in_one_line(tmp_path: Path) -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0e(x)

    with pytest.raises(ValueError, match=r"^ONNX export cannot take the model: .*bessel_i0e") as caught:
        write(Bessel(), torch.randn(2, 3), tmp_path / "m.onnx")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_tied_weights_are_saved_under_each_of_their_names(tmp_path: Path, suffix: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    write(model, torch.randn(2, 4), file := tmp_path / f"m{suffix}")
    state = torch.load(file, weights_only=True) if suffix == ".pt" else load_file(file)
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=0, atol=0)


def test_weights_with_shared_tensors_are_written_under_every_name(tmp_path: Path) -> None:
    """A head that two levels share, weights that are tied: the file loads by load_state_dict alone."""
    from safetensors.torch import load_file

    head = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = head.weight
    shared = nn.ModuleDict({"a": head, "b": nn.ModuleList([head]), "c": tied})
    for file in (tmp_path / "out.safetensors", tmp_path / "out.pt"):
        write(shared, None, file)
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        torch.testing.assert_close(state, dict(shared.state_dict()), rtol=0, atol=0)

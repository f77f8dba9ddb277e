"""surgery/norms.py, by what fold makes of it: other packages' batch normalization, and statistics that are broken."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery.test_fold import assert_same, shaken
from torch import Tensor, nn

import batchnorm as bn


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: batch normalization, drop, act."""

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


class ABN(nn.Module):
    """inplace_abn's: no subclass, an activation by its name."""

    def __init__(self, channels: int, activation: str = "leaky_relu", activation_param: float = 0.2) -> None:
        super().__init__()
        self.eps, self.activation, self.activation_param = 1e-3, activation, activation_param
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        if self.activation == "leaky_relu":
            return F.leaky_relu(x, self.activation_param, inplace=True)
        return F.elu(x, self.activation_param) if self.activation == "elu" else x


class Absolute(ABN):
    """As inplace_abn once was: of the weight's absolute value."""

    def forward(self, x: Tensor) -> Tensor:
        weight = -self.weight.abs() - 0.1
        return F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, False, 0.1, self.eps)


class Frozen(nn.Module):
    """torchvision's and DETR's: buffers alone, and an eps that stands in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.view(1, -1, 1, 1) * (self.running_var.view(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class Plain(nn.BatchNorm2d):
    """A subclass that computes what the class does."""


class Clamps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-6, 6)


class ActFirst(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


FOREIGN: dict[str, tuple[nn.Module, str]] = {
    "timm's": (BatchNormAct2d(4), "Sequential"),
    "timm's with SiLU and dropout": (BatchNormAct2d(4, nn.SiLU(), nn.Dropout(0.3)), "Sequential"),
    "timm's with a parameter": (BatchNormAct2d(4, nn.PReLU(4)), "Sequential"),
    "timm's with apply_act=False": (BatchNormAct2d(4, nn.Identity()), "Identity"),
    "inplace_abn's": (ABN(4), "Rest"),
    "inplace_abn's ELU": (ABN(4, "elu", 1.0), "Rest"),
    "inplace_abn's identity": (ABN(4, "identity"), "Identity"),
    "frozen": (Frozen(4), "Identity"),
    "a subclass": (Plain(4), "Identity"),
    "instance normalization in eval": (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), "Identity"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", FOREIGN)
def test_what_others_call_batch_normalization_folds(case: str, dtype: torch.dtype) -> None:
    norm, left = FOREIGN[case]
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 1)), dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    folded = bn.fold(model, x)
    assert folded.batchnorm_report == [("1", "folded", "into 0, before it")]
    assert type(folded[1]).__name__ == left
    assert {key for key in folded.state_dict() if key.startswith("1.")} <= set(model.state_dict())
    assert_same(model, folded, x, 1e-12 if dtype == torch.float64 else 1e-4)


class Conditional(nn.BatchNorm2d):
    """Takes up more than its input, where it is given more."""

    def forward(self, x: Tensor, shift: Tensor | None = None, domain: int = 0) -> Tensor:
        return super().forward(x) + domain + (0 if shift is None else shift)


@pytest.mark.parametrize("given", [{"shift": torch.ones(1)}, {"domain": 2}, {}], ids=str)
def test_what_is_given_more_than_its_input_is_left_alone(given: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), Conditional(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x), **given)

    model, x = shaken(Net()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = bn.fold(model, x)
    (row,) = folded.batchnorm_report
    assert row.why == ("a Conditional is given more than its input" if given else "into conv, before it")
    assert_same(model, folded, x)


def test_layers_that_are_called_by_keyword() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.conv(input=x))

    model, x = shaken(Net()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = bn.fold(model, x)
    assert folded.batchnorm_report.of("folded") == ["norm"]
    assert_same(model, folded, x)


def test_what_is_left_alone_is_named() -> None:
    norms: list[nn.Module] = [Clamps(4), ActFirst(4), Absolute(4)]
    model = shaken(nn.Sequential(*[m for norm in norms for m in (nn.Conv2d(4, 4, 1), norm)]))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    folded = bn.fold(model, x)
    assert [row.why.split(":")[0] for row in folded.batchnorm_report] == [
        "a Clamps computes something else than batch normalization",
        "a ActFirst computes something else than batch normalization and then drop and then act",
        "a Absolute computes something else than batch normalization",
    ]
    assert_same(model, folded, x)


def test_a_network_that_holds_its_inputs_statistics_is_no_layer() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.net((x - self.running_mean) / self.running_var.sqrt())

    model, x = shaken(Policy()), torch.randn(5, 3, dtype=torch.float64)
    assert bn.fold(model, x).batchnorm_report == [("net.1", "folded", "into net.0, before it")]


@pytest.mark.parametrize("inserted", [False, True])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("running_var", float("nan"), "running_var of layer '{}' has values that are not finite in 1 of 4 channels"),
        ("running_var", -0.5, "running_var of layer '{}' has negative values in 1 of 4 channels"),
        ("running_mean", float("inf"), "running_mean of layer '{}' has values that are not finite in 1 of 4"),
    ],
)
def test_broken_statistics_are_named(key: str, value: float, message: str, inserted: bool) -> None:
    x = torch.randn(2, 3, 8, 8)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), *([] if inserted else [nn.BatchNorm2d(4)]), nn.ReLU())
    model = bn.insert(model, x).eval() if inserted else model.eval()
    name = "0.batch_norm" if inserted else "1"
    getattr(model.get_submodule(name), key)[2] = value
    with pytest.raises(ValueError, match=message.format(name) + r".*: batchnorm\.recalibrate\(model, batches\)"):
        bn.fold(model, x)


def test_statistics_of_a_frozen_layer_are_estimated_anew_as_the_error_says() -> None:
    x, model = torch.randn(6, 3), bn.from_torch(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).eval()
    model[1].running_var[0] = torch.nan
    bn.freeze(model)
    with pytest.raises(ValueError, match=r"layer '1' .* is frozen, .*: batchnorm\.unfreeze\(model\), then recalibrate"):
        bn.fold(model, x)
    bn.unfreeze(model)
    with pytest.raises(ValueError, match=r"layer '1' .*, or batchnorm recalibrate --checkpoint, estimates it anew"):
        bn.fold(model, x)
    bn.recalibrate(model, [x])
    assert bn.fold(model.eval(), x).batchnorm_report.of("folded") == ["1"]


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_broken_parameters_are_named(key: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    getattr(model[1], key).data[2] = torch.nan
    with pytest.raises(
        ValueError, match=rf"fold: {key} of layer '1' .* not finite in 1 of 4 channels: take a checkpoint"
    ):
        bn.fold(model, torch.randn(2, 3))


def test_broken_statistics_that_nothing_reads_do_not_matter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Net().eval()
    model.unused.running_var.fill_(torch.nan)
    assert bn.fold(model, torch.randn(2, 3)).batchnorm_report.of("folded") == ["body.1"]


def test_an_example_of_which_the_model_makes_nan() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(ValueError, match=r"gives NaN on the example, .*: give another"):
        bn.fold(model, torch.full((2, 3), torch.nan))

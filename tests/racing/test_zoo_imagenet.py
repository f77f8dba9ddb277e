"""racing/zoo_imagenet.py: the networks that the paper and its readers know, once batch normalization is in them."""

from typing import Any

import pytest
import torch
from racing import pictures
from torch import nn

import batchnorm as bn
from batchnorm.racing import zoo_imagenet
from batchnorm.racing.folders import read_folders
from batchnorm.racing.loading import load_task
from batchnorm.racing.plan import make_plan
from batchnorm.racing.zoo_imagenet import MODULES, inception, resnet50

SMALL = torch.randn(2, 3, 64, 64)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def shapes(network: nn.Sequential, x: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Channels, height and width behind each module."""
    found = {}
    with torch.no_grad():
        for name, module in network.eval().named_children():
            x = module(x)
            found[name] = tuple(x.shape[1:])
    return found


def test_resnet50_with_bn_inserted_is_the_standard_one() -> None:
    """25,557,032 parameters: the number that torchvision, timm and others give."""
    network = bn.insert(resnet50(), SMALL)
    assert count(network) == 25_557_032
    assert len(norms(network)) == 53
    assert [r.layer for r in network.batchnorm_report if r.done != "normalized"] == ["classifier"]
    found = shapes(network, torch.randn(1, 3, 224, 224))
    assert [found[f"stage{i}_0"] for i in (1, 2, 3, 4)] == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]


def test_inception_has_the_shapes_of_the_papers_table() -> None:
    """But for 4c, 4d and 4e, where the table's branches do not add up to the table's outputs."""
    found = shapes(inception(), torch.randn(1, 3, 224, 224))
    channels = {
        "3a": 256,
        "3b": 320,
        "3c": 576,
        "4a": 576,
        "4b": 576,
        "4c": 608,
        "4d": 608,
        "4e": 1056,
        "5a": 1024,
        "5b": 1024,
    }
    places = {"3a": 28, "3b": 28, "3c": 14, "4e": 7, "5a": 7, "5b": 7}
    assert list(MODULES) == list(channels)
    for name, own in channels.items():
        side = places.get(name, 14)
        assert found[f"inception{name}"] == (own, side, side), name
    assert (found["conv1"], found["conv2"], found["classifier"]) == ((64, 112, 112), (192, 56, 56), (1000,))


def test_inception_has_as_many_parameters_as_its_docstring_says() -> None:
    network = inception()
    assert f"{count(network) / 1e6:.1f}e6" in (inception.__doc__ or "")
    inserted = bn.insert(network, SMALL)
    convolutions = [m for m in inserted.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms(inserted)) == len(convolutions) == 69
    assert all(m.bias is None for m in convolutions)
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.4]


@pytest.mark.parametrize("make", [inception, resnet50])
def test_activation_and_classes_are_keywords(make: Any) -> None:
    kinds = {type(m) for m in make(activation="sigmoid", classes=7).modules()}
    assert nn.Sigmoid in kinds
    assert nn.ReLU not in kinds
    assert make(classes=7)(SMALL).shape == (2, 7)


@pytest.mark.parametrize("make", [inception, resnet50])
def test_without_bn_values_keep_their_scale_through_the_depth(make: Any) -> None:
    """Else the baseline could not train at all."""
    network, x = make().eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        for name, module in network.named_children():
            x = module(x)
            if name.startswith(("inception", "stage")):
                assert 0.2 < x.pow(2).mean().sqrt() < 5, name


def test_with_bn_the_smaller_last_convolutions_of_blocks_change_nothing() -> None:
    """BN(aWu) = BN(Wu), up to eps."""
    network = bn.insert(resnet50(), SMALL).train()
    with torch.no_grad():
        before = network(SMALL)
        for module in network.modules():
            if isinstance(module, zoo_imagenet.Bottleneck):
                module.conv3.weight.mul_(4)
        torch.testing.assert_close(network(SMALL), before, rtol=0, atol=0.02 * before.abs().max().item())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pictures.write(tmp_path_factory.mktemp("data") / "pictures"))


@pytest.mark.parametrize("name", ["imagenet", "imagenet-resnet50"])
def test_a_task_takes_its_classes_from_the_folders(name: str, data: str) -> None:
    task = load_task(name, data)
    assert task.model().classifier.out_features == 3
    assert (task.batch_size, task.device, task.mixed_precision) == (18, "cpu", False)  # all of a folder below 256
    assert task.readers >= 1


def test_of_imagenets_size_the_budgets_are_90_epochs_and_the_papers_own(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of 32 the paper's table: Inception at 0.0015, BN-x5 at 0.0075, BN-x30 at 0.045; 31e6 steps."""
    train, val = read_folders(data)
    many = train.part(torch.arange(1_281_167) % len(train), test=False)
    monkeypatch.setattr(zoo_imagenet, "read_folders", lambda data: (many, val))
    task = load_task("imagenet", data)
    assert (task.batch_size, task.learning_rate) == (256, 0.012)
    assert (task.steps, task.full_steps) == (90 * 5004, 31_000_000 // 8)
    contenders = ["baseline", "bn", "bn-x5", "bn-x30", "bn-x5-sigmoid"]
    made = make_plan(task.with_batch_size(32), spec="imagenet", data=data, contenders=contenders, mode="full")
    assert made.steps == 31_000_000
    assert list(made.learning_rates.values()) == pytest.approx([0.0015, 0.0015, 0.0075, 0.045, 0.0075])

"""Networks that nobody here wrote: as many layers are fused, folded and inserted as were counted by hand."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.watch import arguments

FILE = Path(__file__).parents[2] / "benchmarks" / "surgery_networks.py"
SPEC = importlib.util.spec_from_file_location("surgery_networks", FILE)
networks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(networks)

# As many layers of the same kinds, and fewer channels or a smaller volume.
SMALLER = {
    "resnet18": {
        "make": networks._transformers(
            "ResNet", layer_type="basic", depths=[2, 2, 2, 2], embedding_size=16, hidden_sizes=[16, 32, 64, 128]
        )
    },
    "mobilenetv1": {"make": networks._transformers("MobileNetV1", depth_multiplier=0.25)},
    "monai's resnet10": {"example": networks.VOLUME[..., :16, :16, :16]},
}
WHOLE = networks.CASES | networks.MONAI
CASES = WHOLE | {f"{name}, smaller": WHOLE[name]._replace(**less) for name, less in SMALLER.items()}
LARGE = (*SMALLER, "bit", "convnext", "resnet50", "regnet", "efficientnet", "levit", "monai's DenseNet121",
         "monai's SEResNet50")  # fmt: skip


def marked(names: list[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in names]


NOT_TRACED = {"mobilenetv2": 10}  # residual additions in forwards that torch.fx cannot trace


@pytest.fixture(params=marked(CASES))
def case(request):
    torch.manual_seed(0)
    return request.param, CASES[request.param]


def unchanged(model: nn.Module, text: str, state: dict) -> bool:
    now = model.state_dict()
    same = all(torch.equal(t, now[key]) for key, t in state.items())
    return repr(model) == text and state.keys() == now.keys() and same and not hasattr(model, "batchnorm_report")


def test_fused_and_folded_as_counted_by_hand(case):
    name, (make, example, folds, fuses, _) = case
    model = networks.shaken(make())
    text, state = repr(model), copy.deepcopy(model.state_dict())
    fused = bn.from_torch(model, example=example)
    assert len(fused.batchnorm_report.of("fused")) == fuses - NOT_TRACED.get(name, 0)
    assert networks.error(model, fused, example) < 1e-9
    folded = bn.fold(model, example)
    assert len(folded.batchnorm_report.of("folded")) == len(folded.batchnorm_report) == folds
    assert networks.error(model, folded, example) < 1e-9
    assert networks.error(model, bn.fold(fused, example), example) < 1e-9
    back = bn.to_torch(fused)
    assert repr(back) == text
    assert all(p is q for p, q in zip(model.parameters(), back.parameters(), strict=True))
    assert unchanged(model, text, state)


def test_inserted_as_counted_by_hand(case):
    _, (make, example, _, _, inserts) = case
    model = networks.stripped(make())
    text, state = repr(model), copy.deepcopy(model.state_dict())
    batches = [arguments(example)[0]]
    inserted = bn.insert(model, example, batches=batches, forward=lambda m, batch: m(*batch))
    assert len(inserted.batchnorm_report.of("normalized")) == inserts
    assert networks.error(model, inserted, example) < 1e-9
    assert networks.error(model, bn.fold(inserted, example), example) < 1e-9
    assert unchanged(model, text, state)


@pytest.mark.parametrize("name", marked(networks.MONAI))
def test_trained_beside_the_original(name):
    torch.manual_seed(0)
    make, example, _, fuses, _ = CASES[name]
    model = make().double()
    fused = bn.from_torch(model, example=example)
    assert len(fused.batchnorm_report.of("fused")) == fuses
    assert networks.losses_apart(model, fused, example) < 1e-9

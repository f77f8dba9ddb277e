"""What ``from_torch``, ``to_torch``, ``fold`` and ``insert`` make of networks that nobody here wrote. From the root:

    python benchmarks/surgery_networks.py [--monai] [--insert] [--network resnet18] [--why]

Networks of transformers, or of monai, built from their configurations without downloads, in float64, with random
running statistics and affine parameters (fresh batch normalization is nearly the identity and hides errors). Errors are
relative to the largest value of the output; "losses": the largest difference of the losses, relative to them, when the
network and the fused one are trained for three steps. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.bench.networks import NETWORKS
from batchnorm.surgery.watch import run, tensors_of


def _transformers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        model = getattr(transformers, f"{kind}Model", None) or getattr(transformers, kind)
        return model(getattr(transformers, f"{kind}Config")(**options))

    return make


def _monai(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from monai.networks import nets

        network: nn.Module = getattr(nets, name)(**options)
        return network

    return make


def _segformer_head() -> nn.Module:
    from transformers import SegformerConfig
    from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

    return SegformerDecodeHead(SegformerConfig())


torch.manual_seed(0)
IMAGE = torch.randn(2, 3, 64, 64, dtype=torch.float64)
LARGE = torch.randn(2, 3, 224, 224, dtype=torch.float64)
WORDS = torch.randn(2, 7, 16, dtype=torch.float64)
SLICE = torch.randn(2, 1, 64, 64, dtype=torch.float64)
VOLUME = torch.randn(2, 1, 32, 32, 32, dtype=torch.float64)
SEGMENTS = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((32, 16), (64, 8), (160, 4), (256, 2))]


class Case(NamedTuple):
    """A network and an input; how many layers of it can be folded, fused and, stripped of batch normalization,
    normalized, counted by hand in its source (docs/surgery.md says how)."""

    make: Callable[[], nn.Module]
    example: Any
    folds: int
    fuses: int
    inserts: int


CASES = {
    "resnet18": Case(NETWORKS["resnet18"], IMAGE, 20, 17, 20),
    "resnet50": Case(NETWORKS["resnet50"], IMAGE, 53, 49, 53),
    "regnet": Case(_transformers("RegNet"), IMAGE, 71, 67, 115),
    "mobilenetv1": Case(_transformers("MobileNetV1"), IMAGE, 27, 27, 27),
    "mobilenetv2": Case(NETWORKS["mobilenetv2"], IMAGE, 52, 45, 35),
    "efficientnet": Case(_transformers("EfficientNet"), IMAGE, 163, 108, 218),
    "levit": Case(_transformers("Levit"), LARGE, 62, 3, 17),
    "segformer's decode head": Case(_segformer_head, (SEGMENTS,), 1, 1, 1),
    "bit": Case(_transformers("Bit"), IMAGE, 0, 0, 0),
    "convnext": Case(_transformers("ConvNext"), IMAGE, 0, 0, 18),
    "torch's transformer": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), WORDS, 0, 0, 2
    ),
    "torch's lstm": Case(lambda: nn.LSTM(16, 8, 2, batch_first=True), WORDS, 0, 0, 0),
}

MONAI = {
    "monai's resnet10": Case(
        _monai("resnet10", spatial_dims=3, n_input_channels=1, num_classes=2, widen_factor=0.125), VOLUME, 12, 9, 12
    ),
    "monai's DenseNet121": Case(
        _monai("DenseNet121", spatial_dims=2, in_channels=1, out_channels=2), SLICE, 59, 121, 59
    ),
    "monai's AttentionUnet": Case(
        _monai(
            "AttentionUnet", spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2)
        ), SLICE, 14, 12, 14,
    ),
    "monai's BasicUNet": Case(
        _monai("BasicUNet", spatial_dims=2, in_channels=1, features=(8, 8, 16, 16, 32, 8), norm="batch"),
        SLICE, 18, 18, 18,
    ),
    "monai's SEResNet50": Case(
        _monai("SEResNet50", spatial_dims=2, in_channels=1, num_classes=2), SLICE, 53, 33, 69
    ),
}  # fmt: skip


def stripped(model: nn.Module) -> nn.Module:
    """The model without its batch normalization, which becomes ``nn.Identity``."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, name, nn.Identity())
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight)  # what comes in is to come out: batch normalization saw to that
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    """Random statistics, affine parameters, biases and scales (0, 1 or 1e-6 when fresh), in float64 and eval."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.3)
        elif parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.3, 1.3)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.3, 2)
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias, 0, 0.3)
    return model.double().eval()


def error(model: nn.Module, other: nn.Module, example: Any) -> float:
    """Of the outputs, relative to the largest value of each."""
    pairs = zip(tensors_of(run(model, example)), tensors_of(run(other, example)), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs if a.is_floating_point())


def losses_apart(model: nn.Module, other: nn.Module, example: Any, steps: int = 3) -> float:
    """The largest difference, relative to it, of the losses of two copies that are trained alike for a few steps."""
    curves = []
    for each in (model, other):
        trained, curve = copy.deepcopy(each).train(), []
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01, momentum=0.9)
        for step in range(steps):
            torch.manual_seed(step)
            loss = torch.stack([t.square().mean() for t in tensors_of(trained(example))]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    return max(abs(a - b) / abs(a) for a, b in zip(*curves, strict=True))


def reasons(report: Any) -> Counter[str]:
    """What was left alone, and how often for the same reason; names shortened to their last part."""
    return Counter(
        " ".join(word.split(".")[-1] for word in row.why.split()) for row in report if row.done == "left alone"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[*CASES, *MONAI])
    parser.add_argument("--monai", action="store_true", help="networks of monai, trained for three steps too")
    parser.add_argument("--insert", action="store_true", help="insert, on the networks without batch normalization")
    parser.add_argument("--why", action="store_true", help="also what was left alone")
    options = parser.parse_args()
    names = [options.network] if options.network else list(MONAI if options.monai else CASES)
    table = insertions if options.insert else conversions
    for line in table(names, options.why):
        print(line, flush=True)


def conversions(names: list[str], why: bool) -> Iterator[str]:
    """What ``from_torch``, ``to_torch`` and ``fold`` make of the networks, as lines of a table."""
    trained = set(names) <= set(MONAI)
    yield f"| network | BN layers | fused | of | error | back | folded | of | error |{' losses |' * trained}"
    yield f"|---|---:|---:|---:|---:|---|---:|---:|---:|{'---:|' * trained}"
    for name in names:
        case = (CASES | MONAI)[name]
        torch.manual_seed(0)
        model = shaken(case.make())
        fused: Any = bn.from_torch(model, example=case.example)
        folded: Any = bn.fold(model, case.example)
        back = "same" if repr(bn.to_torch(fused)) == repr(model) else "differs"
        cells = (
            name, len(folded.batchnorm_report), len(fused.batchnorm_report.of("fused")), case.fuses,
            f"{error(model, fused, case.example):.1e}", back, len(folded.batchnorm_report.of("folded")), case.folds,
            f"{error(model, folded, case.example):.1e}",
            *([f"{losses_apart(model, fused, case.example):.1e}"] if trained else []),
        )  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"
        for what, report in (("fused", fused.batchnorm_report), ("folded", folded.batchnorm_report)):
            yield from (f"    not {what}: {n} x {because}" for because, n in reasons(report).most_common() if why)


def insertions(names: list[str], why: bool) -> Iterator[str]:
    """What ``insert`` makes of them without their batch normalization, as lines of a table."""
    yield "| network | affine layers | normalized | of | error in eval | folded again | error |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name in names:
        case = (CASES | MONAI)[name]
        torch.manual_seed(0)
        model = stripped(case.make())
        batches = [(case.example if isinstance(case.example, tuple) else (case.example,))]
        inserted: Any = bn.insert(model, case.example, batches=batches, forward=lambda m, batch: m(*batch))
        folded: Any = bn.fold(inserted, case.example)
        report, folded_again = inserted.batchnorm_report, folded.batchnorm_report.of("folded")
        off, off_folded = (f"{error(model, other, case.example):.1e}" for other in (inserted, folded))
        cells = (name, len(report), len(report.of("normalized")), case.inserts, off, len(folded_again), off_folded)
        yield f"| {' | '.join(map(str, cells))} |"
        yield from (f"    not normalized: {n} x {because}" for because, n in reasons(report).most_common() if why)


if __name__ == "__main__":
    main()

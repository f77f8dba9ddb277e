"""What ``from_torch``, ``to_torch`` and ``fold`` make of networks that nobody here wrote. From the root:

    python benchmarks/surgery_networks.py [--network resnet18]

Networks of transformers, built from their configurations without downloads, in float64, with random running statistics
and affine parameters (fresh batch normalization is nearly the identity and hides errors). Errors are relative to the
largest value of the output. Prints a Markdown table, and with --why what was left alone.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

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


def _segformer_head() -> nn.Module:
    from transformers import SegformerConfig
    from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

    return SegformerDecodeHead(SegformerConfig())


IMAGE = torch.randn(2, 3, 64, 64, dtype=torch.float64)
LARGE = torch.randn(2, 3, 224, 224, dtype=torch.float64)
WORDS = torch.randn(2, 7, 16, dtype=torch.float64)
SEGMENTS = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((32, 16), (64, 8), (160, 4), (256, 2))]

# Name: the network, its input.
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet18": (NETWORKS["resnet18"], IMAGE),
    "resnet50": (NETWORKS["resnet50"], IMAGE),
    "regnet": (_transformers("RegNet"), IMAGE),
    "mobilenetv1": (_transformers("MobileNetV1"), IMAGE),
    "mobilenetv2": (NETWORKS["mobilenetv2"], IMAGE),
    "efficientnet": (_transformers("EfficientNet"), IMAGE),
    "levit": (_transformers("Levit"), LARGE),
    "segformer's decode head": (_segformer_head, (SEGMENTS,)),
    "bit": (_transformers("Bit"), IMAGE),
    "convnext": (_transformers("ConvNext"), IMAGE),
    "torch's transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        WORDS,
    ),
    "torch's lstm": (lambda: nn.LSTM(16, 8, 2, batch_first=True), WORDS),
}


def shaken(model: nn.Module) -> nn.Module:
    """Random statistics and affine parameters, in float64 and eval."""
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


def reasons(report: Any) -> Counter[str]:
    """What was left alone, and how often for the same reason; names shortened to their last part."""
    return Counter(
        " ".join(word.split(".")[-1] for word in row.why.split()) for row in report if row.done == "left alone"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=CASES)
    parser.add_argument("--why", action="store_true")
    options = parser.parse_args()
    print("| network | BN layers | fused | error | back | folded | error |")
    print("|---|---:|---:|---:|---|---:|---:|")
    for name in [options.network] if options.network else CASES:
        torch.manual_seed(0)
        make, example = CASES[name]
        model = shaken(make())
        fused = bn.from_torch(model, example=example)
        folded = bn.fold(model, example)
        back = "same" if repr(bn.to_torch(fused)) == repr(model) else "differs"
        layers = len(folded.batchnorm_report)  # type: ignore[arg-type]
        cells = (
            name, layers, len(fused.batchnorm_report.of("fused")), f"{error(model, fused, example):.1e}", back,  # type: ignore
            len(folded.batchnorm_report.of("folded")), f"{error(model, folded, example):.1e}",  # type: ignore
        )  # fmt: skip
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        if options.why:
            for what, report in (("fused", fused.batchnorm_report), ("folded", folded.batchnorm_report)):
                for why, count in reasons(report).most_common():
                    print(f"    not {what}: {count} x {why}")


if __name__ == "__main__":
    main()

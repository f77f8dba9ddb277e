"""The shapes that the benchmark knows, by name. Data only."""

from __future__ import annotations

Shape = tuple[int, ...]


def _resnet50(batch: int) -> tuple[Shape, ...]:
    """Every shape that batch normalization sees there, images of 224 x 224."""
    layers = (
        (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14),
        (512, 7), (2048, 7),
    )  # fmt: skip
    return tuple((batch, channels, side, side) for channels, side in layers)


def _mobilenetv2(batch: int) -> tuple[Shape, ...]:
    layers = (
        (32, 112), (16, 112), (96, 112), (96, 56), (24, 56), (144, 56), (144, 28), (32, 28), (192, 28), (192, 14),
        (64, 14), (384, 14), (96, 14), (576, 14), (576, 7), (160, 7), (960, 7), (320, 7), (1280, 7),
    )  # fmt: skip
    return tuple((batch, channels, side, side) for channels, side in layers)


TABLES: dict[str, tuple[Shape, ...]] = {
    "cpu": (
        (32, 64, 56, 56), (32, 256, 56, 56), (32, 512, 14, 14), (128, 16, 28, 28), (64, 128, 32, 32), (48, 24, 40, 40),
        (16, 2048, 7, 7), (8, 32, 112, 112), (256, 96, 14, 14), (4, 32, 16, 64, 64), (64, 96, 700), (4096, 512),
        (65536, 64),
    ),
    "resnet50-64": _resnet50(64),
    "resnet50-256": _resnet50(256),
    "mobilenetv2-64": _mobilenetv2(64),
    "tiny": ((2, 4, 2, 2),),  # on CUDA the host's time, for which the device waits
}  # fmt: skip
DEFAULT = {"cpu": "cpu", "cuda": "resnet50-64"}

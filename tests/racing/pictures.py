"""A small folder of images as ImageNet lies on disk: of different sizes, each class with stripes of its own."""

import math
from pathlib import Path

import torch
from PIL import Image

CLASSES = ("across", "down", "slanting")


def stripes(kind: int, width: int, height: int, phase: float) -> Image.Image:
    """Red stripes across, green ones down, blue ones slanting."""
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    along = (y, x, x + y)[kind]
    pixels = torch.full((height, width, 3), 60)
    pixels[..., kind] = (128 + 120 * torch.sin(along * (2 * math.pi / 40) + phase)).int()
    return Image.fromarray(pixels.byte().numpy())


def write(directory: Path, train: int = 6, val: int = 2) -> Path:
    """So many images of each class; gives the directory."""
    for part, count in (("train", train), ("val", val)):
        for kind, name in enumerate(CLASSES):
            folder = directory / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                stripes(kind, 200 + 37 * i, 420 - 29 * (i % 8), i).save(folder / f"{name}_{i}.JPEG", quality=90)
    return directory

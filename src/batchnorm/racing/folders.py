"""Images in folders, one per class, as torchvision's ``ImageFolder`` has them: listed first, read when used.

Shapes: n examples of 3 channels, 224 x 224.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.racing.errors import RaceError, UnreadableFile

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 224
SHORTER_SIDE = 256  # of a test image, before its centre is cut out
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, from 0 to 1
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: Szegedy et al. 2015, "Going Deeper with Convolutions"
ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
LAYOUT = "images lie in DIR/train/<class>/ and DIR/val/<class>/, with --data DIR"

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True, eq=False)
class Folder:
    """Images of ``directory/<class>/``: ``folder[indices]`` reads (n, 3, 224, 224) float32 and (n,) int64.

    ``names``: paths inside ``directory``, one array of bytes (reading processes then share its memory);
    ``random_crops``: to train on, where the crops of a batch hang on its indices alone; else the centre of each image.
    """

    directory: str
    names: Any
    labels: Tensor
    random_crops: bool

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        # Batches are reshuffled each epoch, so an image is cut otherwise in each; and alike for every contender.
        numbers = random.Random(indices.numpy().tobytes())
        pixels = torch.stack([self._pixels(name, numbers) for name in self.names[indices.numpy()]])
        images = pixels.permute(0, 3, 1, 2).float().div_(255)
        return images.sub_(_per_channel(MEAN)).div_(_per_channel(DEVIATION)), self.labels[indices]

    def part(self, indices: Tensor, *, test: bool) -> Folder:
        """Some of the images, to score on or to train on."""
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices], random_crops=not test)

    def fingerprint(self) -> str:
        """Tells it from others by all names and labels, and the sizes of a thousand files."""
        digest = hashlib.sha256(self.names.tobytes() + self.labels.numpy().tobytes())
        for name in self.names[:: max(1, len(self) // 1000)]:
            digest.update(f"{os.stat(self._path(name)).st_size} ".encode())
        return digest.hexdigest()

    def _path(self, name: bytes) -> str:
        return os.path.join(self.directory, os.fsdecode(name))

    def _pixels(self, name: bytes, numbers: random.Random) -> Tensor:
        box = partial(random_box, numbers=numbers) if self.random_crops else central_box
        path = self._path(name)
        try:
            image = read_image(path, box)
        except Exception as error:  # whatever a decoder raises at a damaged file
            raise UnreadableFile(f"{path} cannot be read as an image ({error}). Fetch it again.") from None
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3)
        return pixels.flip(1) if self.random_crops and numbers.random() < 0.5 else pixels


def read_image(path: str, box: Callable[[int, int], Box]) -> Image:
    """The part of an image inside ``box(width, height)``, as SIZE x SIZE pixels of RGB."""
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
        left, top, right, bottom = box(width, height)
        # A JPEG is decoded at a half, a quarter or an eighth of its size where that still is enough: in less time.
        enough = (math.ceil(width * SIZE / (right - left)), math.ceil(height * SIZE / (bottom - top)))
        drafted = image.draft("RGB", enough)
        scale = drafted[1][2] / width if drafted else 1.0
        inside = (left * scale, top * scale, right * scale, bottom * scale)
        return image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=inside)


def random_box(width: int, height: int, numbers: random.Random) -> Box:
    """A part of random area and aspect at a random place."""
    for _ in range(10):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * numbers.random())
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** numbers.random()
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = (width - w) * numbers.random(), (height - h) * numbers.random()
            return left, top, left + w, top + h
    w, h = min(width, height * ASPECT[1]), min(height, width / ASPECT[0])  # of a very long image, the middle
    return _centred(width, height, w, h)


def central_box(width: int, height: int) -> Box:
    """The centre that is left of SIZE x SIZE where the shorter side is SHORTER_SIDE."""
    side = min(width, height) * SIZE / SHORTER_SIDE
    return _centred(width, height, side, side)


def _centred(width: int, height: int, w: float, h: float) -> Box:
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _per_channel(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values))[:, None, None]


def read_folders(data: str | None) -> tuple[Folder, Folder]:
    """The images to train on and those to score on, in ``data/train`` and ``data/val``.

    Raises:
        RaceError: no directory, no images, or classes that are not the same in both.
    """
    if data is None:
        raise RaceError(f"this task needs images of yours: {LAYOUT}.")
    if not Path(data).is_dir():
        raise RaceError(f"--data {data}: there is no such directory.")
    train, test = (_listed(Path(data) / part) for part in ("train", "val"))
    for part, other, missing in (("train", "val", train.keys() - test), ("val", "train", test.keys() - train)):
        if missing:
            raise RaceError(f"{data}: {_some(missing)} of {part}/ not in {other}/. Both must have the same classes.")
    return _folder(Path(data) / "train", train, True), _folder(Path(data) / "val", test, False)


def _listed(directory: Path) -> dict[str, list[str]]:
    """Names of the images of each class, in order; also those in folders inside a class's folder."""

    def fail(error: OSError) -> None:
        raise error

    try:
        classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        images = {
            name: sorted(
                os.path.join(os.path.relpath(place, directory), file)
                for place, _, files in os.walk(directory / name, onerror=fail, followlinks=True)
                for file in files
                if file.lower().endswith(ENDINGS)
            )
            for name in classes
        }
    except OSError as error:
        raise RaceError(f"{error.filename} cannot be read: {error.strerror}; {LAYOUT}.") from None
    if not classes:
        raise RaceError(f"{directory} has no folders, one for each class: {LAYOUT}.")
    empty = [name for name in classes if not images[name]]
    if empty:
        raise RaceError(f"{directory}: no images in {_some(empty)} (their names end in {', '.join(ENDINGS)}).")
    return images


def _folder(directory: Path, images: dict[str, list[str]], random_crops: bool) -> Folder:
    import numpy

    names = numpy.array([os.fsencode(name) for names in images.values() for name in names])
    labels = torch.arange(len(images)).repeat_interleave(torch.tensor([len(names) for names in images.values()]))
    return Folder(str(directory), names, labels, random_crops)


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first

"""racing/folders.py: pixels as they should be, crops that hang on the batch alone, and mistakes that are named."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from racing import pictures

from batchnorm.racing import folders
from batchnorm.racing.errors import RaceError, UnreadableFile
from batchnorm.racing.folders import Folder, central_box, random_box, read_folders, read_image


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def train(directory: Path) -> Folder:
    return read_folders(str(directory))[0]


def test_every_image_is_listed_under_its_class(directory: Path) -> None:
    train, val = read_folders(str(directory))
    assert (len(train), len(val)) == (18, 6)
    for folder, count in ((train, 6), (val, 2)):
        inputs, labels = folder[torch.arange(len(folder))]
        assert (inputs.shape, inputs.dtype, labels.dtype) == ((3 * count, 3, 224, 224), torch.float32, torch.int64)
        assert inputs.is_contiguous(memory_format=torch.channels_last)
        assert labels.tolist() == [0] * count + [1] * count + [2] * count
        assert inputs.std((2, 3)).argmax(1).tolist() == labels.tolist()  # the channel with the stripes tells the class


def test_test_images_are_the_normalized_centre_of_256(directory: Path) -> None:
    """As torchvision's Resize(256), CenterCrop(224), ToTensor, Normalize have it, up to a pixel's rounding."""
    Image.radial_gradient("L").resize((320, 400)).convert("RGB").save(directory / "one.png")
    image = Image.open(directory / "one.png").resize((256, 320), Image.Resampling.BILINEAR).crop((16, 48, 240, 272))
    expected = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    import numpy

    folder = Folder(str(directory), numpy.array([b"one.png"]), torch.tensor([0]), random_crops=False)
    torch.testing.assert_close(
        folder[torch.tensor([0])][0][0], (expected - mean) / deviation, rtol=0, atol=2 / 255 / 0.22
    )


def test_crops_differ_between_batches_and_are_the_same_for_the_same_batch(train: Folder) -> None:
    first, again, other = (train[torch.tensor(indices)][0] for indices in ([3, 9], [3, 9], [3, 7]))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], other[0])


def test_random_boxes_lie_inside_and_cover_areas_and_aspects() -> None:
    numbers = random.Random(0)
    boxes = [random_box(500, 375, numbers) for _ in range(2000)]
    assert all(0 <= left < right <= 500 and 0 <= top < bottom <= 375 for left, top, right, bottom in boxes)
    areas = [(right - left) * (bottom - top) / (500 * 375) for left, top, right, bottom in boxes]
    aspects = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert 0.08 <= min(areas) < 0.1 < 0.9 < max(areas) <= 1
    assert 3 / 4 <= min(aspects) < 0.77 < 1.3 < max(aspects) <= 4 / 3 + 1e-9


@pytest.mark.parametrize(("width", "height"), [(2000, 100), (100, 2000), (1, 1)])
def test_of_a_very_long_image_the_middle_is_taken(width: int, height: int) -> None:
    left, top, right, bottom = random_box(width, height, random.Random(1))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (left + right, top + bottom) == (width, height) or (width, height) == (1, 1)


def test_half_of_the_training_images_are_mirrored(train: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "random_box", lambda width, height, numbers: (0.0, 0.0, width, height))
    whole = replace(train, random_crops=False)
    monkeypatch.setattr(folders, "central_box", lambda width, height: (0.0, 0.0, width, height))
    slanting = torch.arange(12, 18).repeat(10)
    mirrored = 0
    for images, plain in zip(train[slanting][0], whole[slanting][0], strict=True):
        assert torch.equal(images, plain) or torch.equal(images, plain.flip(2))
        mirrored += not torch.equal(images, plain)
    assert 15 <= mirrored <= 45


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_every_kind_of_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    rgb = pictures.stripes(1, 300, 260, 0.0)
    path = str(tmp_path / ("image.jpg" if mode in ("L", "CMYK") else "image.png"))
    rgb.convert(mode).save(path)
    image = read_image(path, central_box)
    assert (image.mode, image.size) == ("RGB", (224, 224))
    alike = rgb.convert(mode).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR, central_box(300, 260))
    assert (values(image) - values(alike)).abs().mean() < 2


def values(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


@pytest.mark.parametrize("size", [(1001, 803), (2048, 2050), (640, 480), (180, 500)])
def test_jpeg_decoded_at_a_fraction_of_its_size_shows_the_same(size: tuple[int, int], tmp_path: Path) -> None:
    """Off by a pixel the gradient would differ by a whole level all over."""
    gradient = Image.linear_gradient("L").resize(size).convert("RGB")
    gradient.save(tmp_path / "image.jpg", quality=98)
    gradient.save(tmp_path / "image.png")
    jpeg, png = (values(read_image(str(tmp_path / name), central_box)) for name in ("image.jpg", "image.png"))
    assert (jpeg - png).mean().abs() < 0.3
    assert (jpeg - png).abs().max() <= 4


def test_a_part_is_read_later_and_scored_at_its_centre(train: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "read_image", lambda *_: pytest.fail("read"))
    part = train.part(torch.tensor([4, 17, 8]), test=True)
    monkeypatch.undo()
    images, labels = part[torch.tensor([1, 2])]
    assert labels.tolist() == [2, 1]
    assert torch.equal(images, replace(train, random_crops=False)[torch.tensor([17, 8])][0])
    assert train.part(torch.arange(3), test=False).random_crops


def test_fingerprint_changes_with_names_and_sizes_and_not_with_where_it_lies(tmp_path: Path) -> None:
    one, two = (read_folders(str(pictures.write(tmp_path / name)))[0] for name in ("one", "two"))
    before = one.fingerprint()
    assert before == two.fingerprint()
    with (tmp_path / "two/train/down/down_3.JPEG").open("ab") as file:
        file.write(b"more")
    assert two.fingerprint() != before
    assert one.part(torch.arange(1, 18), test=False).fingerprint() != before


def flat(directory: Path) -> None:
    for image in list((directory / "val").rglob("*.JPEG")):
        image.rename(directory / "val" / image.name)
    for folder in [f for f in (directory / "val").iterdir() if f.is_dir()]:
        folder.rmdir()


MISTAKES: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: d.rename(d.with_name("other")), r"--data .*data: there is no such directory"),
    (lambda d: (d / "train").rename(d / "training"), r"train cannot be read: No such file.* DIR/train/<class>/"),
    (lambda d: (d / "val").rename(d / "test"), r"val cannot be read: No such file.*DIR/val/<class>/"),
    (flat, r"val has no folders, one for each class"),
    (lambda d: [f.unlink() for f in (d / "train/down").iterdir()], r"train: no images in down \(their names end in"),
    (lambda d: (d / "val/down").rename(d / "val/up"), r"down of train/ not in val/. Both must have the same classes"),
    (lambda d: [f.unlink() for f in (d / "val/down").iterdir()] and (d / "val/down").rmdir(), r"down of train/ not in"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES)
def test_mistakes_in_the_folders_are_named(mistake: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    mistake(pictures.write(tmp_path / "data", train=1, val=1))
    with pytest.raises(RaceError, match=message):
        read_folders(str(tmp_path / "data"))


def test_no_data_says_how_it_should_lie() -> None:
    with pytest.raises(RaceError, match=r"images of yours: images lie in DIR/train/<class>/ and DIR/val/<class>/"):
        read_folders(None)


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_an_image_that_cannot_be_read_is_named(damage: str, tmp_path: Path) -> None:
    path = pictures.write(tmp_path, train=1, val=1) / "train/slanting/slanting_0.JPEG"
    path.write_bytes(path.read_bytes()[:2000] if damage == "cut" else b"no image")
    with pytest.raises(UnreadableFile, match=r"slanting_0.JPEG cannot be read as an image .*Fetch it again"):
        read_folders(str(tmp_path))[0][torch.tensor([2])]

"""racing/data.py: files are found in order, checked bit for bit, and read right."""

import gzip
import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from batchnorm.racing import data
from batchnorm.racing.errors import RaceError


def idx(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + bytes(values.flatten().tolist())


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small data set of the same form, known by its sums; nothing else is to be found on the machine."""
    directory = tmp_path / "made"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    contents = []
    for file, shape in zip(data.FILES, [(6, 4, 4), (6,), (3, 4, 4), (3,)], strict=True):
        contents.append(idx(torch.randint(0, 256, shape, generator=generator)))
        (directory / f"{file}.gz").write_bytes(gzip.compress(contents[-1]))
    monkeypatch.setattr(data, "SHA256", {"made": tuple(hashlib.sha256(c).hexdigest() for c in contents)})
    monkeypatch.setattr(data, "DEBIAN_DIRECTORY", tmp_path / "nowhere")
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    return directory


def test_images_are_read_as_written(made: Path) -> None:
    images = data.load_images(made)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(images.train_images, torch.randint(0, 256, (6, 4, 4), generator=generator).byte())
    assert torch.equal(images.train_labels, torch.randint(0, 256, (6,), generator=generator).byte())
    assert images.test_images.shape == (3, 4, 4)
    assert images.name == "made"


def test_uncompressed_files_are_the_same_data_set(made: Path) -> None:
    for file in data.FILES:
        (made / file).write_bytes(gzip.decompress((made / f"{file}.gz").read_bytes()))
        (made / f"{file}.gz").unlink()
    assert data.load_images(made).name == "made"


def test_debian_place_comes_before_the_cache(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data._keep(made)
    assert data._find() == data.cache_directory()
    monkeypatch.setattr(data, "DEBIAN_DIRECTORY", made)
    assert data._find() == made


def test_the_directory_can_be_named_in_the_environment(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_DATA", str(made))
    assert data.load_images().name == "made"
    with pytest.raises(RaceError, match="no train-images"):
        data.load_images(made.parent)


@pytest.mark.parametrize("damage", ["truncate", "alter", "truncate-uncompressed"])
def test_damaged_file_is_named(made: Path, damage: str) -> None:
    path = made / f"{data.FILES[2]}.gz"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "alter":
        path.write_bytes(gzip.compress(gzip.decompress(content)[:-1] + b"\x00"))
    else:
        path.unlink()
        path.with_suffix("").write_bytes(gzip.decompress(content)[:-1])
    with pytest.raises(RaceError, match=r"t10k-images-idx3-ubyte.* truncated or altered"):
        data.load_images(made)


def test_missing_file_in_a_named_directory_is_an_error(made: Path) -> None:
    (made / f"{data.FILES[1]}.gz").unlink()
    with pytest.raises(RaceError, match="no train-labels-idx1-ubyte"):
        data.load_images(made)


def test_no_data_lists_the_ways(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise subprocess.CalledProcessError(100, "apt-get", stderr="E: Unable to locate package")

    monkeypatch.setattr(data, "_fetch_with_apt", fail)
    monkeypatch.setattr(data, "_fetch_from_address", fail)
    with pytest.raises(RaceError, match=r"(?s)--data DIR.*apt-get install.*cache.*Unable to locate package"):
        data.load_images()


def test_fetched_files_go_to_the_cache_and_are_found_there(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_fetch_with_apt", lambda: data._keep(made))
    assert data.load_images().name == "made"
    monkeypatch.setattr(data, "_fetch_with_apt", lambda: pytest.fail("fetched again"))
    assert data.load_images().name == "made"


def test_fashion_mnist_itself() -> None:
    """The real files: found or fetched, 6,000 training and 1,000 test images of each class."""
    images = data.load_images()
    assert images.name == "fashion-mnist"
    assert images.train_images.shape == (60_000, 28, 28)
    assert images.train_labels.bincount().tolist() == [6_000] * 10
    assert images.test_labels.bincount().tolist() == [1_000] * 10

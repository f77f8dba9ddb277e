"""Real images: the IDX files of Fashion-MNIST and MNIST, found or fetched, and checked before use.

Looked for in a directory that the user names, in Debian's package, in the cache; else fetched.
Source: Xiao, Rasul & Vollgraf 2017, "Fashion-MNIST".
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from batchnorm.common.files import replacing
from batchnorm.racing.errors import RaceError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# SHA-256 of the uncompressed files, in the order of FILES: the same however a mirror compressed them.
SHA256 = {
    "fashion-mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
OFFICIAL_ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # as the data set's authors give it


@dataclass(frozen=True)
class Images:
    """A data set in memory: images (N, 28, 28) and labels (N,), all uint8."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_images(directory: str | os.PathLike[str] | None = None) -> Images:
    """Find (or fetch), check and read the images.

    Args:
        directory: where the four IDX files are, compressed with gzip or not; Fashion-MNIST or MNIST, told apart
            by their SHA-256. ``None``: the directory that ``BATCHNORM_DATA`` names; without it Debian's place, then
            the cache, then Debian's package, then the network.

    Raises:
        RaceError: no files, or files that are not those of the data set, bit for bit.
    """
    directory = directory or os.environ.get("BATCHNORM_DATA")
    found = Path(directory) if directory else _find() or _fetch()
    contents = [_read(found, file) for file in FILES]
    sums = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    for name, expected in SHA256.items():
        if sums == expected:
            return Images(name, *(_parse_idx(content) for content in contents))
    # Name the first file that belongs to neither data set; else the four are a mixture of both.
    closest = max(SHA256.values(), key=lambda expected: sum(a == b for a, b in zip(sums, expected, strict=True)))
    wrong = next(i for i, (a, b) in enumerate(zip(sums, closest, strict=True)) if a != b)
    raise RaceError(
        f"{found / FILES[wrong]} is not the file of the data set: truncated or altered (SHA-256 {sums[wrong][:12]}..., "
        f"expected {closest[wrong][:12]}...). Delete it and fetch it again."
    )


def cache_directory() -> Path:
    """The directory for fetched data; ``BATCHNORM_CACHE`` moves it."""
    import pooch

    return Path(os.environ.get("BATCHNORM_CACHE") or pooch.os_cache("batchnorm")) / "fashion-mnist"


def _find() -> Path | None:
    return next(
        (place for place in (DEBIAN_DIRECTORY, cache_directory()) if all(_path(place, file) for file in FILES)), None
    )


def _path(directory: Path, file: str) -> Path | None:
    return next((path for path in (directory / f"{file}.gz", directory / file) if path.is_file()), None)


def _read(directory: Path, file: str) -> bytes:
    path = _path(directory, file)
    if path is None:
        raise RaceError(f"no {file}.gz in {directory}: all of {', '.join(FILES)} are needed (gzip or not).")
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RaceError(f"{path} is truncated or altered ({error}). Delete it and fetch it again.") from None
    except OSError as error:
        raise RaceError(f"{path} cannot be read: {error.strerror}.") from None


def _parse_idx(content: bytes) -> Tensor:
    """IDX: two zero bytes, the type (8: uint8), the number of dimensions, each size as 4 bytes, then the values."""
    dimensions = content[3]
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dimensions).reshape(sizes)


def _fetch() -> Path:
    """Bring Fashion-MNIST here through apt, or else from its official address. Says what it does; then where it is."""
    tried = []
    for way in (_fetch_with_apt, _fetch_from_address):
        try:
            return way()
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            tried.append(
                f"{way.__name__.removeprefix('_fetch_').replace('_', ' ')}: {detail.strip().splitlines()[-1:]}"
            )
    raise RaceError(
        "no Fashion-MNIST images. Give them in one of these ways: "
        f"(1) --data DIR with the files {', '.join(FILES)}, gzip or not; "
        f"(2) apt-get install {DEBIAN_PACKAGE}; (3) the same files in {cache_directory()}. "
        f"Fetching failed: {'; '.join(tried)}"
    )


def _fetch_with_apt() -> Path:
    if not shutil.which("apt-get"):
        raise ValueError("apt-get is not on this machine")

    def run(*command: str, cwd: str | None = None) -> None:
        subprocess.run(command, check=True, cwd=cwd, capture_output=True, text=True, timeout=600)

    print(f"Fetching Fashion-MNIST (31 MB): Debian's package {DEBIAN_PACKAGE}", flush=True)
    if os.geteuid() == 0:
        try:
            run("apt-get", "install", "-y", DEBIAN_PACKAGE)
        except subprocess.CalledProcessError:  # the list of packages may be old or missing
            run("apt-get", "update")
            run("apt-get", "install", "-y", DEBIAN_PACKAGE)
        return DEBIAN_DIRECTORY
    with tempfile.TemporaryDirectory() as scratch:
        run("apt-get", "download", DEBIAN_PACKAGE, cwd=scratch)
        run("dpkg-deb", "-x", str(next(Path(scratch).glob("*.deb"))), scratch)
        return _keep(Path(scratch) / DEBIAN_DIRECTORY.relative_to("/"))


def _fetch_from_address() -> Path:
    import pooch

    print(f"Fetching Fashion-MNIST (31 MB) from {OFFICIAL_ADDRESS}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for file in FILES:
            pooch.retrieve(f"{OFFICIAL_ADDRESS}{file}.gz", known_hash=None, fname=f"{file}.gz", path=scratch)
        return _keep(Path(scratch))


def _keep(directory: Path) -> Path:
    """Move fetched files to the cache; each appears there whole or not at all."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        with replacing(cache / f"{file}.gz") as part:
            shutil.copyfile(directory / f"{file}.gz", part)
    return cache

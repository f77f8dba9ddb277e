"""A table instead of images: Covertype found or fetched and checked, a deep multilayer perceptron, and their task.

Source: Blackard & Dean 1999, "Comparative accuracies of artificial neural networks and discriminant analysis in
predicting forest cover types from cartographic variables"; UCI Machine Learning Repository, "Covertype" (CC BY 4.0).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from batchnorm.common.files import replacing
from batchnorm.racing.errors import RaceError
from batchnorm.racing.task import Task
from batchnorm.racing.zoo import ACTIVATIONS, initialize, own_generator

FILES = ("covtype.csv.gz", "covtype.csv", "covtype.data.gz", "covtype.data")  # any one of them
HEADER = b"Elevation,"  # how the line with the columns' names begins, where a file has one
# Of the rows, uncompressed and without the line of names: the same however a file is compressed or headed.
SHA256 = "0a9371cef7c964b5475d6053cc3e0894a5aa6f65ad1ed3ecb01c45aa96217945"

# A release whose wheel holds the table (that of 0.5.3 does not). It is for Python 3.6: it is opened, never installed.
REQUIREMENT, MEMBER = "scikit-multiflow==0.4.1", "skmultiflow/data/datasets/covtype.csv"
WHEEL = ("--python-version=3.6", "--implementation=cp", "--abi=cp36m", "--platform=manylinux1_x86_64")

MEASURES = 10  # elevation, slope, distances, ...: in metres, degrees, shades of grey
ONE_HOT = 4 + 40  # wilderness area and type of soil, as columns of 0 and 1
CLASSES = 7  # kinds of trees
TEST = 20_000  # of 581,012 rows


def load_table(directory: str | os.PathLike[str] | None = None) -> tuple[Tensor, Tensor]:
    """Find (or fetch), check and read Covertype: features (N, 54) as measured, and classes (N,) from 0, in file order.

    Args:
        directory: where one of ``FILES`` is. ``None``: the directory that ``BATCHNORM_DATA`` names, if it has one;
            then the cache; then the wheel that carries it.

    Raises:
        RaceError: no file, or not that of the data set, bit for bit.
    """
    path = _in(Path(directory)) if directory else _find() or _fetch()
    if path is None:
        raise RaceError(f"no Covertype in {directory}: one of {', '.join(FILES)} is needed.")
    return _parse(_checked(_rows(path), path))


def cache_directory() -> Path:
    """The directory for the fetched table; ``BATCHNORM_CACHE`` moves it."""
    import pooch

    return Path(os.environ.get("BATCHNORM_CACHE") or pooch.os_cache("batchnorm")) / "covertype"


def _find() -> Path | None:
    named = os.environ.get("BATCHNORM_DATA")
    places = [Path(named)] if named else []
    return next(filter(None, map(_in, [*places, cache_directory()])), None)


def _in(directory: Path) -> Path | None:
    return next((directory / file for file in FILES if (directory / file).is_file()), None)


def _rows(path: Path) -> bytes:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RaceError(f"{path} is truncated or altered ({error}). Delete it and fetch it again.") from None
    except OSError as error:
        raise RaceError(f"{path} cannot be read: {error.strerror}.") from None
    return _without_header(content)


def _without_header(content: bytes) -> bytes:
    return content.partition(b"\n")[2] if content.startswith(HEADER) else content


def _checked(rows: bytes, path: object) -> bytes:
    found = hashlib.sha256(rows).hexdigest()
    if found != SHA256:
        raise RaceError(
            f"{path} is not the table of the data set: truncated or altered (SHA-256 of its rows {found[:12]}..., "
            f"expected {SHA256[:12]}...). Delete it and fetch it again."
        )
    return rows


def _parse(rows: bytes) -> tuple[Tensor, Tensor]:
    import numpy

    values = numpy.fromstring(rows.replace(b"\n", b","), dtype=numpy.int32, sep=",")
    table = torch.from_numpy(values.reshape(-1, MEASURES + ONE_HOT + 1))
    return table[:, :-1].float(), table[:, -1].long() - 1


def _fetch() -> Path:
    """Bring the table here in the wheel that carries it. Says what it does; then where the table is."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return _keep(_checked(_without_header(_download(Path(scratch))), f"the table in {REQUIREMENT}"))
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError, RaceError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise RaceError(
            f"no Covertype. Give it in one of these ways: (1) --data DIR with one of {', '.join(FILES)}, as in the UCI "
            f"Machine Learning Repository; (2) the same in {cache_directory()}. "
            f"Fetching failed: pip download {REQUIREMENT}: {detail.strip().splitlines()[-1:]}"
        ) from None


def _download(scratch: Path) -> bytes:
    print(f"Fetching Covertype (16 MB): in the wheel of {REQUIREMENT}, which is not installed", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", *WHEEL, "--dest", str(scratch), REQUIREMENT]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    wheel = next(scratch.glob("*.whl"), None)
    if wheel is None:
        raise FileNotFoundError("no wheel came")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(MEMBER)


def _keep(rows: bytes) -> Path:
    """Put fetched rows into the cache; they appear there whole or not at all."""
    path = cache_directory() / FILES[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(gzip.compress(rows, 6))
    return path


def split(features_NF: Tensor, classes_N: Tensor) -> tuple[TensorDataset, TensorDataset]:
    """Training and test examples, drawn once and for all; measures standardized by the training examples' moments."""
    order = torch.randperm(len(features_NF), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST], order[TEST:]
    measures = features_NF[:, :MEASURES]
    std, mean = torch.std_mean(measures[train].double(), dim=0, correction=0)
    features = torch.cat([((measures - mean) / std).float(), features_NF[:, MEASURES:]], dim=1)
    return TensorDataset(features[train], classes_N[train]), TensorDataset(features[test], classes_N[test])


def deep_mlp(*, activation: str = "relu", depth: int = 8, width: int = 128) -> nn.Sequential:
    """A plain multilayer perceptron, as people train them on tables: (N, 54) -> (N, 7), 8 hidden layers of 128."""
    layers: list[nn.Module] = []
    features = MEASURES + ONE_HOT
    for _ in range(depth):
        layers += [nn.Linear(features, width), ACTIVATIONS[activation]()]
        features = width
    classifier, generator = nn.Linear(features, CLASSES), own_generator()
    network = nn.Sequential(*layers, nn.Dropout(0.1), classifier)
    initialize(network, lambda weight: nn.init.kaiming_normal_(weight, generator=generator))
    nn.init.normal_(classifier.weight, std=0.01, generator=generator)  # first predictions are even
    return network


def covertype_task(data: str | None = None) -> Task:
    """Covertype: which of 7 kinds of trees grows on 30 m x 30 m of forest, from maps alone."""
    train, test = split(*load_table(data))
    return Task(
        "covertype",
        deep_mlp,
        train=train,
        test=test,
        batch_size=256,
        weight_decay=1e-5,
        learning_rate=0.1,
        steps=20_000,  # 94.78% of held-out examples, mean of two seeds
        full_steps=80_000,  # still rising there: the plateau is further
        quick_steps=2_500,
        held_out=20_000,
    )

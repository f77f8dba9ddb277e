"""racing/tabular.py: the table is found in order, checked bit for bit, read right and split once and for all."""

import gzip
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from batchnorm.racing import tabular
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.errors import RaceError
from batchnorm.racing.trainer import network_of

HEADER = b"Elevation,Aspect,Slope,...\n"
N, TEST = 300, 20


def table() -> torch.Tensor:
    """(N, 55): measures, of which some are below 0; one area and one soil on in each row; a class from 1 to 7."""
    generator = torch.Generator().manual_seed(0)
    measures = torch.randint(-150, 3000, (N, 10), generator=generator)
    area, soil, kind = (torch.randint(0, most, (N,), generator=generator) for most in (4, 40, 7))
    one_hot = [torch.nn.functional.one_hot(area, 4), torch.nn.functional.one_hot(soil, 40)]
    return torch.cat([measures, *one_hot, kind[:, None] + 1], dim=1)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small table of the same form, known by its sum; nothing else is to be found on the machine."""
    content = b"".join(b"%s\n" % ",".join(map(str, row)).encode() for row in table().tolist())
    monkeypatch.setattr(tabular, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(tabular, "TEST", TEST)
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BATCHNORM_DATA", raising=False)
    return content


@pytest.mark.parametrize("file", tabular.FILES)
@pytest.mark.parametrize("header", [b"", HEADER], ids=["rows", "header"])
def test_table_is_read_as_written(rows: bytes, tmp_path: Path, file: str, header: bytes) -> None:
    content = header + rows
    (tmp_path / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    features, classes = tabular.load_table(tmp_path)
    assert torch.equal(features, table()[:, :54].float())
    assert torch.equal(classes, table()[:, 54] - 1)


@pytest.mark.parametrize("damage", ["truncate", "alter", "truncate-uncompressed"])
def test_damaged_file_is_named(rows: bytes, tmp_path: Path, damage: str) -> None:
    packed = gzip.compress(rows)
    if damage == "truncate":
        (tmp_path / "covtype.csv.gz").write_bytes(packed[: len(packed) // 2])
    elif damage == "alter":
        (tmp_path / "covtype.csv.gz").write_bytes(gzip.compress(rows[:-2] + b"9\n"))
    else:
        (tmp_path / "covtype.csv").write_bytes(rows[:-1])
    with pytest.raises(RaceError, match=r"covtype\.csv.* truncated or altered"):
        tabular.load_table(tmp_path)


def test_missing_file_in_a_named_directory_is_an_error(rows: bytes, tmp_path: Path) -> None:
    with pytest.raises(RaceError, match=r"no Covertype in .*covtype\.csv"):
        tabular.load_table(tmp_path)


def test_directory_of_the_environment_comes_before_the_cache_and_may_be_that_of_other_data(
    rows: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tabular._keep(rows)
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("BATCHNORM_DATA", str(tmp_path / "mine"))
    assert tabular._find() == tabular.cache_directory() / "covtype.csv.gz"
    (tmp_path / "mine" / "covtype.data").write_bytes(rows)
    assert tabular._find() == tmp_path / "mine" / "covtype.data"


def wheel(command: list[str], rows: bytes) -> None:
    """What ``pip download`` leaves in the directory that it is given."""
    directory = Path(command[command.index("--dest") + 1])
    with zipfile.ZipFile(directory / "scikit_multiflow-0.4.1-cp36-cp36m-manylinux1_x86_64.whl", "w") as archive:
        archive.writestr(tabular.MEMBER, HEADER + rows)


def test_fetched_table_goes_to_the_cache_and_is_found_there(
    rows: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: wheel(command, rows))
    assert len(tabular.load_table()[0]) == N
    assert "Fetching Covertype" in capsys.readouterr().out
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert len(tabular.load_table()[0]) == N


def test_a_fetched_table_that_is_another_does_not_get_into_the_cache(
    rows: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: wheel(command, rows[:-2] + b"9\n"))
    with pytest.raises(RaceError, match=r"no Covertype.*truncated or altered"):
        tabular.load_table()
    assert not tabular.cache_directory().exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            subprocess.CalledProcessError(1, "pip", stderr="ERROR: a\nERROR: No matching distribution found\n"),
            "matching",
        ),
        (subprocess.CalledProcessError(1, "pip", stderr="python: No module named pip"), "No module named pip"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
    ids=["unknown", "no pip", "disk"],
)
def test_no_table_lists_the_ways(rows: bytes, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RaceError, match=rf"--data DIR.*covertype.*pip download.*{words}") as caught:
        tabular.load_table()
    assert "\n" not in str(caught.value)


def unit(sorted_NF: torch.Tensor) -> torch.Tensor:
    """Each column from 0 to 1."""
    return (sorted_NF - sorted_NF[0]) / (sorted_NF[-1] - sorted_NF[0])


def test_split_covers_every_row_once_and_standardizes_by_the_training_examples(rows: bytes) -> None:
    features, classes = table()[:, :54].float(), table()[:, 54] - 1
    train, test = tabular.split(features, classes)
    assert (len(train), len(test)) == (N - TEST, TEST)
    again, _ = tabular.split(features, classes)
    assert torch.equal(again.tensors[0], train.tensors[0])

    measures = train.tensors[0][:, :10].double()
    torch.testing.assert_close(measures.mean(0), torch.zeros(10).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(measures.std(0, correction=0), torch.ones(10).double(), atol=1e-6, rtol=0)

    both = torch.cat([train.tensors[0], test.tensors[0]])
    kinds = torch.cat([train.tensors[1], test.tensors[1]])
    before, after = (x[:, :10].sort(dim=0).values.double() for x in (features, both))
    torch.testing.assert_close(unit(after), unit(before), atol=1e-6, rtol=0)  # training and test: one line, rising
    on = sorted(zip(both[:, 10:].argmax(1).tolist(), kinds.tolist(), strict=True))
    assert on == sorted(zip(features[:, 10:].argmax(1).tolist(), classes.tolist(), strict=True))


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_can_train_the_network(rows: bytes, tmp_path: Path, name: str) -> None:
    (tmp_path / "covtype.data").write_bytes(rows)
    task = tabular.covertype_task(str(tmp_path))
    network = network_of(task, CONTENDERS[name])
    inputs, targets = task.train[torch.arange(8)]
    task.training_loss(network, (inputs, targets)).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_first_outputs_are_even_and_gradients_reach_the_first_layer_at_their_scale() -> None:
    """He et al. 2015: deep without batch normalization, and the signal neither dies nor explodes."""
    torch.manual_seed(0)
    network = tabular.deep_mlp()
    linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [128] * 8 + [7]
    inputs = torch.randn(256, 54)
    outputs = network.eval()(inputs)
    assert outputs.softmax(1).sub(1 / 7).abs().max() < 0.1
    outputs.square().sum().backward()
    norms = [float(layer.weight.grad.norm()) for layer in linear[1:-1]]  # type: ignore[union-attr]
    assert 0.1 < norms[0] / norms[-1] < 10


def test_covertype_itself() -> None:
    """The real table: found or fetched, with as many rows of each kind as its authors count."""
    features, classes = tabular.load_table()
    assert features.shape == (581_012, 54)
    assert classes.bincount().tolist() == [211_840, 283_301, 35_754, 2_747, 9_493, 17_367, 20_510]
    assert features[:, 10:14].sum(1).eq(1).all()
    assert features[:, 14:].sum(1).eq(1).all()
    assert (features[:, 0].min(), features[:, 0].max()) == (1_859, 3_858)  # metres above the sea

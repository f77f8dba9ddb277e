"""batchnorm race --task imagenet on a small folder, as somebody with many GPUs runs it: torchrun, killed, resumed."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from racing import pictures
from test_race import TORCHRUN, finish, newest, numbers, refused, start, wait_for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write(tmp_path_factory.mktemp("data") / "pictures", train=4, val=1)


def family(pid: int) -> Iterator[int]:
    """A process, its children, and theirs: torchrun's are in sessions of their own."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from family(int(child))


@pytest.mark.slow
def test_killed_on_two_processes_it_resumes_to_the_same_numbers(
    data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inception under torchrun, with reading processes: 2 steps of the baseline, one of BN-x5."""
    options = ["--task", "imagenet", "--data", str(data), "--contenders", "baseline,bn-x5", "--seeds", "1"]
    options += ["--steps", "2", "--batch-size", "4"]
    finish(start(*options, "--out", str(tmp_path / "whole"), command=TORCHRUN))
    whole = numbers(tmp_path / "whole")
    assert [row[:3] for row in whole] == [["baseline", "0", "1"], ["baseline", "0", "2"], ["bn-x5", "0", "1"]]
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert (results["environment"]["processes"], results["environment"]["gpu"]) == (2, None)
    rates = [row["learning_rate"] for row in results["contenders"]]
    assert rates == pytest.approx([0.0015 * 4 / 32, 5 * 0.0015 * 4 / 32], rel=0.003)  # in 3 digits

    killed = tmp_path / "killed"
    process = start(*options, "--out", str(killed), command=TORCHRUN)
    wait_for(lambda: newest(killed / "runs") > 0, process)
    for pid in list(family(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "results.json").exists()
    assert "batch_size was 4, is 12" in refused(capsys, monkeypatch, "--resume", str(killed), "--batch-size", "12")
    out, _ = finish(start("--resume", str(killed), command=TORCHRUN))
    assert "[ 67%] baseline" in out  # its second step; the first was done before
    assert "[ 33%] baseline" not in out
    assert numbers(killed) == whole


def test_a_damaged_image_is_named_before_long_work(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a reading process, in one line."""
    damaged = pictures.write(tmp_path / "data")
    for image in (damaged / "train" / "slanting").iterdir():
        image.write_bytes(image.read_bytes()[:1000])
    err = refused(capsys, monkeypatch, "--task", "imagenet", "--data", str(damaged), "--out", str(tmp_path / "out"))
    assert f"race: {damaged}/train/slanting/slanting_" in err
    assert ".JPEG cannot be read as an image" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "this task needs images of yours: images lie in DIR/train/<class>/"),
        (["--data", "/nowhere"], "--data /nowhere: there is no such directory"),
        (["--data", "DATA", "--batch-size", "0"], "--batch-size must be a whole number of at least 1 (got 0)"),
        (["--data", "DATA", "--batch-size", "13"], "12 training examples are less than one batch (13)"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], message: str, data: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    err = refused(capsys, monkeypatch, "--task", "imagenet", *(str(data) if o == "DATA" else o for o in options))
    assert message in err
    assert err.count("\n") == 1

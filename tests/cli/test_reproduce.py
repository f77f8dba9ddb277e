"""batchnorm reproduce: what it lists, writes, refuses, and where it goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import invoke

from batchnorm.cli.reproduce import reproduce
from batchnorm.experiments import load
from batchnorm.experiments.runner import file_of


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "batchnorm", "reproduce", *options], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, out + err
    return out + err


def test_without_names_it_lists_the_claims(tmp_path: Path) -> None:
    out = invoke(reproduce, tmp_path).stdout
    assert "Section 3.2" in out
    assert "capacity" in out
    assert list(tmp_path.iterdir()) == []


def test_report_table_and_pictures(tmp_path: Path) -> None:
    done = invoke(reproduce, tmp_path, "scale", "convolution", "--quick", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "confirmed" in done.stdout
    directory = tmp_path / "runs" / "reproduce" / "quick"
    report = (directory / "report.md").read_text()
    assert "## scale" in report
    assert "**Confirmed.** With eps = 0 the errors are at most" in report
    assert "| what | eps = 0 | eps = 1e-5, a = 1e-3 | eps = 1e-5, a = 1e3 |" in report
    assert json.loads((directory / "results.json").read_text())["results"]["scale"]["verdict"] == "confirmed"
    for name in ("scale", "convolution"):
        assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    options = ("convolution", "--quick", "--seeds", "12", "--workers", "1", "--out", "o")
    process = start(tmp_path, *options)
    cells = tmp_path / "o" / "cells" / "convolution"
    until = time.monotonic() + 100
    while not list(cells.glob("*.json")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    first = {file: file.stat().st_mtime_ns for file in cells.glob("*.json")}
    assert 0 < len(first) < 12
    done = invoke(reproduce, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert len(list(cells.glob("*.json"))) == 12
    assert all(file.stat().st_mtime_ns == written for file, written in first.items())


def test_a_claim_that_fails_is_a_result(tmp_path: Path) -> None:
    cell = load("scale").cells(True, 1)[0]
    measured = load("scale").measure(**cell)
    file = file_of(tmp_path / "o", "scale", cell)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(cell | measured | {"output, eps=0": [1.0] * len(measured["scales"])}))
    done = invoke(reproduce, tmp_path, "scale", "--quick", "--out", "o")
    assert done.returncode == 0, done.stderr
    assert "not confirmed" in done.stdout
    assert (
        "**Not confirmed.** With eps = 0 the errors are at most 1.0e+00" in (tmp_path / "o" / "report.md").read_text()
    )


@pytest.mark.parametrize("how", ["ctrl-c", "a scheduler", "the parent alone", "a worker"])
def test_what_is_stopped_leaves_nobody_behind(tmp_path: Path, how: str) -> None:
    process = start(tmp_path, "ensemble", "--quick", "--seeds", "2", "--workers", "2")  # cells of a minute
    workers = set()
    until = time.monotonic() + 100
    while len(workers) < 2:
        assert time.monotonic() < until
        time.sleep(0.1)
        listed = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
        workers = {int(pid) for pid in listed.stdout.split()}
    time.sleep(5)  # they have started
    if how == "a worker":
        os.kill(workers.pop(), signal.SIGKILL)
        assert "Run the same command again to resume." in finish(process, 1)
    elif how in ("ctrl-c", "a scheduler"):
        os.killpg(process.pid, signal.SIGINT) if how == "ctrl-c" else os.kill(process.pid, signal.SIGTERM)
        assert finish(process, 130).endswith("Stopped. Run the same command again to resume.\n")
    else:
        process.kill()
        process.communicate()
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["speed"], 'reproduce: unknown experiment "speed". Known: steps'),
        (["scale", "--all"], "--all runs all of them"),
        (["scale", "--seeds", "0"], "--seeds must be at least 1 (got 0)"),
        (["scale", "--data", "there"], "no train-images-idx3-ubyte.gz in "),
        (["scale", "--out", "there"], "there holds results of another kind: quick was True, is False"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text('{"quick": true}')
    done = invoke(reproduce, tmp_path, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert len((done.stdout + done.stderr).strip().splitlines()) == 1

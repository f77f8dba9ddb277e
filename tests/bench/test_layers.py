"""The benchmark: what it times is right, what is wrong it refuses, and its numbers mean what they say."""

import json
import subprocess
import sys

import pytest
import torch
from commands import invoke

from batchnorm.bench import layers
from batchnorm.bench.layers import Case, Row, bench, geometric_mean, measure, wrong
from batchnorm.cli.bench import bench as command


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_a_row_holds_every_side(residual, training):
    row = measure(
        Case((4, 3, 5, 5), "channels-last", residual=residual, training=training), ("ours", "eager", "copy"), 0, 1
    )
    assert row.error is None
    assert row.rounds == 7
    assert set(row.seconds) == set(row.spread) == {"ours", "eager", "copy"}
    assert row.ratio("ours") == 1
    assert row.ratio("compiled") is None


def test_what_is_wrong_is_not_timed(monkeypatch):
    right = layers.BatchNorm2d.forward
    monkeypatch.setattr(layers.BatchNorm2d, "forward", lambda self, x, residual=None: right(self, x, residual) * 1.001)
    row = measure(Case((4, 3, 5, 5)), ("ours", "eager"), 0, None)
    assert "y is off by" in row.error
    assert not row.seconds


@pytest.mark.parametrize("dtype", layers.DTYPES)
def test_ours_is_right_in_every_dtype(dtype):
    for activation in layers.ACTIVATIONS:
        for shape in ((64, 5), (8, 3, 6, 7)):
            assert wrong(Case(shape, dtype=dtype, activation=activation, residual=True)) is None


def test_the_floor_counts_reads_and_writes():
    assert Case((2, 3, 4, 4)).floor() == 2 + 3  # x, y; x, dy, dx
    assert Case((2, 3, 4, 4), "channels-last").floor() == 3 + 5  # x twice, y; x and dy twice, dx
    assert Case((2, 3, 4, 4), residual=True).floor() == 3 + 5  # and r; y, dr
    assert Case((2, 3, 4, 4), training=False).floor() == 2
    assert Case((2, 3, 4, 4), backward=False).floor() == 2
    assert Case((2, 3, 4, 4), device="cuda").floor() == 3 + 5  # many channels at once, in any layout
    row = Row(Case((2, 3, 4, 4)), {"ours": 5.0, "copy": 3.0}, {}, 7)
    assert row.over_floor() == 1  # a copy: a read, a read for ownership, a write


def test_geometric_mean():
    assert geometric_mean([1, 4]) == 2
    assert geometric_mean([]) is None


def test_rows_come_from_a_process_of_their_own_whose_malloc_keeps_memory(monkeypatch):
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    before = torch.get_num_threads()
    (row,) = bench([Case((4, 3))], ("ours", "copy"), seconds=0, threads=1)
    assert row.error is None
    assert torch.get_num_threads() == before
    assert "MALLOC_TOP_PAD_" not in layers.os.environ


def run(*options):
    return subprocess.run([sys.executable, "-m", "batchnorm", "bench", *options], capture_output=True, text=True)


def measured_here(cases, sides, *, seconds, threads, keep_memory):
    return (measure(case, sides, seconds, threads) for case in cases)


def test_the_command_times_a_shape():
    done = run("--shape", "8x3", "--seconds", "0.01", "--no-compile")
    assert done.returncode == 0, done.stderr
    assert "geometric mean" in done.stdout


def test_the_command_prints_a_table_and_writes_json_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "bench", measured_here)
    files = tmp_path / "rows.json", tmp_path / "bars.png"
    done = invoke(command, tmp_path, "--shape", "4,3,5,5", "--shape", "8x3", "--seconds", "0.01", "--no-compile",
                  "--json", str(files[0]), "--plot", str(files[1]))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "geometric mean" in done.stdout
    rows = json.loads(files[0].read_text())["rows"]
    assert [row["case"]["layout"] for row in rows] == ["contiguous", "channels-last", "contiguous"]
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shape", "3"), "expected 2 to 5 sizes"),
        (("--shape", "1,3"), "one value per channel"),
        (("--dtype", "int8"), "Known: float32"),
        (("--layout", "NHWC"), "Known: contiguous"),
        (("--activation", "softplus"), "Known: none, relu"),
        (("--network", "vgg"), "Known: resnet18"),
        (("--seconds", "0"), "must be above 0"),
        (("--table", "vgg"), "Known: cpu, resnet50-64"),
        (("--device", "tpu"), "Known: cpu, cuda"),
        (("--json", "/nowhere/rows.json"), "there is no directory"),
    ],
)
def test_bad_options_end_in_one_line(options, words, tmp_path):
    done = invoke(command, tmp_path, *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1

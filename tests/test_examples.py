"""examples/: every contender of each gets better than it was untrained; the command that one names races it."""

import csv
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import invoke

import batchnorm as bn
from batchnorm.cli.race import race

EXAMPLES = Path(__file__).parent.parent / "examples"
NORMALIZED = ["as-is", "without-bn", "paper", "fast", "fused"]
PLAIN = ["baseline", "short@2", "bn-x5@2", "sgd@2"]  # budgets that are enough in so few steps
RACES = {
    "image_classifier": (NORMALIZED, 60),
    "multi_label": (NORMALIZED, 120),
    "regression": ([*PLAIN, "fast@2"], 120),
    "hugging_face": (NORMALIZED, 60),
}


def task_of(name: str, monkeypatch: pytest.MonkeyPatch) -> bn.Task:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, name, raising=False)
    task = importlib.import_module(name).task()
    few = torch.utils.data.Subset(task.test, range(250))
    return replace(task, test=few)


@pytest.mark.parametrize("name", RACES)
def test_every_contender_of_an_example_learns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contenders, steps = RACES[name]
    task = task_of(name, monkeypatch)
    own = [f"{each}@2" if each in ("paper", "fast") else each for each in contenders]
    results = bn.race(task, own, steps=steps, seeds=1, mode="quick", out=tmp_path / "o")
    sign = -1 if results["lower_is_better"] else 1
    with (tmp_path / "o" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in results["contenders"]:
        first = next(float(r["score"]) for r in rows if r["contender"] == row["name"])
        assert not row["status"].startswith("diverged"), row
        assert sign * row["end"] > sign * first, row["name"]
    assert results["target"] is not None
    assert not any(warning.startswith(results["plan"]["contenders"][0]["name"]) for warning in results["warnings"])


def test_my_model_races_by_the_command_that_it_names(tmp_path: Path) -> None:
    options = ("--task", "my_model:task", "--quick", "--workers", "1", "--seeds", "1", "--out", str(tmp_path / "o"))
    done = invoke(race, EXAMPLES, *options)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    rows = {row["name"]: row for row in results["contenders"]}
    assert not results["warnings"]
    assert results["target"] > 1 / 2  # far from chance, which is 1 / 8
    assert 0 < rows["sgd"]["steps_fraction"] < 1 / 2.5  # in its budget


def test_lightning_module_races(tmp_path: Path) -> None:
    names = ("--contenders", "baseline,bn-x5", "--steps", "200", "--seeds", "1", "--quick")
    done = invoke(
        race, EXAMPLES, "--task", "lightning_module:task", *names, "--workers", "1", "--out", str(tmp_path / "o")
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["plan"]["metric"] == "val_acc"
    assert results["target"] > 1 / 8  # better than chance

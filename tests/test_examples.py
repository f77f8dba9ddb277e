"""examples/: the task that shows how to race one's own model runs, by the command that it names."""

import json
from pathlib import Path

from commands import invoke

from batchnorm.cli.race import race

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_my_model_races(tmp_path: Path) -> None:
    options = ("--task", "my_model:task", "--quick", "--workers", "1", "--out", str(tmp_path / "o"))
    done = invoke(race, EXAMPLES, *options)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    rows = {row["name"]: row for row in results["contenders"]}
    assert results["target"] > 1 / 8  # better than chance
    assert rows["bn-x5"]["best_accuracy"] > results["target"]  # a deep network, where BN shows at once


def test_lightning_module_races(tmp_path: Path) -> None:
    names = ("--contenders", "baseline,bn-x5", "--steps", "200", "--seeds", "1", "--quick")
    done = invoke(
        race, EXAMPLES, "--task", "lightning_module:task", *names, "--workers", "1", "--out", str(tmp_path / "o")
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["plan"]["metric"] == "val_acc"
    assert results["target"] > 1 / 8  # better than chance

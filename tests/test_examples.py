"""examples/: the task that shows how to race one's own model runs, by the command that it names."""

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_my_model_races(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "batchnorm",
        "race",
        "--task",
        "my_model:task",
        "--quick",
        "--out",
        str(tmp_path / "o"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    rows = {row["name"]: row for row in results["contenders"]}
    assert results["target"] > 1 / 8  # better than chance
    assert rows["bn-x5"]["best_accuracy"] > results["target"]  # a deep network, where BN shows at once

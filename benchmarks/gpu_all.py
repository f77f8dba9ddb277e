"""All checks and all timings of the kernels for CUDA in one call of less than 8 minutes. From the root, on a GPU:

    python benchmarks/gpu_all.py --out results-gpu [--minutes 7.5]

First the tests on the GPU, then the sections below in their order, then a training step of ResNet-50 (it needs
transformers). What no time is left for is named. Writes results.json after each section, and bars.png of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from batchnorm.bench.layers import SIDES, Case, geometric_mean, measure
from batchnorm.bench.networks import bench_network
from batchnorm.bench.tables import TABLES
from batchnorm.cli.bench import cases_of, draw, machine, table_of

# Name: table, layout, dtype, activation, residual, training, backward, with torch.compile.
SECTIONS: dict[str, tuple[str, str, str, str, bool, bool, bool, bool]] = {
    "BN + add + ReLU": ("resnet50-64", "channels-last", "bfloat16", "relu", True, True, True, True),
    "tiny call": ("tiny", "contiguous", "float32", "none", False, True, True, False),
    "BN + ReLU": ("resnet50-64", "both", "bfloat16", "relu", False, True, True, False),
    "BN": ("resnet50-64", "channels-last", "bfloat16", "none", False, True, True, False),
    "BN + add + ReLU, batch 256": ("resnet50-256", "channels-last", "bfloat16", "relu", True, True, True, False),
    "BN + ReLU, MobileNetV2": ("mobilenetv2-64", "channels-last", "bfloat16", "relu6", False, True, True, False),
    "BN + ReLU, float32": ("resnet50-64", "both", "float32", "relu", False, True, True, False),
    "BN + ReLU, forward": ("resnet50-64", "channels-last", "bfloat16", "relu", False, True, False, False),
    "BN + ReLU, inference": ("resnet50-64", "channels-last", "bfloat16", "relu", False, False, False, False),
    "BN + ReLU, float16": ("resnet50-64", "channels-last", "float16", "relu", False, True, True, False),
}
CHECKS = 150.0  # seconds for the tests at the most
NETWORK = 75.0  # seconds kept for the network
EACH = 0.15  # seconds of timing for a case


def check(seconds: float, out: Path) -> dict[str, Any]:
    """The tests on the GPU, on all cores: they mostly compile. What they print is in checks.txt."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--maxfail", "20", "tests/ops/test_cuda.py"]
    file = out / "checks.txt"
    with (
        file.open("w") as printed,
        subprocess.Popen(command, stdout=printed, stderr=printed, start_new_session=True) as run,
    ):
        try:
            passed = run.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # its workers too: they would use the GPU beside the timings
            return {"passed": None, "last": f"not done after {seconds:.0f} s"}
    return {"passed": passed, "last": file.read_text().strip().splitlines()[-1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results-gpu"))
    parser.add_argument("--minutes", type=float, default=7.5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_all: torch sees no GPU here (torch.cuda.is_available() is False).\n")
    options.out.mkdir(parents=True, exist_ok=True)
    until, console = time.monotonic() + 60 * options.minutes, Console(width=140)
    results: dict[str, Any] = {"torch": torch.__version__, **machine("cuda"), "sections": {}, "left out": []}

    def save() -> None:
        file = options.out / "results.json.part"
        file.write_text(json.dumps(results, indent=1))
        file.replace(options.out / "results.json")

    results["checks"] = check(CHECKS, options.out)
    console.print("checks:", results["checks"])
    for name, (table, layout, dtype, activation, residual, training, backward, compiled) in SECTIONS.items():
        like = Case((), "", dtype, activation, residual, training, backward, "cuda")
        sides, rows = tuple(side for side in SIDES if compiled or not side.endswith("compiled")), []
        for case in cases_of(TABLES[table], layout, like):
            if time.monotonic() > until - NETWORK:
                results["left out"].append(f"{name}: {case.shape}, {case.layout}")
            else:
                rows.append(measure(case, sides, EACH, None))
                torch.cuda.empty_cache()
                results["sections"][name] = {"rows": [row.as_json() for row in rows]}
                save()
        if rows:
            console.rule(name)
            console.print(table_of(rows, sides))
            eager = [ratio for row in rows if (ratio := row.ratio("eager"))]
            results["sections"][name]["eager / ours"] = geometric_mean(eager)
            if name == next(iter(SECTIONS)):
                draw(
                    rows, sides, options.out / "bars.png", f"{name}, {dtype}, {layout}, {torch.cuda.get_device_name()}"
                )
        save()
    if time.monotonic() < until - NETWORK / 2:
        try:
            network = bench_network("resnet50", batch=64, size=224, channels_last=True, steps=9, device="cuda")
            results["network"] = asdict(network)
        except Exception as error:  # without transformers, say: what is there already stays
            results["network"] = {"error": f"{type(error).__name__}: {error}"}
        console.print(results["network"])
    else:
        results["left out"].append("resnet50")
    save()
    console.print("left out:", results["left out"] or "nothing")
    wrong = [row for s in results["sections"].values() for row in s["rows"] if row["error"]]
    sys.exit(not results["checks"]["passed"] or bool(wrong))


if __name__ == "__main__":
    main()

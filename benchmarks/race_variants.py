"""What was tried on the way to the contenders: variants of one, on held-out training images. From the root:

    python benchmarks/race_variants.py [accelerated|baseline] [--rate 0.4] [--batch-size 256] [--seeds 2] [--workers 2]

A variant is one row of VARIANTS. The test images are not looked at. Prints a Markdown table for docs/results.md.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from statistics import mean
from typing import Any

import torch

from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.plan import EVALUATIONS, TUNED_FILE, read_tuned
from batchnorm.racing.task import Task, load_task
from batchnorm.racing.trainer import Evaluation, Run, train

# What is changed of the contender, or of its recipe.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "accelerated": [
        {},
        {"nesterov": False},
        {"average": 0.98},
        {"recalibrate": 0},
        {"schedule": "cosine"},
        {"schedule": "constant", "average": 0.98},
        {"weight_decay": 1.0},
        {"weight_decay": 30.0},
        {"dropout": 1.0},
    ],
    "baseline": [
        {},
        {"schedule": "exponential"},
        {"nesterov": True},
        {"weight_decay": 0.2},
        {"weight_decay": 10.0},
        {"dropout": 0.0},
    ],
}


def held_out_score(name: str, change: dict[str, Any], rate: float, seed: int, batch_size: int) -> float:
    """The best score of one run within its budget."""
    torch.set_num_threads(1)
    task = scaled_task(batch_size)
    contender = CONTENDERS[name]
    of_recipe = {key: value for key, value in change.items() if hasattr(contender.recipe, key)}
    others = {key: value for key, value in change.items() if key not in of_recipe}
    contender = replace(contender, recipe=replace(contender.recipe, **of_recipe), **others)
    run = Run(contender, seed, rate, task.steps, task.steps // EVALUATIONS["default"])
    return max(event.score for event in train(task, run) if isinstance(event, Evaluation))


def scaled_task(batch_size: int) -> Task:
    """The default task at another batch size: as many epochs, so fewer steps."""
    task = load_task("inception")
    return replace(task, batch_size=batch_size, steps=task.steps * task.batch_size // batch_size).for_tuning()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=VARIANTS, nargs="?", default="accelerated")
    parser.add_argument("--rate", type=float, help="default: the stored one")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rate = options.rate or read_tuned("inception", "default", TUNED_FILE, 256)[options.contender]
    jobs = [(change, seed) for change in VARIANTS[options.contender] for seed in range(options.seeds)]
    print(f"| {options.contender} with | best held-out accuracy, mean of {options.seeds} seeds | each seed |")
    print("|---|---:|---|")
    with ProcessPoolExecutor(options.workers) as pool:
        futures = [
            pool.submit(held_out_score, options.contender, change, rate, seed, options.batch_size)
            for change, seed in jobs
        ]
        for i in range(0, len(jobs), options.seeds):
            scores = [future.result() for future in futures[i : i + options.seeds]]
            words = ", ".join(f"{key} = {value}" for key, value in jobs[i][0].items()) or "nothing changed"
            print(f"| {words} | {mean(scores):.2%} | {', '.join(f'{score:.2%}' for score in scores)} |", flush=True)


if __name__ == "__main__":
    main()

"""What a race leaves behind: the paper's table, ``results.json``, ``curves.csv``; plots are in ``plots.py``.

Comes from: ``score.py``. Goes to: the terminal and the output directory.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from batchnorm.racing.contenders import Contender
from batchnorm.racing.plan import Plan
from batchnorm.racing.score import REACHED, Record


def rules(plan: Plan) -> str:
    """The rules in short, printed under every result; docs/race.md has them in full."""
    seeds = f"means over {plan.seeds} seeds, with 95% intervals" if plan.seeds > 1 else "ONE seed: no interval"
    untuned = [c.name for c in plan.contenders if c.tuned and c.name not in plan.tuned]
    precision = "forward and loss in bfloat16, " if plan.mixed_precision else ""
    return (
        f"Rules: same network, initialization seed, data order and batch size ({plan.batch_size}) for all; {precision}"
        f"evaluated on the test examples every {plan.interval:,} steps. Target: the mean over seeds of the best "
        "accuracy that the baseline reaches; a contender is scored by its first evaluation at or above it, the "
        "baseline by the first at its own best. Seconds are training alone: steps x median step time, taken alone and "
        "interleaved, plus one re-estimation of statistics where a contender has one. "
        f"{seeds[0].upper()}{seeds[1:]}."
        + (f" NOT TUNED for this task: the learning rate of {', '.join(untuned)}; see --tune." if untuned else "")
    )


def changes(contender: Contender, tuned: bool = True) -> str:
    """What a contender changes against the baseline, in words. ``tuned``: its rate, on this task, if it has its own."""
    recipe = contender.recipe
    parts = ["BN"] if contender.batch_norm else []
    if recipe.dropout != 1:
        parts.append(f"dropout x{recipe.dropout:g}" if recipe.dropout else "no dropout")
    parts += [f"{key}={value}" for key, value in contender.network.items()]
    if contender.tuned and tuned:
        parts.append("own tuned learning rate")
    elif recipe.learning_rate != 1:
        parts.append(f"learning rate x{recipe.learning_rate:g}")
    if recipe.weight_decay != 1:
        parts.append(f"weight decay x{recipe.weight_decay:g}")
    if recipe.nesterov:
        parts.append("Nesterov momentum")
    if contender.schedule != "linear":
        parts.append(f"{contender.schedule} schedule")
    if recipe.decay_speed != 1:
        parts.append(f"learning rate at zero after {100 * contender.budget:.3g}% of the steps")
    if contender.average:
        parts.append(f"averaged weights (decay {contender.average:g})")
    if contender.recalibrate:
        parts.append(f"statistics re-estimated on {contender.recalibrate:,} training examples")
    return "nothing" if contender.name == "baseline" else ", ".join(parts)


def table(results: Mapping[str, Any], plan: Plan) -> Table:
    """The paper's table, with the time beside the steps."""
    view = Table(title=title(results, plan), title_justify="left")
    view.add_column("contender", no_wrap=True)
    for heading in (
        "learning rate",
        "steps to target",
        "of baseline",
        "epochs",
        "seconds",
        "of baseline",
        "best accuracy",
    ):
        view.add_column(heading, justify="right")
    for row in results["contenders"]:
        view.add_row(
            row["name"],
            f"{row['learning_rate']:g}",
            _with_interval(row["steps_to_target"], row["steps_interval"], "{:,.0f}"),
            _or_dash(row["steps_fraction"], "{:.1%}"),
            _or_dash(row["epochs_to_target"], "{:.1f}"),
            _or_dash(row["seconds_to_target"], "{:,.2f}" if (row["seconds_to_target"] or 0) < 10 else "{:,.0f}"),
            _or_dash(row["seconds_fraction"], "{:.1%}"),
            _with_interval(row["best_accuracy"], row["best_accuracy_interval"], "{:.2%}"),
        )
    return view


def title(results: Mapping[str, Any], plan: Plan) -> str:
    """The question and the target."""
    target = results["target"]
    goal = "no target: the baseline diverged" if target is None else f"target: {target:.2%} (the baseline's best)"
    return f"{plan.task}: steps and seconds to the same accuracy; {goal}"


def notes(results: Mapping[str, Any], plan: Plan) -> list[str]:
    """What each contender changes, and how it ended where it did not reach the target."""
    lines = []
    for contender, row in zip(plan.contenders, results["contenders"], strict=True):
        ended = "" if row["status"] == REACHED else f". Outcome: {row['status']}"
        if ended or contender.name != "baseline":
            lines.append(f"{contender.name} changes: {changes(contender, contender.name in plan.tuned)}{ended}")
    if plan.left_out:
        lines.append(f"left out, since the model function lacks the keywords: {', '.join(plan.left_out)}")
    return lines


def show(results: Mapping[str, Any], plan: Plan, console: Console) -> None:
    """Print table, notes and rules."""
    console.print(table(results, plan))
    for text in (*(f"- {note}" for note in notes(results, plan)), rules(plan)):
        console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def markdown(results: Mapping[str, Any], plan: Plan) -> str:
    """The same table for a README, with what each contender changes."""
    view = table(results, plan)
    cells = [[str(cell) for cell in column.cells] for column in view.columns]
    lines = [
        "| " + " | ".join(str(column.header) for column in view.columns) + " |",
        "|" + "|".join("---" if column.justify == "left" else "---:" for column in view.columns) + "|",
        *("| " + " | ".join(row) + " |" for row in zip(*cells, strict=True)),
    ]
    listed = [f"- {note}" for note in notes(results, plan)]
    return "\n".join([title(results, plan), "", *lines, "", *listed, "", rules(plan), ""])


def curves_csv(records: Mapping[str, Sequence[Record]]) -> str:
    """One line per evaluation of every run."""
    out = io.StringIO()
    writer: Any = None
    for name, runs in records.items():
        for run in runs:
            for point in run["curve"]:
                line = {
                    "contender": name,
                    "seed": run["seed"],
                    "learning_rate": run["learning_rate"],
                    **point,
                }
                writer = writer or csv.DictWriter(out, line, lineterminator="\n")
                if not out.tell():
                    writer.writeheader()
                writer.writerow(line)
    return out.getvalue()


def environment(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "batchnorm": version("batchnorm"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads_per_run": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _commit() -> str | None:
    """The commit of the source tree that runs; None where git does not keep this file."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _with_interval(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    if value is None or interval is None:
        return _or_dash(value, form)
    half = form.format((interval[1] - interval[0]) / 2).removesuffix("%")
    return f"{form.format(value)} ± {half}"

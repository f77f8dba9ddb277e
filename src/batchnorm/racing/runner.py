"""The race from plan to results: check, train, time, score, report; it survives being killed.

Comes from: ``bn.race`` and the command line. Goes to: the output directory (config.json, runs/, results.json,
curves.csv, plots) and the terminal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from batchnorm.racing import pool
from batchnorm.racing.errors import RaceError
from batchnorm.racing.plan import CONFIG, Mode, Plan, check_task, make_plan
from batchnorm.racing.task import Task
from batchnorm.racing.trainer import Run, Trainer

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

TIMING = {"quick": (5, 8), "default": (10, 20), "full": (20, 20)}  # rounds and steps per contender and round


def race(
    task: Task,
    contenders: Sequence[str] | None = None,
    *,
    seeds: int | None = None,
    steps: int | None = None,
    mode: Mode = "default",
    out: str | os.PathLike[str] | None = None,
    rates: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Train the contenders under the same rules: steps and seconds until each is as good as the baseline's best.

    Runs in this process, one contender after the other, on one thread; the command ``batchnorm race`` uses all cores
    and survives being killed. Rules: docs/race.md.

    Args:
        task: network, data, loss, metric, batch size and budget.
        contenders: names, ``"baseline"`` among them; default: baseline, bn-x5 and accelerated.
        seeds: runs per contender; default: 3 (``mode="quick"``: 1).
        steps: the baseline's budget; default: the task's for this mode.
        mode: ``"quick"``, ``"default"`` or ``"full"``.
        out: directory for results.json, curves.csv and the plots; default: ``runs/<task>-<time>``.
        rates: a ``tuning.json`` written by ``batchnorm race --tune``.

    Returns:
        What results.json holds: ``{"target": float, "contenders": [...], "environment": {...}, "command": ...}``.

    Raises:
        RaceError: (a ValueError) an unknown contender, a wrong value, a directory that cannot be written.
    """
    from rich.console import Console

    plan = make_plan(
        task, spec=task.name, contenders=contenders, mode=mode, seeds=seeds, steps=steps, rates=rates
    )  # fmt: skip
    directory = Path(out) if out is not None else default_directory(task.name)
    with _one_thread():
        return run_race(task, plan, directory, Console(), resume=False, workers=0, command="bn.race(...)")


def run_race(
    task: Task, plan: Plan, directory: Path, console: Console, *, resume: bool, workers: int, command: str
) -> dict[str, Any]:
    """Carry out a plan; ``workers=0`` trains in this process (as every rank under torchrun does)."""
    from batchnorm.racing.display import Display

    main = not dist.is_initialized() or dist.get_rank() == 0
    check_task(plan, task)
    _check_contenders(task, plan)
    if main and not resume:
        _prepare(directory, plan)
    runs, records_directory = plan.runs(), directory / "runs"
    done = _agreed([run for run in runs if pool.finished(records_directory, run)] if main else [])
    todo = [run for run in runs if run not in done]
    if workers and todo:
        stream = pool.run_in_processes(plan, todo, records_directory, min(workers, len(todo)))
    else:
        stream = pool.run_here(task, todo, records_directory, write=main)
    if main:
        with Display(runs, done, console) as display:
            for run, event in stream:
                display.update(run, event)
    else:
        for _ in stream:
            pass
    records = _records(plan, records_directory) if main else {}
    if plan.tune:
        return _report_tuning(task, plan, records, directory, console, command) if main else {}
    times = _times(task, plan, directory, console, main)
    return _report(plan, records, times, directory, console, command) if main else {}


def default_directory(task: str) -> Path:
    """Where results go unless said otherwise: named after the task and the time."""
    return Path("runs") / f"{task.replace(':', '.')}-{datetime.now():%Y%m%d-%H%M%S}"


def _prepare(directory: Path, plan: Plan) -> None:
    if (directory / CONFIG).exists():
        raise RaceError(f"{directory} already holds a race: go on with --resume {directory}, or choose another --out.")
    try:
        (directory / "runs").mkdir(parents=True, exist_ok=True)
        pool.write_json(directory / CONFIG, asdict(plan))
    except OSError as error:
        raise RaceError(f"--out {directory} cannot be written: {error.strerror}.") from None


def _check_contenders(task: Task, plan: Plan) -> None:
    """One step and one scored batch of each contender, before any long work: mistakes in a task show here."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if task.batch_size % ranks:
        raise RaceError(f"a batch of {task.batch_size} does not divide among {ranks} processes.")
    for contender in plan.contenders:
        run = Run(contender, 0, plan.learning_rates[contender.name], plan.steps, plan.interval)
        try:
            trainer = Trainer(task, run)
            trainer.step()
            inputs, targets = task.test[torch.arange(min(2, len(task.test)))]
            trainer.model.eval()
            with torch.no_grad():
                float(task.metric(trainer.model(inputs), targets))
        except Exception as error:
            raise RaceError(
                f"task {task.name!r} does not run as contender {contender.name!r}: {type(error).__name__}: {error}"
            ) from error


def _agreed(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _records(plan: Plan, directory: Path) -> dict[str, list[dict[str, Any]]]:
    records: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in plan.contenders}
    for run in sorted(plan.runs(), key=lambda run: run.seed):
        record = pool.finished(directory, run)
        assert record is not None, f"{run.name} has left no record"
        records[run.contender.name].append(record)
    return records


def _times(task: Task, plan: Plan, directory: Path, console: Console, main: bool) -> dict[str, Any]:
    """Step times, measured when nothing else runs; kept, so that a race resumed after its end reports the same."""
    from batchnorm.racing.timing import StepTime, time_steps

    file = directory / "times.json"
    known = _agreed(json.loads(file.read_text()) if main and file.exists() else None)
    if known is None:
        if main:
            console.print("Timing steps, alone and interleaved ...", highlight=False)
        first = [replace(run, seed=0) for run in plan.runs() if run.seed == 0]
        rounds, steps = TIMING[plan.mode]
        known = {name: asdict(t) for name, t in time_steps(task, first, rounds=rounds, steps=steps).items()}
        if main:
            pool.write_json(file, known)
    return {name: StepTime(**{**t, "quartiles": tuple(t["quartiles"])}) for name, t in known.items()}


def _report(
    plan: Plan,
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    times: dict[str, Any],
    directory: Path,
    console: Console,
    command: str,
) -> dict[str, Any]:
    from batchnorm.racing import plots, report
    from batchnorm.racing.score import score

    results = score(plan, records, times)
    results |= {"environment": report.environment(), "command": command, "plan": asdict(plan)}
    for row, contender in zip(results["contenders"], plan.contenders, strict=True):
        row["changes"] = report.changes(contender)
    pool.write_json(directory / "results.json", results)
    (directory / "curves.csv").write_text(report.curves_csv(records))
    (directory / "results.md").write_text(report.markdown(results, plan))
    images = plots.plot(results, records, directory)
    console.print(report.table(results, plan))
    for contender in plan.contenders[1:]:
        console.print(
            f"  {contender.name} changes: {report.changes(contender)}",
            highlight=False,
            soft_wrap=not console.is_terminal,
        )
    console.print(report.rules(plan), highlight=False, soft_wrap=not console.is_terminal)
    console.print(
        f"Written: {directory}/results.json, curves.csv, results.md, {', '.join(p.name for p in images)}",
        soft_wrap=not console.is_terminal,
    )
    return results


def _report_tuning(
    task: Task,
    plan: Plan,
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    directory: Path,
    console: Console,
    command: str,
) -> dict[str, Any]:
    from batchnorm.racing import tuning

    result = tuning.sweep(plan, records, task.name, command)
    file = directory / "tuning.json"
    pool.write_json(file, result)
    console.print(tuning.table(result[task.name][plan.mode]["scores"]))
    console.print(
        f"Written: {file}. Race with these rates: batchnorm race --task {plan.task} --rates {file}",
        soft_wrap=not console.is_terminal,
    )
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """The steps of a race are small: on one thread they are faster, and the numbers those of the command."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

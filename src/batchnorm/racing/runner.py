"""The race from plan to results: check, train, time, score, report; it survives being killed."""

from __future__ import annotations

import json
import os
import re
import shlex
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
from batchnorm.racing.events import Progress, Run
from batchnorm.racing.plan import CONFIG, IN_PROCESS, Asked, Mode, Plan, check_same, make_plan, source_of, stored_in
from batchnorm.racing.seeds import own_random_numbers
from batchnorm.racing.task import Task
from batchnorm.racing.trial import try_contenders

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

TIMING = {"quick": (5, 8), "default": (10, 10), "full": (20, 20)}  # rounds and steps per contender and round


def race(
    task: Task,
    contenders: Sequence[Asked] | None = None,
    *,
    seeds: int | None = None,
    first_seed: int = 0,
    steps: int | None = None,
    mode: Mode = "default",
    out: str | os.PathLike[str] | None = None,
    rates: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train the contenders under the same rules: steps and seconds until each is as good as the baseline at its end.

    Runs in this process, one contender after the other, on one thread; the command ``batchnorm race`` uses all cores.
    Rules: docs/race.md.

    Args:
        task: network, data, loss, metric, batch size and budget.
        contenders: names, recipes or ``batchnorm.Contender``s, ``"baseline"`` or ``"as-is"`` among them, which is the
            training as it is and sets the target. Default: for a network without batch normalization baseline, short,
            bn-x5, sgd, fast, fast-without-bn; for one that has it as-is, without-bn, paper, fast, fast-without-bn,
            fused; in the other modes others (docs/race.md).
        seeds: runs per contender; default: 8 (``mode="quick"``: 2).
        first_seed: of the seeds, which are whole numbers from there on.
        steps: the baseline's budget; default: the task's for this mode.
        mode: ``"quick"``, ``"default"`` or ``"full"``.
        out: directory for results.json, curves.csv and the plots; default: ``runs/<task>-<time>``.
        rates: a ``tuning.json`` written by ``batchnorm race --tune``.
        resume: go on with the race that was interrupted in ``out``; everything else must be as it was.

    Returns:
        What results.json holds: ``{"target": float, "contenders": [...], "environment": {...}, "command": ...}``.

    Raises:
        RaceError: (a ValueError) an unknown contender, a wrong value, a directory that cannot be written.
        ModuleNotFoundError: the packages of ``pip install 'batchnorm[race]'`` are missing.
    """
    from rich.console import Console

    if not isinstance(task, Task):
        raise RaceError(f"task must be a batchnorm.Task (got {type(task).__name__}).")
    plan = make_plan(
        task,
        spec=task.name,
        contenders=contenders,
        mode=mode,
        seeds=seeds,
        first_seed=first_seed,
        steps=steps,
        rates=rates,
        command=IN_PROCESS,
    )
    if resume and out is None:
        raise RaceError("resume=True goes on in the directory that out= names.")
    directory = Path(out) if out is not None else default_directory(task.name)
    stored, now = stored_in(directory) if resume else plan.values(), plan.values()
    different = [f"{name} was {stored.get(name)}, is {now[name]}" for name in now if stored.get(name) != now[name]]
    if [words for words in different if not words.startswith("sources was ")]:
        raise RaceError(f"{directory} holds a race of another configuration: {'; '.join(different)}.")
    plan = replace(plan, sources=tuple(stored["sources"]))
    with _one_thread(), torch.random.fork_rng(), own_random_numbers():
        return run_race(task, plan, directory, Console(), resume=resume, workers=0)


def run_race(
    task: Task, plan: Plan, directory: Path, console: Console, *, resume: bool, workers: int
) -> dict[str, Any]:
    """Carry out a plan; ``workers=0`` trains in this process (as every rank under torchrun does).

    Returns the results on rank 0, an empty dict elsewhere.
    """
    main, processes = (dist.get_rank() == 0, dist.get_world_size()) if dist.is_initialized() else (True, 1)
    check_same(plan, task, processes)
    source = source_of(task, plan.task)
    if plan.sources[-1] != source and not all(pool.finished(directory / "runs", run) for run in plan.runs()):
        plan = replace(plan, sources=(*plan.sources, source))
    try_contenders(task, plan)
    refusal = _agreed(_prepare(directory, plan, resume) if main else None)
    if refusal is not None:
        raise RaceError(refusal)
    with _locked(directory, main):
        if main and resume:
            pool.write_json(directory / CONFIG, plan.values())  # its sources may be more
        runs = plan.runs()
        _train(task, plan, runs, directory, console, main, workers)
        while plan.tune and (more := _agreed(_beyond(plan, runs, directory, console) if main else [])):
            _train(task, plan, more, directory, console, main, workers)
            runs += more
        records = _records(plan, runs, directory) if main else {}
        if plan.tune:
            return _report_tuning(task, plan, records, directory, console) if main else {}
        times = _times(task, plan, directory, console, main)
        return _report(plan, records, times, directory, console) if main else {}


def default_directory(task: str) -> Path:
    """The default directory for results: named after the task and the time."""
    return Path("runs") / f"{task.replace(':', '.')}-{datetime.now():%Y%m%d-%H%M%S}"


def _prepare(directory: Path, plan: Plan, resume: bool) -> str | None:
    """Make the output directory; what speaks against it."""
    try:
        if not resume:
            if (directory / CONFIG).exists():
                return f"{directory} already holds a race: go on with --resume {directory}, or choose another --out."
            (directory / "runs").mkdir(parents=True, exist_ok=True)
            pool.write_json(directory / CONFIG, plan.values())
    except OSError as error:
        return f"--out {directory} cannot be written: {error.strerror}."
    return None


@contextmanager
def _locked(directory: Path, main: bool) -> Iterator[None]:
    """One race at a time in a directory; then what a killed one left half-written can go."""
    if not main:
        yield
        return
    from filelock import FileLock, Timeout  # comes with torch

    lock = FileLock(directory / ".lock", timeout=5)  # the processes of a killed race need a moment to end
    try:
        lock.acquire()
    except Timeout:
        raise RaceError(f"another race is running in {directory}.") from None
    try:
        for part in (*directory.glob("*.part*"), *(directory / "runs").glob("*.part*")):
            if re.fullmatch(r".+\.(json|pt)\.part\d+", part.name):  # a user's own files may lie here too
                part.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _train(
    task: Task, plan: Plan, runs: Sequence[Run], directory: Path, console: Console, main: bool, workers: int
) -> None:
    """Those of the runs that have left no record yet."""
    from batchnorm.racing.display import Display

    records = directory / "runs"
    done = _agreed([run for run in runs if pool.finished(records, run)] if main else [])
    todo = [run for run in runs if run not in done]
    if workers and todo:
        stream = pool.run_in_processes(todo, records, min(workers, len(todo)))
    else:
        stream = pool.run_here(task, todo, records, write=main)
    if not main:
        for _ in stream:
            pass
        return
    base = [run for run in runs if run.contender.name == plan.baseline and not plan.tune]
    with Display(runs, done, console, plan) as display:
        for run, event in stream:
            display.update(run, event)
            if base and not isinstance(event, Progress) and all(pool.finished(records, one) for one in base):
                _say_faults(plan, [pool.finished(records, one) or {} for one in base], console)
                base = []


def _say_faults(plan: Plan, records: Sequence[Mapping[str, Any]], console: Console) -> None:
    """As soon as the baseline has ended: the others may be hours."""
    from batchnorm.racing import checks
    from batchnorm.racing.score import curves_of

    curves = curves_of(records, plan.score_falls) if any(record["curve"] for record in records) else None
    for fault in checks.of_baseline(plan, records, curves):
        console.print(f"NOTE: {fault}", style="bold", highlight=False, markup=False, soft_wrap=True)


def _agreed(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _records(plan: Plan, runs: Sequence[Run], directory: Path) -> dict[str, list[dict[str, Any]]]:
    records: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in plan.contenders}
    for run in sorted(runs, key=lambda run: run.seed):
        record = pool.finished(directory / "runs", run)
        assert record is not None, f"{run.name} has left no record"
        records[run.contender.name].append(record)
    return records


def _times(task: Task, plan: Plan, directory: Path, console: Console, main: bool) -> dict[str, Any]:
    """Step times, measured when nothing else runs, and where; kept, so that a finished race reports the same again."""
    from batchnorm.racing.environment import environment
    from batchnorm.racing.timing import time_steps

    file = directory / "times.json"
    known = _agreed(json.loads(file.read_text()) if main and file.exists() else None)
    if known is None:
        if main:
            console.print("Timing steps, alone and interleaved ...", highlight=False)
        first = [run for run in plan.runs() if run.seed == plan.first_seed]
        rounds, steps = TIMING[plan.mode]
        times = {name: asdict(time) for name, time in time_steps(task, first, rounds=rounds, steps=steps).items()}
        known = {"times": times, "environment": environment(task.device)}
        if main:
            pool.write_json(file, known)
    return known


def _report(
    plan: Plan,
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    times: dict[str, Any],
    directory: Path,
    console: Console,
) -> dict[str, Any]:
    from batchnorm.racing import plots, report
    from batchnorm.racing.score import score
    from batchnorm.racing.timing import StepTime

    results = score(plan, records, {name: StepTime(**time) for name, time in times["times"].items()})
    results |= {"environment": times["environment"], "command": plan.command, "plan": plan.values()}
    for row, contender in zip(results["contenders"], plan.contenders, strict=True):
        row["changes"] = report.changes(contender, plan)
    pool.write_json(directory / "results.json", results)
    (directory / "curves.csv").write_text(report.curves_csv(records))
    (directory / "results.md").write_text(report.markdown(results, plan))
    report.show(results, plan, console)
    images = plots.plot(results, records, plan, directory)
    files = ["results.json", "curves.csv", "results.md", *(image.name for image in images)]
    console.print(
        f"Written: {directory}/{', '.join(files)}", markup=False, highlight=False, soft_wrap=not console.is_terminal
    )
    return results


def _beyond(plan: Plan, runs: Sequence[Run], directory: Path, console: Console) -> list[Run]:
    """The runs of a sweep whose best rate is at the edge of those tried, one rate further."""
    from batchnorm.racing import tuning

    found = tuning.beyond(plan, _records(plan, runs, directory))
    if found:
        rates = dict.fromkeys(f"{run.contender.name} at {run.learning_rate:g}" for run in found)
        console.print(f"The best rate is at the edge of the sweep, so on to {', '.join(rates)} ...", highlight=False)
    return found


def _report_tuning(
    task: Task,
    plan: Plan,
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    directory: Path,
    console: Console,
) -> dict[str, Any]:
    from batchnorm.racing import tuning

    result = tuning.sweep(plan, records, task.name)
    file = directory / "tuning.json"
    pool.write_json(file, result)
    console.print(tuning.table(result[task.name][plan.mode]["scores"], plan))
    data = ["--data", plan.data] if plan.data else []
    same = [*data, "--steps", str(plan.steps), "--batch-size", str(plan.batch_size)]
    use = shlex.join(["batchnorm", "race", "--task", plan.task, *same, "--rates", str(file)])
    console.print(
        f"Written: {file}. Race with these rates: {use}",
        markup=False,
        highlight=False,
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

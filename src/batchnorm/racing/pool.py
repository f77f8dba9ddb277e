"""The runs of a plan on several processes, one thread each, as one stream of events.

Every finished run leaves one JSON file, every unfinished one a checkpoint, so a race that was killed goes on where it
was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from batchnorm.common.files import replacing
from batchnorm.racing.errors import RaceError, WorkerError
from batchnorm.racing.events import Diverged, Evaluation, Event, Resumed, Run, Stopped
from batchnorm.racing.plan import check_same, read_plan, task_of
from batchnorm.racing.task import Task
from batchnorm.racing.training import train

Tagged = tuple[Run, Event]


def finished(directory: Path, run: Run) -> dict[str, Any] | None:
    """The record of a finished run, or None."""
    file = directory / f"{run.name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def run_here(task: Task, runs: Sequence[Run], directory: Path, *, write: bool = True) -> Iterator[Tagged]:
    """Train one after the other in this process; ``write``: this process keeps the records (rank 0)."""
    for run in runs:
        curve: list[Evaluation] = []
        status = "finished"
        checkpoint = directory / f"{run.name}.pt"
        for event in train(task, run, checkpoint):
            if isinstance(event, Evaluation):
                curve.append(event)
            elif isinstance(event, Resumed):
                curve.extend(event.curve)
            elif isinstance(event, Diverged):
                status = f"diverged at step {event.step}" + (f" ({event.what})" if event.what != "loss" else "")
            elif isinstance(event, Stopped):
                status = f"stopped at step {event.step}"
            yield run, event
        if write:
            record = {
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "status": status,
                "points": run.points,
                "curve": [asdict(e) for e in curve],
            }
            write_json(directory / f"{run.name}.json", record)
            checkpoint.unlink(missing_ok=True)


def run_in_processes(runs: Sequence[Run], directory: Path, workers: int) -> Iterator[Tagged]:
    """The same on ``workers`` processes, which read the plan beside the ``directory``: functions in it cannot be sent.

    Raises:
        WorkerError: one of them was killed or raised; the message says how. The others are ended.
    """
    context = multiprocessing.get_context("spawn")
    jobs: Any = context.Queue()
    events: Any = context.Queue()
    known = {run.name: run for run in runs}
    for run in runs:
        jobs.put((run.contender.name, run.seed, run.learning_rate))
    for _ in range(workers):
        jobs.put(None)
    processes: list[Any] = []
    try:
        with deaf_to_ctrl_c():  # a worker hears of it from its parent, not while it imports
            for _ in range(workers):
                processes.append(context.Process(target=_work, args=(jobs, events, directory), daemon=True))
                processes[-1].start()
        running = workers
        while running:
            try:
                message = events.get(timeout=1)
            except queue.Empty:
                _check_alive(processes)
                continue
            if message is None:
                running -= 1
            elif isinstance(message, str):
                raise WorkerError(f"a training process failed:\n{message}\nWhen that is mended:")
            else:
                name, event = message
                yield known[name], event
                _check_alive(processes, signals_only=True)
    finally:
        jobs.cancel_join_thread()
        for process in processes:
            process.terminate()
            process.join()


def _check_alive(processes: Sequence[Any], *, signals_only: bool = False) -> None:
    """A process that was killed says nothing; one that raised sends its traceback, which may still be on its way."""
    for process in processes:
        if process.exitcode is not None and (process.exitcode < 0 or (process.exitcode > 0 and not signals_only)):
            raise WorkerError(f"a training process ended with exit code {process.exitcode} (-9: often for memory).")


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside inherit that SIGINT is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(jobs: Any, events: Any, directory: Path) -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    try:
        plan = read_plan(directory.parent)
        task, contenders = task_of(plan), {contender.name: contender for contender in plan.contenders}
        check_same(plan, task, plan.processes)
        while (job := jobs.get()) is not None:
            name, seed, rate = job
            run = next(run for run in plan.runs_at(contenders[name], rate) if run.seed == seed)
            for _, event in run_here(task, [run], directory):
                if parent is not None and not parent.is_alive():
                    os._exit(1)  # the parent was killed; a resumed race must find nobody else writing here
                events.put((run.name, event))
        events.put(None)
    except RaceError as error:
        events.put(str(error))
        sys.exit(1)
    except Exception:
        events.put(traceback.format_exc())
        sys.exit(1)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1))

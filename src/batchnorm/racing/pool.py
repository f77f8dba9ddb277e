"""The runs of a plan on several processes, one thread each, as one stream of events.

Comes from: ``runner.py``. Goes to: ``display.py`` and the run files. Every finished run leaves one JSON file, every
unfinished one a checkpoint, so a race that was killed goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from batchnorm.racing.plan import Plan, task_of
from batchnorm.racing.task import Task
from batchnorm.racing.trainer import Diverged, Evaluation, Event, Resumed, Run, train

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
                status = f"diverged at step {event.step}"
            yield run, event
        if write:
            record = {
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "status": status,
                "curve": [asdict(e) for e in curve],
            }
            write_json(directory / f"{run.name}.json", record)
            checkpoint.unlink(missing_ok=True)


def run_in_processes(plan: Plan, runs: Sequence[Run], directory: Path, workers: int) -> Iterator[Tagged]:
    """The same on ``workers`` processes. A worker that dies or raises ends the race with its traceback."""
    context = multiprocessing.get_context("spawn")
    jobs: Any = context.SimpleQueue()
    events: Any = context.Queue()
    for run in runs:
        jobs.put(run)
    for _ in range(workers):
        jobs.put(None)
    processes = [
        context.Process(target=_work, args=(plan, jobs, events, directory), daemon=True) for _ in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        running = workers
        while running:
            try:
                message = events.get(timeout=1)
            except queue.Empty:
                dead = next((p for p in processes if p.exitcode), None)
                if dead is not None:
                    raise RuntimeError(
                        f"a training process ended with exit code {dead.exitcode} (-9: killed, often for memory)."
                    ) from None
                continue
            if message is None:
                running -= 1
            elif isinstance(message, str):
                raise RuntimeError(f"a training process failed:\n{message}")
            else:
                yield message
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(plan: Plan, jobs: Any, events: Any, directory: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    try:
        task = task_of(plan)
        while (run := jobs.get()) is not None:
            for event in run_here(task, [run], directory):
                if parent is not None and not parent.is_alive():
                    os._exit(1)  # the parent was killed; a resumed race must find nobody else writing here
                events.put(event)
        events.put(None)
    except Exception:
        events.put(traceback.format_exc())
        sys.exit(1)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)

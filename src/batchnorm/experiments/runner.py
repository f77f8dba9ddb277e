"""Run experiments on all cores, with progress: each cell leaves a file, so a run that was killed resumes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from batchnorm.common.files import replacing
from batchnorm.experiments import load
from batchnorm.experiments.claim import Cell, Record, Result
from batchnorm.racing.errors import WorkerError
from batchnorm.racing.pool import deaf_to_ctrl_c

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0  # of a log


def run(name: str, *, quick: bool = False, seeds: int = 3) -> Result:
    """One experiment in this process, without files.

    Args:
        name: see ``experiments.NAMES``.
        quick: fewer settings and shorter runs: minutes for all experiments together.
        seeds: runs of each setting, where chance matters.

    Raises:
        ValueError: there is no such experiment.
    """
    experiment = load(name)
    return experiment.conclude([cell | experiment.measure(**cell) for cell in experiment.cells(quick, seeds)])


def run_all(
    names: list[str], *, quick: bool, seeds: int, out: Path, workers: int, console: Console
) -> Iterator[tuple[str, Result]]:
    """The experiments' results, in their order; the cells that take times come last, one at a time."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    experiments = {name: load(name) for name in names}
    cells = {name: experiment.cells(quick, seeds) for name, experiment in experiments.items()}
    done, printed = dict.fromkeys(names, 0), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bars = {name: progress.add_task(name, total=len(cells[name])) for name in names}
        for alone in (False, True):
            jobs = [(n, cell) for n in names for cell in cells[n] if experiments[n].alone(cell) is alone]
            for name, _ in measured(jobs, out, 1 if alone else workers):
                progress.advance(bars[name])
                done[name] += 1
                if not console.is_terminal and time.monotonic() > printed + SECONDS_BETWEEN_LINES:
                    printed = time.monotonic()
                    console.print(f"{name}: {done[name]} of {len(cells[name])} cells", highlight=False)
    for name in names:
        yield name, experiments[name].conclude([read(out, name, cell) for cell in cells[name]])


def measured(jobs: list[tuple[str, Cell]], out: Path, workers: int) -> Iterator[tuple[str, Cell]]:
    """Measure what has left no file yet; each job as it is done."""
    todo = []
    for name, cell in jobs:
        if file_of(out, name, cell).exists():
            yield name, cell
        else:
            todo.append((name, cell))
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_start_worker)
    try:
        with deaf_to_ctrl_c():  # a worker hears of it from its parent, not while it imports
            futures = {pool.submit(measure_to_file, name, cell, out): (name, cell) for name, cell in todo}
            pool.submit(os.getpid)  # the executor looks after the processes that there were before the last submit
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise WorkerError("a process was killed from outside (often for memory).") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread each; and gone when the parent is, which may be killed."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(
        True
    )  # momenta of dead units come to that, and SOAP's products of them are 40 times slower
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def measure_to_file(name: str, cell: Cell, out: Path) -> None:
    """Measure one cell; its file appears whole or not at all."""
    found = cell | load(name).measure(**cell)
    file = file_of(out, name, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write_text(json.dumps(found))


def read(out: Path, name: str, cell: Cell) -> Record:
    """The measurements of a cell."""
    record: Record = json.loads(file_of(out, name, cell).read_text())
    return record


def file_of(out: Path, name: str, cell: Cell) -> Path:
    """Named after the settings: another setting is another file."""
    digest = hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]
    return out / "cells" / name / f"{digest}.json"

"""``batchnorm reproduce``: the paper's claims as experiments, each with a number, a verdict and a picture."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from batchnorm.common.machine import cores
from batchnorm.experiments import NAMES, load
from batchnorm.experiments.report import write
from batchnorm.experiments.runner import run_all
from batchnorm.racing.data import load_images
from batchnorm.racing.errors import RaceError, WorkerError

CONFIG = "config.json"


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Claims to re-run; without any, list them.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Re-run all claims.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer settings and shorter runs: minutes for all claims.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(help="Runs per setting.", show_default="3; with --quick 1")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for results.", show_default="runs/reproduce")] = None,
    data: Annotated[Path | None, typer.Option(help="Directory of the IDX files of Fashion-MNIST or MNIST.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of processes, one thread each.", show_default="one per core")
    ] = None,
) -> None:
    """Re-run claims of the paper. Run the same command again to resume."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    chosen = list(NAMES) if every else list(names or [])
    if not chosen:
        console.print(listed())
        return
    directory = out or Path("runs/reproduce") / ("quick" if quick else "full")
    runs = seeds or (1 if quick else 3)
    torch.set_num_threads(1)
    try:
        if names and every:
            raise ValueError("--all runs all of them: leave the names away.")
        for name, value in (("seeds", seeds), ("workers", workers)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1 (got {value}).")
        for name in chosen:
            load(name)
        if data is not None:
            os.environ["BATCHNORM_DATA"] = str(data.absolute())  # for the processes too
        what = {
            "quick": quick,
            "seeds": runs,
            "data": load_images().name,  # fetched here where it is missing, not by each process
            "batchnorm": version("batchnorm"),
            "torch": torch.__version__,
        }
        _prepare(directory, what)
        results = {}
        for name, result in run_all(
            chosen, quick=quick, seeds=runs, out=directory, workers=workers or cores(), console=console
        ):
            results[name] = result
        write(results, directory, {"command": shlex.join(["batchnorm", *sys.argv[1:]]), **what})
    except (ValueError, RaceError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkerError as error:
        print(f"reproduce: {error} Run the same command again to resume.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
    table = Table("experiment", "verdict", "finding", box=None)
    for name, result in results.items():
        table.add_row(name, result.verdict, result.headline)
    console.print(table)
    console.print(f"Written: {directory}/report.md, results.json, {len(results)} pictures", highlight=False)


def listed() -> Table:
    """Every experiment with its claim."""
    table = Table("experiment", "claim", "where", box=None)
    for name in NAMES:
        claim = load(name).claim
        table.add_row(name, claim.sentence, claim.where)
    return table


def _prepare(directory: Path, what: dict[str, Any]) -> None:
    """Make the directory, or make sure that what is in it came about in the same way."""
    file = directory / CONFIG
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_text(json.dumps(what))
        there = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"--out {directory} cannot be written: {error.strerror}.") from None
    same = [key for key in what if key != "seeds"]  # more seeds add runs
    different = [f"{key} was {there.get(key)}, is {what[key]}" for key in same if there.get(key) != what[key]]
    if different:
        raise ValueError(f"{directory} holds results of another kind: {'; '.join(different)}. Choose another --out.")

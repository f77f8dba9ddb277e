"""``batchnorm race``: how many steps and seconds batch normalization saves, on real data."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from batchnorm.common.machine import cores
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.errors import RaceError, UnreadableFile, WorkerError
from batchnorm.racing.loading import load_task
from batchnorm.racing.plan import CONFIG, Plan, as_planned, make_plan, read_plan
from batchnorm.racing.runner import default_directory, run_race
from batchnorm.racing.task import Task
from batchnorm.racing.tasks import TASKS


def race(
    task: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(TASKS)}, or a function of yours: package.module:function.", show_default="inception"
        ),
    ] = None,
    contenders: Annotated[
        str | None,
        typer.Option(
            help=f"Separated by commas: {', '.join(CONTENDERS)}; or yours: module:name.",
            show_default="by network and mode",
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs per contender.", show_default="8; with --quick 2")] = None,
    first_seed: Annotated[int | None, typer.Option(help="The first seed.", show_default="0")] = None,
    steps: Annotated[
        int | None, typer.Option(help="The baseline's number of steps.", show_default="the task's")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Examples per step, over all processes; budgets and rates change with it.", show_default="the task's"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute: a small budget, two seeds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="About an hour: all contenders.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory for results.", show_default="runs/TASK-TIME")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Resume the race in this directory, with its own options.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Sweep learning rates on held-out training examples instead.")
    ] = False,
    rates: Annotated[Path | None, typer.Option(help="A tuning.json written by --tune: use its learning rates.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Directory of the data: IDX files of Fashion-MNIST or MNIST; for imagenet train/ and val/."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of training processes, one thread each.", show_default="one per core")
    ] = None,
) -> None:
    """Train the contenders under the same rules: steps and seconds until each is as good as the baseline at its end.

    Under `torchrun --nproc-per-node 2 -m batchnorm race ...` every run is trained data-parallel.
    """
    distributed = dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    main = not distributed or int(os.environ["RANK"]) == 0
    console = Console(width=None if sys.stdout.isatty() else 160, quiet=not main)
    directory: Path | None = None
    torch.set_num_threads(1)
    try:
        if quick and full:
            raise RaceError("--quick and --full exclude each other.")
        if workers is not None and workers < 1:
            raise RaceError(f"--workers must be at least 1 (got {workers}).")
        if workers is not None and distributed:
            raise RaceError("--workers is for one machine without torchrun, which starts the processes itself.")
        if distributed:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        asked: dict[str, Any] = {
            "task": task,
            "data": data and str(Path(data).absolute()),
            "contenders": contenders and [name.strip() for name in contenders.split(",")],
            "seeds": seeds,
            "first_seed": first_seed,
            "steps": steps,
            "batch_size": batch_size,
            "rates": rates and str(rates.absolute()),
            "mode": "quick" if quick else "full" if full else None,
            "tune": tune or None,
        }
        asked = {option: value for option, value in asked.items() if value is not None}
        subject, plan = _resumed(resume, out, asked) if resume else _new(asked)
        directory = _same_on_all_ranks(resume or out or default_directory(plan.task))
        if workers is not None and subject.device == "cuda":
            raise RaceError("--workers is for the CPU: on a GPU one process trains; for more GPUs there is torchrun.")
        processes = 0 if distributed or subject.device == "cuda" else workers or cores()
        run_race(subject, plan, directory, console, resume=bool(resume), workers=processes)
        if distributed:
            dist.barrier()  # a rank that leaves first takes connections down that another still uses
    except RaceError as error:
        _say(main or isinstance(error, UnreadableFile), f"race: {error}")
        sys.exit(2)
    except WorkerError as error:
        _say(main, f"race: {error}{_how_to_resume(directory)}")
        sys.exit(1)
    except KeyboardInterrupt:
        _say(main, f"\nStopped.{_how_to_resume(directory)}")
        sys.exit(130)
    finally:
        if dist.is_initialized():
            gc.collect()  # data-parallel wrappers hold the group, whose threads must end before the interpreter does
            dist.destroy_process_group()


def _say(main: bool, text: str) -> None:
    if main:
        print(text, file=sys.stderr)


def _how_to_resume(directory: Path | None) -> str:
    if directory is None or not (directory / CONFIG).exists():
        return ""
    return f" Go on with: batchnorm race --resume {shlex.quote(str(directory))}"


def _load(spec: str, data: str | None) -> Task:
    """The task; under torchrun rank 0 first, so that one process alone fetches what is missing."""
    if not dist.is_initialized():
        return load_task(spec, data)
    task = None
    for turn in (dist.get_rank() == 0, dist.get_rank() != 0):
        task = load_task(spec, data) if turn else task
        dist.barrier()
    assert task is not None
    return task


def _new(asked: dict[str, Any]) -> tuple[Task, Plan]:
    """A race from the options, where given, and the defaults."""
    spec, data, tune = asked.pop("task", "inception"), asked.pop("data", None), asked.pop("tune", False)
    subject = as_planned(_load(spec, data), asked.pop("batch_size", None), tune)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    command = shlex.join(["batchnorm", *sys.argv[1:]])
    return subject, make_plan(subject, spec=spec, data=data, tune=tune, processes=processes, command=command, **asked)


def _resumed(directory: Path, out: Path | None, asked: dict[str, Any]) -> tuple[Task, Plan]:
    """The race in the directory; an option that says something else than it did then is refused."""
    if out is not None and out != directory:
        raise RaceError(f"--resume {directory} goes on in its own directory; leave --out away.")
    plan = read_plan(directory)
    stored = plan.options()
    different = [f"{name} was {stored[name]}, is {value}" for name, value in asked.items() if stored[name] != value]
    if different:
        raise RaceError(f"{directory} holds a race of another configuration: {'; '.join(different)}.")
    return as_planned(_load(plan.task, plan.data), plan.batch_size, plan.tune), plan


def _same_on_all_ranks(directory: Path) -> Path:
    """The default directory holds the time: rank 0's is taken."""
    box = [directory]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]

"""Live progress of a race: a row per run on a terminal, a line per evaluation otherwise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from batchnorm.racing import events
from batchnorm.racing.events import Event, Run
from batchnorm.racing.plan import Plan

SECONDS_BETWEEN_LINES = 5


class Display:
    """Shows where each run stands and how long the race will take; a context manager."""

    def __init__(self, runs: Sequence[Run], done: Sequence[Run], console: Console, plan: Plan) -> None:
        self.console, self.runs, self.plan, self.started = console, list(runs), plan, time.monotonic()
        self.steps = {run.name: run.steps if run in done else 0 for run in runs}
        self.already = sum(self.steps.values())
        self.scores: dict[str, str] = {}
        self.losses: dict[str, float] = {}
        self.rows: dict[str, TaskID] = {}
        self.printed = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"),
            *([BarColumn(bar_width=24)] if console.width >= 100 else []),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.total = self.progress.add_task("[bold]all runs", total=self._total, completed=self.already, detail="")

    @property
    def _total(self) -> int:
        return sum(run.steps for run in self.runs)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, run: Run, event: Event) -> None:
        """Take in one event."""
        name = run.name
        if isinstance(event, events.Resumed):
            self.already += event.step
        if isinstance(event, events.Progress | events.Evaluation) and event.loss is not None:
            self.losses[name] = event.loss
        if isinstance(event, events.Evaluation):
            self.scores[name] = self.plan.shown(event.score)
        loss = f"{self.losses[name]:.3f}" if name in self.losses else "-"
        detail = f"loss {loss}  {self.plan.metric} {self.scores.get(name, '-')}"
        self.steps[name] = event.step
        if isinstance(event, events.Diverged):
            self.steps[name] = run.steps
            self.already += run.steps - event.step  # steps that nobody has to wait for
            detail = f"diverged at step {event.step:,}"
        if isinstance(event, events.Stopped):
            self.steps[name] = run.steps
            self.already += run.steps - event.step
        ended = self.steps[name] >= run.steps and not isinstance(event, events.Progress)
        if self.console.is_terminal:
            self._update_rows(run, detail, ended)
        elif isinstance(event, events.Diverged | events.Evaluation):
            self._print_line(run, detail, ended)

    def _print_line(self, run: Run, detail: str, ended: bool) -> None:
        """A log wants a line now and then, and one where a run ends."""
        now = time.monotonic()
        if now - self.printed < SECONDS_BETWEEN_LINES and not ended:
            return
        self.printed, done = now, sum(self.steps.values())
        rate = (done - self.already) / (now - self.started)
        left = f"  left {timedelta(seconds=round((self._total - done) / rate))}" if rate > 0 else ""
        line = f"[{done / self._total:4.0%}] {label(run)}  step {self.steps[run.name]:,}/{run.steps:,}  {detail}{left}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _update_rows(self, run: Run, detail: str, ended: bool) -> None:
        if run.name not in self.rows:
            self.rows[run.name] = self.progress.add_task(escape(label(run)), total=run.steps, detail=detail)
        self.progress.update(self.rows[run.name], completed=self.steps[run.name], detail=detail)
        self.progress.update(self.total, completed=sum(self.steps.values()))
        if ended:
            self.progress.remove_task(self.rows.pop(run.name))
            self.console.print(f"{label(run)}: {detail}", markup=False, highlight=False)


def label(run: Run) -> str:
    """A run's name on the screen."""
    return f"{run.contender.name} (seed {run.seed}, rate {run.learning_rate:g})"

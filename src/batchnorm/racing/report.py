"""Results of a race: the sentence, the table, ``results.json``, ``curves.csv``; plots are in ``plots.py``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batchnorm.racing.changes import CHANGES
from batchnorm.racing.contenders import Contender
from batchnorm.racing.plan import Plan
from batchnorm.racing.score import ENOUGH, REACHED, UNKNOWN, Record, level


def sentence(results: Mapping[str, Any], plan: Plan) -> str:
    """The answer; of contenders that change kernels alone, the time of their steps."""
    rows, words = {row["name"]: row for row in results["contenders"]}, [_answer(results, plan)]
    for name in (contender.name for contender in plan.contenders if contender.is_the_same):
        step = rows[name]["seconds_per_step"] / rows[plan.baseline]["seconds_per_step"]
        words.append(f"{name}: the same steps, each in {step:.1%} of the time.")
    return " ".join(words)


def _answer(results: Mapping[str, Any], plan: Plan) -> str:
    """The answer: the contender with the fewest steps, and its control; or why there is none.

    Optimizers apart: first what the baseline's own comes to, then what another one adds, where that is faster.
    """
    if not others(results, plan) and not results["warnings"]:
        return f"{plan.baseline} ends at {plan.metric} {plan.shown(results['target'])}, and nobody raced against it."
    rivals = others(results, plan)
    if results["target"] is None or not any(row["steps_fraction"] for row in rivals):
        sound = any(row["name"] == plan.baseline and row["steps_fraction"] for row in results["contenders"])
        if sound and all(row["steps_to_target"] is None for row in rivals):
            return _nobody(results, plan)
        return (results["warnings"] or [_nobody(results, plan)])[0]
    best, other = answers(results, plan)
    goal = f"the {plan.metric} of {plan.baseline} ({plan.shown(results['target'])})"
    words = f"{best['name']}: {goal} in {_both(best, plan)}{_without(best, results, plan)}."
    if best["steps_fraction"] > 1:
        words = f"No contender needs fewer steps than {plan.baseline}. {words}"
    if other is not None:
        words += f" With another optimizer too, {other['name']}: {_both(other, plan)}{_without(other, results, plan)}."
    return words


def answers(
    results: Mapping[str, Any], plan: Plan, quantity: str = "steps"
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The row with the smallest share by the baseline's optimizer; and by another one, where that is smaller."""
    key = f"{quantity}_fraction"
    brings = {contender.name for contender in plan.contenders if contender.recipe.muon_lr}
    rows = sorted((row for row in others(results, plan) if row[key]), key=lambda row: row[key])
    own = next((row for row in rows if row["name"] not in brings), rows[0])
    return own, rows[0] if rows[0] is not own else None


def _both(row: Mapping[str, Any], plan: Plan) -> str:
    return f"{share(row, 'steps', plan)} of its steps, {share(row, 'seconds', plan)} of its seconds"


def _without(row: Mapping[str, Any], results: Mapping[str, Any], plan: Plan) -> str:
    """The outcome of its control; where that was too short, of the next one."""
    controls = {contender.name: contender.control for contender in plan.contenders}
    rows = {other["name"]: other for other in others(results, plan)}
    name = controls.get(row["name"])
    control = rows.get("without-bn" if name not in rows and row["name"] != "without-bn" else name)
    while control is not None and control["steps_to_target"] is None and controls[control["name"]] in rows:
        control = rows[controls[control["name"]]]
    if control is None:
        return ""
    reached = "not reached" if control["steps_to_target"] is None else "evaluated too seldom to tell"
    without = reached if control["steps_fraction"] is None else f"{share(control, 'steps', plan)} of the steps"
    return f"; without batch normalization ({control['name']}): {without}"


def _nobody(results: Mapping[str, Any], plan: Plan) -> str:
    """How near they came, and what to try."""
    words = f"No contender reached the target ({plan.metric} {plan.shown(results['target'])})"
    sign = -1 if plan.score_falls else 1
    rows = [
        row for row in others(results, plan) if any(not run["status"].startswith("diverged") for run in row["runs"])
    ]
    if not rows:
        return f"{words}: all diverged."
    best = max(rows, key=lambda row: sign * row["end"])
    words = f"{words}: {best['name']} came to {plan.shown(best['end'])} in {best['budget']:,} steps."
    if best["budget"] >= plan.steps:
        return f"{words} Give all of them more: --steps {2 * plan.steps}."
    speed = max(1.0, plan.steps / best["budget"] / 2)
    return f"{words} Give it more: --contenders {plan.baseline},{best['name'].partition('@')[0]}@{speed:.2g}."


def share(row: Mapping[str, Any], quantity: str, plan: Plan) -> str:
    """ "6.6% (95%: 6.1 to 7.2%)"."""
    value, ends = row[f"{quantity}_fraction"], row[f"{quantity}_fraction_interval"]
    return f"{value:.1%}" if ends is None else f"{value:.1%} ({level(plan.seeds)}: {_range(ends)})"


def _range(ends: Sequence[Any]) -> str:
    """Without an upper end: too many of the resamples do not reach the target."""
    return f"{ends[0]:.1%} or more" if ends[1] is None else f"{100 * ends[0]:.1f} to {ends[1]:.1%}"


def others(results: Mapping[str, Any], plan: Plan) -> list[Mapping[str, Any]]:
    """The rows that race against the baseline: not those that are the same training on other kernels."""
    same = {contender.name for contender in plan.contenders if contender.is_the_same}
    return [row for row in results["contenders"] if row["name"] not in {plan.baseline, *same}]


def rules(plan: Plan) -> str:
    """The rules in short, printed under every result; docs/race.md has them in full."""
    seeds = f"{plan.seeds} seeds; intervals by resampling them"
    if plan.seeds < ENOUGH:
        few = f"{plan.seeds} seeds: the ranges are what they span, not intervals of 95%, which need {ENOUGH}"
        seeds = few if plan.seeds > 1 else "ONE seed: no intervals"
    untuned = [c.name for c in plan.contenders if c.tuned and c.name not in plan.tuned]
    others = {name: steps for name, steps in plan.tuned_at.items() if steps != plan.steps}
    elsewhere = "".join(f" The rate of {name} was tuned at {steps:,} steps." for name, steps in others.items())
    precision = "" if plan.mixed_precision == "False" else "forward and loss in 16 bits, "
    some = "the " if plan.scored is None else f"{plan.scored:,} of the "
    return (
        f"Rules: same network, initialization seed, data order and batch size ({plan.batch_size}) for all; {precision}"
        f"scored on {some}test examples. Target: the mean over seeds of the {plan.metric} in the last tenth of "
        f"{plan.baseline}'s steps, less its standard error; steps: where the monotone mean curve over seeds first "
        "reaches it, for every contender alike. Seconds are training alone: steps x median step time, taken alone "
        f"and interleaved, plus one re-estimation of statistics where a contender has one. {seeds}."
        + (f" NOT TUNED for this task: the learning rate of {', '.join(untuned)}; see --tune." if untuned else "")
        + elsewhere
    )


def changes(contender: Contender, plan: Plan) -> str:
    """A contender's changes to the training as it is, in this race; examples are reshuffled for all alike."""
    recipe = replace(contender.recipe, shuffle=False)
    if recipe.muon_lr:
        recipe = replace(recipe, muon_lr=plan.learning_rates[contender.name] / recipe.learning_rate)
    change = contender.change
    words = "BN as it is" if plan.normalized and change == "with-bn" else None
    parts = [words or (CHANGES[change].words if isinstance(change, str) else contender.values()["change"])]
    parts += [f"{key}={value}" for key, value in contender.network.items()]
    rate = contender.name in plan.tuned
    parts += ["own tuned learning rate"] if rate else []
    parts += [what for what, _ in recipe.changes() if not (rate and what.startswith("learning rate x"))]
    if contender.recalibrate:
        parts.append(f"statistics re-estimated on {min(contender.recalibrate, plan.examples):,} training examples")
    words = ", ".join(filter(None, parts))
    return words if words not in ("", "own tuned learning rate") else "nothing"


def table(results: Mapping[str, Any], plan: Plan) -> Table:
    """Steps and seconds to the target, as shares of the baseline's; narrow enough for 80 columns."""
    view = Table(title=Text(title(results, plan)), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    view.add_column("contender", no_wrap=True)
    for heading in ("steps", "share", level(plan.seeds), "seconds"):
        view.add_column(heading, justify="right", no_wrap=True)
    widest = max(len(_end(row, plan)) for row in results["contenders"])
    view.add_column(Text(f"{plan.metric} at end"), justify="right", min_width=widest)  # a long name may be wrapped
    for row in results["contenders"]:
        ends = row["steps_fraction_interval"]
        view.add_row(
            Text(row["name"]),
            "-" if row["steps_to_target"] is None else f"{row['steps_to_target']:,.0f}",
            "-" if row["steps_fraction"] is None else f"{row['steps_fraction']:.1%}",
            "" if ends is None else _range(ends),
            "-" if row["seconds_fraction"] is None else f"{row['seconds_fraction']:.1%}",
            _end(row, plan),
        )
    return view


def _end(row: Mapping[str, Any], plan: Plan) -> str:
    if row["end"] is None:
        return "-"
    if row["end_interval"] is None or plan.seeds < 3:  # of two, Student's interval is ten times what they differ by
        return plan.shown(row["end"])
    half = plan.shown((row["end_interval"][1] - row["end_interval"][0]) / 2).removesuffix("%")
    return f"{plan.shown(row['end'])} ± {half}"


def title(results: Mapping[str, Any], plan: Plan) -> str:
    """The question and the target."""
    target = results["target"]
    goal = "no target" if target is None else f"target: {plan.metric} {plan.shown(target)} ({plan.baseline}'s end)"
    return f"{plan.name}: {goal}"


def notes(results: Mapping[str, Any], plan: Plan) -> list[str]:
    """Faults; then each contender's changes, and its outcome where it did not reach the target."""
    lines = [f"NOTE: {warning}" for warning in results["warnings"]]
    if len(plan.sources) > 1:
        lines.append(
            f"NOTE: the code of {plan.name} was changed while it raced, and some of its runs are of the old one: race "
            "again for numbers to keep."
        )
    for contender, row in zip(plan.contenders, results["contenders"], strict=True):
        ended = "" if row["status"] in (REACHED, UNKNOWN) else f". Outcome: {row['status']}"
        rate = f" (rate {row['learning_rate']:g})"
        what = changes(contender, plan)
        lines.append(
            f"{contender.name}{rate}: {what}{ended}" if what != "nothing" else f"{contender.name}{rate}{ended}"
        )
    if plan.left_out:
        lines.append(f"left out: {', '.join(plan.left_out)}")
    return lines


def show(results: Mapping[str, Any], plan: Plan, console: Console) -> None:
    """Print the answer, then table, notes and rules."""
    soft = not console.is_terminal
    console.print(sentence(results, plan), style="bold", highlight=False, markup=False, soft_wrap=soft)
    console.print(table(results, plan))
    for text in (*(f"- {note}" for note in notes(results, plan)), rules(plan)):
        console.print(text, highlight=False, markup=False, soft_wrap=soft)


def markdown(results: Mapping[str, Any], plan: Plan) -> str:
    """The same for a README: sentence, table, what each contender changes, rules."""
    view = table(results, plan)
    cells = [[str(cell) for cell in column.cells] for column in view.columns]
    lines = [
        "| " + " | ".join(str(column.header) for column in view.columns) + " |",
        "|" + "|".join("---" if column.justify == "left" else "---:" for column in view.columns) + "|",
        *("| " + " | ".join(row) + " |" for row in zip(*cells, strict=True)),
    ]
    listed = [f"- {note}" for note in notes(results, plan)]
    return "\n".join([sentence(results, plan), "", title(results, plan), "", *lines, "", *listed, "", rules(plan), ""])


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

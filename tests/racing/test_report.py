"""racing/report.py and racing/display.py: what a person reads."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from racing import toy
from rich.console import Console
from torch import nn
from torch.optim import SGD, AdamW

import batchnorm as bn
from batchnorm.racing import report
from batchnorm.racing.contenders import CONTENDERS, NORMALIZED, PLAIN
from batchnorm.racing.display import Display
from batchnorm.racing.events import Diverged, Evaluation, Progress, Resumed
from batchnorm.racing.plan import make_plan, read_plan
from batchnorm.racing.plots import STYLES, styles
from batchnorm.racing.score import score
from batchnorm.racing.timing import StepTime


def test_each_contender_says_what_it_changes() -> None:
    mine = bn.Contender("mine", doubled, recipe=bn.Recipe(learning_rate=3))
    told = changes(toy.task(), "baseline", "bn", "bn-x5", "sigmoid", mine)
    assert told["baseline"] == "nothing"
    assert told["bn"] == "BN before the nonlinearities (bn.insert), statistics re-estimated on 1,000 training examples"
    assert told["bn-x5"] == (
        "BN before the nonlinearities (bn.insert), learning rate x5, weight decay x0.2, none on gamma, beta and biases"
        ", learning-rate decay 6 times faster, for 1/6 of the steps, no dropout, statistics re-estimated on 1,000 "
        "training examples"
    )
    assert "activation=sigmoid" in told["sigmoid"]
    assert told["mine"] == "doubled, learning rate x3"


def changes(task: bn.Task, *names: Any, **options: Any) -> dict[str, str]:
    plan = make_plan(task, spec="racing.toy:task", contenders=names, **options)
    return {contender.name: report.changes(contender, plan) for contender in plan.contenders}


@pytest.mark.parametrize(("optimizer", "has"), [(None, True), (AdamW, False), (lambda p: SGD(p, lr=0.1), False)])
def test_what_an_optimizer_cannot_have_is_not_told(optimizer: Any, has: bool, tmp_path: Path) -> None:
    """Nesterov's momentum; a resumed race, which reads its plan, says the same."""
    task = replace(toy.task(), optimizer=optimizer)
    plan = make_plan(task, spec="racing.toy:task", contenders=["baseline", "sgd"])
    assert ("Nesterov" in report.changes(plan.contenders[1], plan)) is has
    (tmp_path / "config.json").write_text(json.dumps(plan.values()))
    assert read_plan(tmp_path) == plan


def test_the_rate_of_a_recipes_own_optimizer_is_the_runs(tmp_path: Path) -> None:
    assert "Muon, learning rate 0.03:" in changes(toy.task(), "baseline", "fast")["fast"]
    file = tmp_path / "tuning.json"
    file.write_text('{"toy": {"default": {"scores": {"fast": {"0.06": [0.5]}}}}}')
    told = changes(toy.task(), "baseline", "fast", rates=file)["fast"]
    assert "own tuned learning rate, Muon, learning rate 0.06: weights before batch normalization, SGD" in told


def doubled(model: nn.Module, example: Any) -> nn.Module:
    return model


@pytest.mark.parametrize("name", [name for name, c in CONTENDERS.items() if c.control == f"{name}-without-bn"])
def test_a_control_differs_by_bn_alone(name: str) -> None:
    """What is BN itself worth? Same optimizer, schedule and budget in every mode; its rate is its own."""
    with_bn, without = CONTENDERS[name], CONTENDERS[f"{name}-without-bn"]
    assert replace(with_bn, name=without.name, change="without-bn", recalibrate=0, control=without.control) == without


def test_one_seed_says_that_it_is_one_and_an_untuned_rate_that_it_is_untuned(tmp_path: Path) -> None:
    names = ["baseline", "bn-x5", "sgd"]
    rules = report.rules(make_plan(toy.task(), spec="racing.toy:task", seeds=1, contenders=names))
    assert "ONE seed" in rules
    assert "NOT TUNED for this task: the learning rate of baseline, sgd;" in rules
    untuned = changes(toy.task(), *names)["sgd"]
    assert "own tuned" not in untuned
    assert "learning rate x" in untuned
    file = tmp_path / "tuning.json"
    file.write_text('{"toy": {"default": {"scores": {"sgd": {"0.1": [0.5]}}}}}')
    tuned = changes(toy.task(), *names, rates=file)["sgd"]
    assert "own tuned learning rate" in tuned
    assert "learning rate x" not in tuned
    assert "8 seeds; intervals" in report.rules(make_plan(toy.task(), spec="racing.toy:task"))


def results(*ends: float, names: tuple[str, ...] = ("baseline", "sgd", "short"), seeds: int = 6) -> tuple[Any, Any]:
    """Of the baseline, and of contenders that go as far as they are told, at four times its speed and twice."""
    plan = make_plan(toy.task(), spec="racing.toy:task", contenders=names, seeds=seeds)
    records = {
        name: [
            {
                "seed": seed,
                "learning_rate": 0.1,
                "status": "finished",
                "points": [*range(0, 101, 4)],
                "curve": [
                    {"step": step, "score": end * min(1, step * speed / 80), "loss": 1 / (1 + step), "rate": 0.0}
                    for step in range(0, 101, 4)
                ],
            }
            for seed in range(seeds)
        ]
        for name, speed, end in zip(names, (1, 4, 2, 2), ends, strict=False)
    }
    times = {name: StepTime(0.1 if name == "baseline" else 0.2, (0.1, 0.2), 0.0, 9) for name in records}
    return score(plan, records, times), plan


def test_the_answer_comes_first_with_its_interval_and_its_control() -> None:
    assert report.sentence(*results(0.8, 0.9, 0.81)) == (
        "sgd: the accuracy of baseline (80.00%) in 22.2% (95%: 22.2 to 22.2%) of its steps, 44.4% (95%: 44.4 to 44.4%) "
        "of its seconds; without batch normalization (short): 49.4% (95%: 49.4 to 49.4%) of the steps."
    )
    assert "without batch normalization (short): not reached" in report.sentence(*results(0.8, 0.9, 0.7))
    assert report.sentence(*results(0.8, 0.7, 0.6)) == (
        "No contender reached the target (accuracy 80.00%): sgd came to 70.00% in 33 steps. Give it more: "
        "--contenders baseline,sgd@3."
    )


def test_where_a_control_was_too_short_the_longer_one_is_told() -> None:
    names = ("baseline", "fast", "fast-without-bn", "muon-without-bn")
    told = report.sentence(*results(0.8, 0.9, 0.7, 0.85, names=names))
    assert "; without batch normalization (muon-without-bn): 47" in told
    assert "(fast-without-bn): not reached" in report.sentence(*results(0.8, 0.9, 0.7, names=names[:3]))


def test_that_nobody_is_there_is_the_answer_also_where_a_schedule_did_not_end() -> None:
    found, plan = results(0.8, 0.7, 0.6)
    found["warnings"] = ["short ends while its learning rate is at 100% of its highest"]
    assert report.sentence(found, plan).startswith("No contender reached the target")


def test_of_few_seeds_the_range_is_no_interval_and_is_not_called_one() -> None:
    told, (found, plan) = report.sentence(*results(0.8, 0.9, 0.81, seeds=2)), results(0.8, 0.9, 0.81, seeds=2)
    assert "in 22.2% (2 seeds: 22.2 to 22.2%) of its steps" in told
    assert "95%" not in told + str([column.header for column in report.table(found, plan).columns])
    assert "what they span, not intervals of 95%" in report.rules(plan)
    assert found["intervals"] == "2 seeds"


def test_what_another_optimizer_adds_is_told_apart() -> None:
    """BN with the baseline's own optimizer comes first, though the other is faster."""
    told = report.sentence(*results(0.8, 0.9, 0.82, names=("baseline", "fast", "bn-x5")))
    assert told.startswith("bn-x5: the accuracy of baseline (80.00%) in 48.8% ")
    assert told.endswith(
        " With another optimizer too, fast: 22.2% (95%: 22.2 to 22.2%) of its steps, 44.4% (95%: 44.4 to 44.4%) of its "
        "seconds."
    )
    slower = report.sentence(*results(0.8, 0.9, 0.82, names=("baseline", "bn-x5", "fast")))
    assert slower.startswith("bn-x5: ")
    assert "fast" not in slower
    alone = report.sentence(*results(0.8, 0.9, 0.7, names=("baseline", "fast", "bn-x5")))
    assert alone.startswith("fast: the accuracy of baseline (80.00%) in 22.2% ")


def test_a_control_that_is_there_too_soon_to_tell_is_not_one_that_never_is() -> None:
    found, plan = results(0.8, 0.9, 0.81)
    found["contenders"][2]["steps_fraction"] = None
    assert "without batch normalization (short): evaluated too seldom to tell." in report.sentence(found, plan)


def test_who_diverged_before_the_first_evaluation_is_told_so() -> None:
    found, plan = results(0.8, 0.7, 0.6)
    for row in found["contenders"][1:]:
        row["runs"] = [{"seed": 0, "status": "diverged at step 9", "steps": 0, "end": 0.0}]
    assert report.sentence(found, plan) == "No contender reached the target (accuracy 80.00%): all diverged."


def test_a_baseline_alone_is_no_race() -> None:
    found, plan = results(0.8, 0.9, 0.81)
    found["contenders"] = found["contenders"][:1]
    assert report.sentence(found, plan) == "baseline ends at accuracy 80.00%, and nobody raced against it."


def test_names_are_told_as_they_are_whatever_they_mean_to_a_terminal() -> None:
    found, plan = results(0.8, 0.9, 0.7)
    found["contenders"][1]["name"] = "sgd[/b]"
    plan, out = replace(plan, name="net[small]", metric="a long name of a metric[b]"), io.StringIO()
    Console(file=out, width=80).print(report.table(found, plan))
    assert "net[small]: target" in out.getvalue()
    assert "sgd[/b] " in out.getvalue()
    assert "…" not in out.getvalue()
    assert "metric[b]" in out.getvalue()
    assert "| sgd[/b] |" in report.markdown(found, plan)


def test_who_had_the_baselines_steps_already_is_not_told_to_take_them() -> None:
    said = report.sentence(*results(0.8, 0.7, 0.6, names=("baseline", "bn", "short")))
    assert said.endswith("bn came to 70.00% in 200 steps. Give all of them more: --steps 400.")


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_a_terminal(width: int) -> None:
    out = io.StringIO()
    found, plan = results(0.8, 0.9, 0.7)
    found["contenders"][2] |= {"name": "fast-without-bn", "end": 0.8012, "end_interval": (0.79, 0.81)}
    found["contenders"][1] |= {"steps_to_target": 12345.0, "steps_fraction_interval": (0.22, None)}
    Console(file=out, width=width).print(report.table(found, plan))
    assert "…" not in out.getvalue()
    assert "22.0% or more" in out.getvalue()
    assert "fast-without-bn" in out.getvalue()


def test_every_contender_has_its_own_color() -> None:
    assert STYLES.keys() == CONTENDERS.keys()
    for table in (PLAIN, NORMALIZED):
        for names in table.values():
            assert len({STYLES[name] for name in names}) == len(names)
    assert len(set(styles(["mine", "yours"]).values())) >= 2


def test_progress_is_readable_when_piped() -> None:
    plan = make_plan(toy.task(), spec="racing.toy:task", seeds=1, contenders=["baseline", "bn-x5"])
    runs = plan.runs()
    other = next(run for run in runs if run.contender.name == "bn-x5")
    out = io.StringIO()
    with Display(runs, [], Console(file=out, width=200), plan) as display:
        display.update(runs[0], Resumed(100, ()))
        display.update(runs[0], Progress(150, 0.6))
        display.update(runs[0], Evaluation(200, 1.0, 0.5, 0.875, 0.0, 2.0, 1.0))
        display.update(other, Diverged(13))
    lines = out.getvalue().splitlines()
    assert "baseline (seed 0, rate 0.01)  step 200/200  loss 0.500  accuracy 87.50%  left 0:00" in lines[0]
    assert lines[0].startswith(f"[{200 / sum(run.steps for run in runs):4.0%}]")
    assert "bn-x5 (seed 0, rate 0.05)" in lines[1]
    assert "diverged at step 13" in lines[1]


def test_who_changes_kernels_alone_is_not_the_answer_and_who_is_slower_is_said_to_be() -> None:
    """Its steps are the baseline's but for noise, so what it saves is time per step."""
    told = report.sentence(*results(0.8, 0.82, 0.9, 0.9, names=("as-is", "fused", "fast", "ghost")))
    assert told.startswith("ghost: the accuracy of as-is (80.00%) in ")
    assert told.endswith(" fused: the same steps, each in 100.0% of the time.")
    alone = report.sentence(*results(0.8, 0.82, 0.7, names=("as-is", "fused", "fast")))
    assert alone.startswith("No contender reached the target (accuracy 80.00%): fast came to 70.00%")
    assert alone.endswith(" fused: the same steps, each in 100.0% of the time.")
    found, plan = results(0.8, 0.9, names=("as-is", "without-bn"))
    found["contenders"][1]["steps_fraction"] = 1.1
    assert report.sentence(found, plan).startswith(
        "No contender needs fewer steps than as-is. without-bn: the accuracy"
    )


def test_a_race_whose_code_was_changed_says_so_and_so_do_rates_of_another_budget() -> None:
    found, plan = results(0.8, 0.9, 0.7)
    assert not any("code" in note for note in report.notes(found, plan))
    changed = replace(plan, sources=("one", "another"), tuned_at={"sgd": 60})
    assert report.notes(found, changed)[0].startswith("NOTE: the code of toy was changed while it raced")
    assert "The rate of sgd was tuned at 60 steps." in report.rules(changed)


def test_networks_that_have_batch_normalization_keep_it_and_are_not_said_to_get_it() -> None:
    assert changes(toy.normalized(), "as-is", "fast")["fast"].startswith("BN as it is, Muon")

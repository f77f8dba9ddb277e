"""racing/report.py and racing/display.py: what a person reads."""

import io
from dataclasses import replace

from racing import toy
from rich.console import Console

from batchnorm.racing import report
from batchnorm.racing.contenders import CONTENDERS
from batchnorm.racing.display import Display
from batchnorm.racing.plan import make_plan
from batchnorm.racing.plots import STYLES
from batchnorm.racing.trainer import Diverged, Evaluation, Progress, Resumed


def test_each_contender_says_what_it_changes() -> None:
    assert report.changes(CONTENDERS["baseline"]) == "nothing"
    assert report.changes(CONTENDERS["bn"]) == "BN, statistics re-estimated on 2,000 training examples"
    x5 = report.changes(CONTENDERS["bn-x5"])
    assert x5.startswith(
        "BN, no dropout, learning rate x5, weight decay x0.2, learning rate at zero after 16.7% of the steps"
    )
    assert "activation=sigmoid" in report.changes(CONTENDERS["sigmoid"])
    assert "statistics re-estimated on 2,000 training examples" in report.changes(CONTENDERS["accelerated"])


def test_accelerated_without_bn_differs_from_accelerated_by_bn_alone() -> None:
    """What is BN itself worth? Same schedule, averaging and budget; its rate is its own."""
    with_bn, without = CONTENDERS["accelerated"], CONTENDERS["accelerated-without-bn"]
    recipe = replace(with_bn.recipe, learning_rate=without.recipe.learning_rate)  # to be tuned, each
    assert replace(with_bn, name=without.name, batch_norm=False, recalibrate=0, recipe=recipe) == without


def test_one_seed_says_that_it_is_one_and_an_untuned_rate_that_it_is_untuned() -> None:
    rules = report.rules(make_plan(toy.task(), spec="racing.toy:task", seeds=1))
    assert "ONE seed" in rules
    assert "NOT TUNED for this task: the learning rate of baseline, accelerated" in rules
    untuned = report.changes(CONTENDERS["accelerated"], tuned=False)
    assert "tuned" not in untuned
    assert "learning rate x5" in untuned
    assert "own tuned learning rate" in report.changes(CONTENDERS["accelerated"])
    assert "Means over 3 seeds" in report.rules(make_plan(toy.task(), spec="racing.toy:task"))


def test_every_contender_has_its_own_color() -> None:
    assert STYLES.keys() == CONTENDERS.keys()
    assert len(set(STYLES.values())) == len(STYLES)


def test_progress_is_readable_when_piped() -> None:
    runs = make_plan(toy.task(), spec="racing.toy:task", seeds=1).runs()
    other = next(run for run in runs if run.contender.name == "bn-x5")
    out = io.StringIO()
    with Display(runs, [], Console(file=out, width=200)) as display:
        display.update(runs[0], Resumed(100, ()))
        display.update(runs[0], Progress(150, 0.6))
        display.update(runs[0], Evaluation(200, 1.0, 0.5, 0.875, 2.0, 1.0))
        display.update(other, Diverged(13))
    lines = out.getvalue().splitlines()
    assert "baseline (seed 0, rate 0.01)  step 200/200  loss 0.500  accuracy 87.50%  left 0:00" in lines[0]
    assert lines[0].startswith(f"[{200 / sum(run.steps for run in runs):4.0%}]")
    assert "bn-x5 (seed 0, rate 0.05)" in lines[1]
    assert "diverged at step 13" in lines[1]

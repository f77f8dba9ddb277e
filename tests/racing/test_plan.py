"""racing/plan.py and racing/task.py: everything is decided, or refused, before any long work."""

import functools
import inspect
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from racing import toy
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

import batchnorm as bn
from batchnorm.racing.choice import without_twins
from batchnorm.racing.contenders import CONTENDERS, NORMALIZED, PLAIN
from batchnorm.racing.errors import RaceError
from batchnorm.racing.loading import load_task
from batchnorm.racing.plan import as_planned, check_same, make_plan, read_plan
from batchnorm.racing.rates import TUNED_FILE, read_tuned, stored_speeds
from batchnorm.racing.trainer import device_of
from batchnorm.racing.trial import try_contenders

MODES: tuple[Any, ...] = ("quick", "default", "full")


def plan(task: bn.Task | None = None, **options: Any) -> Any:
    return make_plan(task or toy.task(), spec="racing.toy:task", **options)


@pytest.mark.parametrize("mode", MODES)
def test_default_contenders_hang_on_the_mode_and_on_whether_the_network_has_bn(mode: Any) -> None:
    made = plan(mode=mode)
    assert [c.name for c in made.contenders] == list(PLAIN[mode])
    assert made.baseline == "baseline"
    assert made.seeds == (2 if mode == "quick" else 8)
    assert len(made.runs()) == made.seeds * len(PLAIN[mode])
    assert made.steps == 200  # a small training is quick as it is
    assert plan(replace(toy.task(), steps=8_000), mode=mode).steps == (1_000 if mode == "quick" else 8_000)
    normalized = plan(toy.normalized(), mode=mode)
    assert [c.name for c in normalized.contenders] == list(NORMALIZED[mode])
    assert normalized.baseline == "as-is"


def test_every_row_of_contenders_is_in_some_race_and_every_control_is_there_with_its_contender() -> None:
    named = {name for table in (PLAIN, NORMALIZED) for names in table.values() for name in names}
    assert named == CONTENDERS.keys()
    for table in (PLAIN, NORMALIZED):
        for names in (table["default"], table["full"]):
            assert all(CONTENDERS[name].control in (None, *names) for name in names if "without" not in name)


def test_contenders_are_names_recipes_or_values_in_any_share_of_the_steps() -> None:
    mine = bn.Contender("mine", "group-norm", recipe=bn.Recipe(learning_rate=2))
    made = plan(contenders=["baseline", "sgd@4", bn.Recipe("three", learning_rate=3), mine, "racing.toy:contender"])
    assert [c.name for c in made.contenders] == ["baseline", "sgd@4", "three", "mine", "theirs"]
    assert made.contenders[1].budget == 1 / 4
    assert made.learning_rates["three"] == pytest.approx(0.03)
    with pytest.raises(RaceError, match=r"contender 'sgd@fast': sgd@4 is sgd in a quarter"):
        plan(contenders=["baseline", "sgd@fast"])
    with pytest.raises(RaceError, match=r"racing\.toy:task: task must be a batchnorm.Contender or Recipe.*got Task"):
        plan(contenders=["baseline", "racing.toy:task"])
    with pytest.raises(RaceError, match=r"contender 'mine': unknown change 'layernorm'. Known: nothing, with-bn"):
        bn.Contender("mine", "layernorm")


def test_seeds_begin_where_they_are_told() -> None:
    assert {run.seed for run in plan(seeds=3, first_seed=40).runs()} == {40, 41, 42}


def test_paper_rates_are_multiples_of_the_baselines() -> None:
    rates = plan(contenders=["baseline", "bn", "bn-x5", "bn-x30"]).learning_rates
    assert rates["bn"] == rates["baseline"]
    assert rates["bn-x5"] == pytest.approx(5 * rates["baseline"])
    assert rates["bn-x30"] == pytest.approx(30 * rates["baseline"])


def test_a_run_is_evaluated_before_its_first_step_and_ever_more_often_towards_its_end() -> None:
    for run in plan(mode="full", steps=1000).runs():
        points = run.points
        assert (points[0], points[-1]) == (0, run.steps)
        gaps = [b - a for a, b in itertools.pairwise(points)]
        assert len(gaps) <= run.evaluations
        assert gaps[0] == max(gaps)
        if run.steps > 100:
            assert sum(point >= 0.9 * run.steps for point in points) >= len(gaps) / 5


def test_full_leaves_out_what_the_model_cannot_be_asked_for_but_a_named_one_is_refused() -> None:
    assert "sigmoid" not in [c.name for c in plan(toy.plain(), mode="full").contenders]
    with pytest.raises(RaceError, match=r"'sigmoid' changes activation.*takes nothing"):
        plan(toy.plain(), contenders=["baseline", "sigmoid"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contenders": ["baseline", "bn-x50"]}, r"unknown contender 'bn-x50'. Known: baseline, short, bn, bn-x5"),
        ({"contenders": ["bn"]}, "the baseline sets the target, so it must run: --contenders baseline,bn"),
        ({"contenders": ["baseline", "baseline"]}, "named twice"),
        ({"contenders": []}, "no contenders"),
        ({"contenders": "baseline"}, r"must be a list of names or Contenders \(got 'baseline'\)"),
        (
            {"contenders": ["baseline", 3]},
            r"a contender is a name, a batchnorm.Recipe or a batchnorm.Contender \(got 3\)",
        ),
        ({"contenders": ["bn-x5"], "tune": True}, "'bn-x5' has no rate of its own"),
        ({"mode": "fast"}, "unknown mode 'fast'. Known: quick, default, full"),
        ({"seeds": "3"}, "--seeds must be a whole number"),
        ({"processes": 3}, "a batch of 20 does not divide among 3 processes"),
        ({"first_seed": -1}, r"--first-seed must be a whole number of at least 0 \(got -1\)"),
        ({"seeds": 0}, r"--seeds must be a whole number of at least 1 \(got 0\)"),
        ({"steps": -5}, r"--steps must be a whole number of at least 1 \(got -5\)"),
        ({"rates": "no-such-file.json"}, r"no-such-file.json cannot be read"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RaceError, match=message):
        plan(**options)


def test_tuned_rate_is_the_one_with_the_best_mean_score(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    scores = {"baseline": {"0.1": [0.8, 0.9], "0.2": [0.95, 0.7]}, "sgd": {"0.5": [0.7]}}
    file.write_text(json.dumps({"toy": {"default": {"scores": scores}}}))
    assert read_tuned("toy", "default", file, 20) == ({"baseline": 0.1, "sgd": 0.5}, {})
    assert read_tuned("toy", "full", file, 20)[0]["baseline"] == 0.1  # not swept: the default budget's
    assert read_tuned("other", "default", file, 20) == ({}, {})
    tied = {"scores": {"baseline": {"0.1": [0.9], "0.2": [0.9], "0.4": [0.8]}}}
    file.write_text(json.dumps({"toy": {"default": {"scores": scores}, "full": tied}}))
    assert read_tuned("toy", "full", file, 20)[0] == {"baseline": 0.2, "sgd": 0.5}  # of equals, not the edge
    file.write_text(json.dumps({"toy": {"default": {"scores": scores}}}))
    assert plan(rates=file, contenders=["baseline", "bn-x5", "sgd"]).learning_rates == {
        "baseline": 0.1,
        "bn-x5": 0.5,
        "sgd": 0.5,
    }
    with pytest.raises(RaceError, match=r"holds no learning rates for task 'plain'"):
        plan(toy.plain(), rates=file)
    own = {"default": {"scores": scores, "batch_size": 40}}  # swept in other batches: of no use here
    file.write_text(json.dumps({"toy": own}))
    with pytest.raises(RaceError, match=r"holds no learning rates for task 'toy' .* in batches of 20"):
        plan(rates=file)
    assert plan(toy.task().with_batch_size(40), rates=file).learning_rates["baseline"] == 0.1
    file.write_text("[]")
    with pytest.raises(RaceError, match=r"is not a tuning\.json"):
        plan(rates=file)


def test_stored_rates_hold_a_sweep_of_at_least_five_for_each_tuned_contender() -> None:
    stored = json.loads(TUNED_FILE.read_text())["inception"]
    for sweep in stored.values():
        assert "scores" not in sweep or sweep["command"].startswith("batchnorm race --tune")
    for name in ("baseline", "short", "sgd", "fast", "fast-without-bn"):
        assert len(stored["default"]["scores"][name]) >= 5


def test_a_sweep_starts_from_the_task_or_from_a_shorter_sweep(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text('{"toy": {"default": {"scores": {"baseline": {"0.1": [0.5], "0.2": [0.9]}}}}}')
    tried = {
        mode: [run.learning_rate for run in made.runs()]
        for mode, made in (
            ("default", plan(contenders=["baseline"], tune=True)),
            ("full", plan(contenders=["baseline"], tune=True, mode="full", rates=file)),
        )
    }
    rate = toy.task().base_rate
    assert tried["default"] == pytest.approx([rate / 4, rate / 2, rate, rate * 2, rate * 4])
    assert tried["full"] == pytest.approx([0.1, 0.2, 0.4])


def test_stored_plan_is_read_back_and_a_strange_one_refused(tmp_path: Path) -> None:
    from batchnorm.racing import runner

    made = plan()
    assert runner._prepare(tmp_path / "out", made, resume=False) is None
    assert read_plan(tmp_path / "out") == made
    with pytest.raises(RaceError, match="holds no race"):
        read_plan(tmp_path)
    config = tmp_path / "out" / "config.json"
    stored = json.loads(config.read_text())
    config.write_text(json.dumps({k: v for k, v in stored.items() if k != "format"}))
    with pytest.raises(
        RaceError, match=r"of another version of batchnorm \(format 1, this is 4\), whose rules were others"
    ):
        read_plan(tmp_path / "out")
    stored["contenders"][1]["recipe"]["learning_rate"] = 7.0
    config.write_text(json.dumps(stored))
    with pytest.raises(RaceError, match="holds a race of another version: short meant something else"):
        read_plan(tmp_path / "out")
    assert "already holds a race" in (runner._prepare(tmp_path / "out", made, resume=False) or "")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet", r"unknown task 'resnet'. Known: inception, mlp, covertype, imagenet, imagenet-resnet50; or a fu"),
        ("racing.toy:nothing", "racing.toy has no nothing"),
        ("racing.nowhere:task", "importing racing.nowhere from .* failed: ModuleNotFoundError"),
        ("racing.toy:returns_a_model", r"must return a batchnorm.Task \(got Sequential\)"),
        ("racing.toy:negative", r"steps must be a positive whole number \(got -1\)"),
    ],
)
def test_wrong_task(spec: str, message: str) -> None:
    with pytest.raises(RaceError, match=message):
        load_task(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": 7}, "test must be a dataset with a length"),
        ({"test": TensorDataset(torch.zeros(0, 8), torch.zeros(0))}, "test is empty"),
        ({"batch_size": 0}, "batch_size must be a positive whole number"),
        ({"batch_size": 20.5}, r"batch_size must be a positive whole number \(got 20.5\)"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate must be a positive number"),
        ({"batch_size": 2000}, r"1000 training examples are less than one batch \(2000\)"),
        ({"model": "resnet"}, "model must be a function that returns a new network each time \\(got 'resnet'"),
        ({"model": nn.Linear(8, 4)}, "model must be a function that returns a new network each time \\(got Linear"),
        ({"loss": "mse"}, r"loss must be a function \(got 'mse'\)"),
        ({"optimizer": 0.1}, r"optimizer must be a function \(got 0.1\)"),
        ({"metric": "auc"}, 'metric is "accuracy", "loss", a function or a torchmetrics.Metric'),
        ({"metric": 3}, "metric must be a function of all outputs and targets"),
        ({"clip_grad_norm": -1}, "clip_grad_norm must be a positive number"),
        ({"accumulate": 0}, "accumulate must be a positive whole number"),
        ({"mixed_precision": "bf16"}, "mixed_precision is True, torch.bfloat16 or torch.float16"),
        ({"readers": -1}, r"readers must be 0 or a positive whole number \(got -1\)"),
        ({"device": "cuda:1"}, r'device must be "cpu" or "cuda" \(got \'cuda:1\'\): torchrun tells which GPU'),
    ],
)
def test_wrong_fields_of_a_task(changes: dict[str, Any], message: str) -> None:
    fields = {"name": "t", "model": toy.model, "train": toy.examples(1000, 0), "test": toy.examples(10, 1)} | changes
    with pytest.raises(RaceError, match=message):
        bn.Task(**fields)


def tensors_of(examples: Any) -> torch.Tensor:
    return examples.batch(torch.arange(len(examples)), (0, 0))[0]  # type: ignore[no-any-return]


def test_tuning_never_sees_the_test_examples() -> None:
    task = toy.task()
    held = task.for_tuning()
    rows = {tuple(row.tolist()) for row in task.train.tensors[0]}
    assert {tuple(row.tolist()) for row in tensors_of(held.test)} <= rows
    assert len(held.train) + len(held.test) == 1000
    assert not {tuple(r.tolist()) for r in tensors_of(held.test)} & {tuple(r.tolist()) for r in tensors_of(held.train)}


def test_a_contender_has_a_share_of_its_own_in_each_mode() -> None:
    """Of a built-in task what was found on held-out examples; else a sixth, and a third where all is short."""

    def shares(task: bn.Task) -> dict[str, float]:
        return {mode: plan(task, mode=mode, contenders=["baseline", "fast"]).contenders[1].budget for mode in MODES}

    assert shares(toy.task()) == {"quick": 1 / 2.5, "default": 1 / 6, "full": 1 / 6}
    own = shares(load_task("inception"))
    assert own["quick"] == 1 / 2.5
    assert own["full"] == own["default"] == 1 / 5.5


def test_task_is_the_same_each_time_it_is_loaded_even_if_its_data_is_drawn_unseeded() -> None:
    """Every process of a race calls the function for itself, and so does a resumed race."""
    tasks = [load_task("racing.toy:unseeded") for _ in range(2)]
    assert tasks[0].facts() == tasks[1].facts()
    assert tasks[0].facts() != toy.task().facts()
    assert replace(tasks[0], weight_decay=1.0).facts() != tasks[0].facts()


def test_race_on_another_task_or_torch_is_refused() -> None:
    check_same(plan(), toy.task(), 1)
    with pytest.raises(RaceError, match="seed what it draws"):
        check_same(plan(), replace(toy.task(), test=toy.examples(77, 1)), 1)
    with pytest.raises(RaceError, match="started with processes = 1, and this is 2"):
        check_same(plan(), toy.task(), 2)
    with pytest.raises(RaceError, match="started with device = cuda, and this is cpu"):
        check_same(replace(plan(), device="cuda"), toy.task(), 1)
    with pytest.raises(RaceError, match="started with mixed_precision = False, and this is True"):
        check_same(plan(), replace(toy.task(), mixed_precision=True), 1)
    with pytest.raises(RaceError, match=r"started with torch = 1\.0"):
        check_same(replace(plan(), torch="1.0"), toy.task(), 1)


def test_a_network_with_nothing_to_normalize_is_refused_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(RaceError, match=r"'bn-x5': ValueError: there is no layer to normalize"):
        bn.race(toy.linear(), seeds=1, out=tmp_path / "o")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": lambda outputs, targets: {"f1": 1.0}}, r"its metric must give one number \(got dict\)"),
        ({"metric": MeanSquaredError}, r"metric must be an object, not its class: MeanSquaredError\(\.\.\.\)"),
        ({"model": functools.cache(toy.model)}, "model must return a new network each time, and returned the same"),
    ],
)
def test_a_task_that_would_not_do_is_refused_in_one_line(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RaceError, match=message) as error:
        bn.race(replace(toy.task(), **changes), ["baseline"], seeds=1, steps=3, out=tmp_path / "o")
    assert "\n" not in str(error.value)


def with_names(n: int) -> torch.utils.data.Dataset[Any]:
    """Examples of three parts."""
    return [(x, int(y), f"{i}.png") for i, (x, y) in enumerate(toy.examples(n, 0))]  # type: ignore[return-value]


def test_a_batch_of_three_parts_asks_for_a_loss_of_the_users(tmp_path: Path) -> None:
    task = replace(toy.task(), train=with_names(100), test=with_names(40))
    with pytest.raises(RaceError, match=r"a batch's target is tuple\(Tensor, tuple\): pass loss="):
        bn.race(task, ["baseline"], seeds=1, steps=3, out=tmp_path / "o")


def test_a_last_batch_of_one_example_is_refused_where_a_layer_needs_more(tmp_path: Path) -> None:
    def loader(**more: Any) -> bn.Task:
        return replace(toy.task(), train=DataLoader(toy.examples(101, 0), 20, shuffle=True, **more), steps=6)

    with pytest.raises(RaceError, match=r"'bn-x5': the last batch of each epoch has one example: .*drop_last=True"):
        bn.race(loader(), ["baseline", "bn-x5"], seeds=1, out=tmp_path / "o")
    bn.race(loader(), ["baseline"], seeds=1, out=tmp_path / "without")
    bn.race(loader(drop_last=True), ["baseline", "bn-x5"], seeds=1, out=tmp_path / "dropped")


def test_a_function_called_accuracy_is_no_share_of_one() -> None:
    def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        return 100 * float((outputs.argmax(1) == targets).float().mean())

    theirs = make_plan(replace(toy.task(), metric=accuracy), spec="t")
    assert (theirs.metric, theirs.shown(97.125)) == ("accuracy", "97.12")
    assert plan().shown(0.97125) == "97.12%"


def test_a_metric_that_two_examples_are_too_few_for_is_tried_on_all(tmp_path: Path) -> None:
    """As scikit-learn's, where a test set is sorted by class."""

    def picky(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        if len(targets.unique()) < 4:
            raise ValueError("only some classes are there")
        return float((outputs.argmax(1) == targets).float().mean())

    order = toy.examples(500, 1).tensors[1].argsort()
    task = replace(toy.task(), test=torch.utils.data.Subset(toy.examples(500, 1), order.tolist()), metric=picky)
    assert bn.race(task, ["baseline"], seeds=1, steps=8, out=tmp_path / "o")["metric"] == "picky"


def test_a_race_in_this_process_goes_on_or_says_what_is_different(tmp_path: Path) -> None:
    mine = bn.Contender("mine", network={"activation": str})  # what JSON has no word for
    task = replace(toy.task(), model=lambda activation=None: toy.model(), steps=8)
    first = bn.race(task, ["baseline", mine], seeds=1, out=tmp_path)
    own = tmp_path / "film.part1.rar"
    own.touch()
    again = bn.race(task, ["baseline", mine], seeds=1, out=tmp_path, resume=True)
    assert json.dumps(again["contenders"]) == json.dumps(first["contenders"])
    assert own.exists()
    with pytest.raises(RaceError, match=r"another configuration: seeds was 1, is 2\.$"):
        bn.race(task, ["baseline", mine], seeds=2, out=tmp_path, resume=True)
    with pytest.raises(RaceError, match=r"of bn\.race, which alone has its task: go on with the same call and out='"):
        read_plan(tmp_path)
    with pytest.raises(RaceError, match="resume=True goes on in the directory that out= names"):
        bn.race(task, ["baseline", mine], seeds=1, resume=True)


def test_other_batches_take_as_many_examples_and_rates_in_proportion() -> None:
    task = replace(toy.task(), full_steps=801, learning_rate=0.01)
    smaller = task.with_batch_size(5)
    assert (smaller.batch_size, smaller.base_rate, smaller.asked_rate) == (5, 0.01, 0.0025)
    assert (smaller.steps, smaller.full_steps, smaller.quick_steps) == (800, 3204, None)
    assert as_planned(task, 5, tune=False) == smaller
    assert as_planned(task, None, tune=False) is as_planned(task, 20, tune=False) is task
    assert smaller.facts() != task.facts()
    with pytest.raises(RaceError, match=r"--batch-size must be a whole number of at least 1 \(got -2\)"):
        task.with_batch_size(-2)


def test_stored_rates_are_of_the_batch_size_that_they_were_found_at() -> None:
    rates = {
        size: make_plan(load_task("inception").with_batch_size(size), spec="inception").tuned for size in (256, 32)
    }
    assert rates == {256: ("baseline", "short", "sgd", "fast", "fast-without-bn"), 32: ()}


def test_each_process_of_a_machine_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(RaceError, match="each process on this machine needs a GPU: 8 do, and torch sees 4"):
        replace(toy.task(), device="cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert device_of(replace(toy.task(), device="cuda")) == torch.device("cuda", 3)
    assert taken == [torch.device("cuda", 3)]
    assert device_of(toy.task()) == torch.device("cpu")


def test_by_default_nobody_runs_twice_under_two_names() -> None:
    """Of Adam ``sgd`` and ``bn-x5`` are one and the same, until they are tuned."""
    adam = replace(toy.task(), optimizer=lambda parameters: Adam(parameters, 1e-3))
    made = plan(adam)
    assert [c.name for c in made.contenders] == [name for name in PLAIN["default"] if name != "sgd"]
    assert made.left_out == ("sgd (here the same as bn-x5)",)
    assert [c.name for c in plan(adam, contenders=["baseline", "bn-x5", "sgd"]).contenders][2] == "sgd"  # as asked


def test_what_changed_of_a_task_is_named() -> None:
    made = plan(replace(toy.task(), clip_grad_norm=1.0))
    with pytest.raises(RaceError, match=r"when the race was planned: clip_grad_norm was 1.0, is 0.1\.$"):
        check_same(made, replace(toy.task(), clip_grad_norm=0.1), 1)
    with pytest.raises(RaceError, match=r"training examples was 1000, is 900; other training data\. A task function"):
        check_same(plan(), replace(toy.task(), train=toy.examples(900, 0)), 1)


def test_a_metric_that_is_no_number_is_refused_before_any_long_work() -> None:
    wrong = replace(toy.task(), metric=lambda outputs, targets: float("nan"), metric_name="mine")
    with pytest.raises(
        RaceError, match=r"as contender 'baseline': its mine is nan of the untrained network: it must be"
    ):
        try_contenders(wrong, plan(wrong))


def test_an_error_in_the_users_code_comes_with_its_place() -> None:
    def metric(outputs: Any, targets: Any) -> float:
        return outputs.foo

    wrong = replace(toy.task(), metric=metric)
    with pytest.raises(RaceError, match=r"no attribute 'foo' \(test_plan\.py, line \d+, in metric\)$"):
        try_contenders(wrong, plan(wrong))


def test_a_contender_that_diverges_in_its_first_step_does_not_stop_the_race() -> None:
    loud = bn.Contender("loud", recipe=bn.Recipe(learning_rate=1e30))
    task = replace(toy.task(), metric="loss", optimizer=lambda parameters: torch.optim.SGD(parameters, 1.0))
    task = replace(task, scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    try_contenders(task, plan(task, contenders=["baseline", loud]))


def test_a_class_of_an_interactive_session_can_be_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    """inspect finds no file of it."""
    kind = type(
        "Net", (nn.Linear,), {"__module__": "__main__", "__init__": lambda self: nn.Linear.__init__(self, 8, 4)}
    )
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(OSError, match="source code not available"):
        inspect.getsourcefile(kind)
    assert len(plan(replace(toy.task(), model=kind), contenders=["baseline"]).sources) == 1


def test_a_contender_in_the_baselines_own_budget_is_no_second_baseline() -> None:
    """``short`` of the built-in mlp, whose stored budget is a whole number."""
    rates = {"baseline": 0.2, "short": 0.2}
    short = CONTENDERS["short"].at_speed(stored_speeds("mlp", "default")["short"])
    left, twins = without_twins([CONTENDERS["baseline"], short], rates)
    assert [c.name for c in left] == ["baseline"]
    assert twins == ["short (here the same as baseline)"]

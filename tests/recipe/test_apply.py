"""recipe/recipe.py and apply.py: what becomes of optimizers and schedulers."""

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import batchnorm as bn

PAPER = bn.RECIPES["paper"]
FASTER = bn.Recipe(decay_speed=6)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def sgd(model: nn.Module | None = None, **options: float) -> torch.optim.SGD:
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | options
    return torch.optim.SGD((network() if model is None else model).parameters(), **settings)  # type: ignore[arg-type]


def test_rates_and_decay_are_multiplied_and_gamma_beta_and_biases_do_not_decay() -> None:
    model = network()
    optimizer = sgd(model)
    PAPER.apply(optimizer)
    weights, others = optimizer.param_groups
    assert {id(p) for p in weights["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert {id(p) for p in others["params"]} == {id(p) for p in (model[1].weight, model[1].bias, model[3].bias)}
    assert (weights["lr"], others["lr"]) == (0.5, 0.5)
    assert (weights["weight_decay"], others["weight_decay"]) == (pytest.approx(0.002), 0)
    assert others["momentum"] == 0.9


def test_groups_of_the_users_own_keep_their_settings() -> None:
    model = network()
    optimizer = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": [*model[1].parameters()], "weight_decay": 0.5},
            {"params": model[3].parameters()},
        ],
        lr=0.01,
        weight_decay=0.2,
    )
    scheduler = schedulers.StepLR(optimizer, 60)
    PAPER.apply(optimizer, scheduler)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5, 0.05, 0.05, 0.05])
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.04, 0, 0.04, 0])
    assert scheduler.base_lrs == pytest.approx([0.5, 0.05, 0.05, 0.05])
    optimizer.step()
    scheduler.step()


def test_the_state_of_an_optimizer_stays_with_its_parameters() -> None:
    model = network()
    optimizer = sgd(model)
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    before = {p: optimizer.state[p]["momentum_buffer"] for p in model.parameters()}
    PAPER.apply(optimizer)
    optimizer.step()
    assert {p: optimizer.state[p]["momentum_buffer"] for p in model.parameters()} == before
    again = sgd(model)
    PAPER.apply(again)
    again.load_state_dict(optimizer.state_dict())  # as in a resumed run
    assert again.param_groups[1]["weight_decay"] == 0


MAKERS = {
    "StepLR": lambda o, k: schedulers.StepLR(o, 60 // k, gamma=0.3),
    "MultiStepLR": lambda o, k: schedulers.MultiStepLR(o, [60 // k, 60 // k, 120 // k], gamma=0.3),
    "ExponentialLR": lambda o, k: schedulers.ExponentialLR(o, 0.99**k),
    "CosineAnnealingLR": lambda o, k: schedulers.CosineAnnealingLR(o, 240 // k),
    "CosineAnnealingWarmRestarts": lambda o, k: schedulers.CosineAnnealingWarmRestarts(o, 60 // k),
    "ConstantLR": lambda o, k: schedulers.ConstantLR(o, 0.2, 60 // k),
    "LinearLR": lambda o, k: schedulers.LinearLR(o, 0.2, 1, 60 // k),
    "PolynomialLR": lambda o, k: schedulers.PolynomialLR(o, 240 // k, 2),
    "LambdaLR": lambda o, k: schedulers.LambdaLR(o, lambda step: 1 / (1 + k * step)),
    "OneCycleLR": lambda o, k: schedulers.OneCycleLR(o, 0.4, 240 // k),
    "CyclicLR": lambda o, k: schedulers.CyclicLR(o, 0.1, 0.4, 60 // k, 30 // k, mode="triangular2"),
    "SequentialLR": lambda o, k: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.2, 1, 60 // k), schedulers.CosineAnnealingLR(o, 180 // k)], [60 // k]
    ),
    "ChainedScheduler": lambda o, k: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.2, 1, 60 // k), schedulers.StepLR(o, 60 // k)]
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_scheduler_runs_six_times_faster_at_rates_five_times_as_high(kind: str) -> None:
    """Beside one that was made so from the start."""

    def rates(optimizer: torch.optim.Optimizer, scheduler: schedulers.LRScheduler) -> list[float]:
        found = []
        for _ in range(39):
            found.append(optimizer.param_groups[0]["lr"])
            assert all(group["lr"] == found[-1] for group in optimizer.param_groups)
            optimizer.step()
            scheduler.step()
        return found

    given = sgd()
    scheduler = MAKERS[kind](given, 1)
    PAPER.apply(given, scheduler)
    assert len(given.param_groups) == 2
    wanted = sgd(lr=0.1)
    expected = [5 * rate for rate in rates(wanted, MAKERS[kind](wanted, 6))]
    assert len(set(expected)) > 1
    assert rates(given, scheduler) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("total", [100, 101, 250])
@pytest.mark.parametrize("options", [{}, {"anneal_strategy": "linear"}, {"three_phase": True}])
def test_one_cycle_ends_at_its_lowest_rate_whatever_its_length(total: int, options: dict[str, Any]) -> None:
    optimizer = sgd()
    scheduler = schedulers.OneCycleLR(optimizer, 0.4, total, **options)
    PAPER.apply(optimizer, scheduler)
    assert scheduler.total_steps == round(total / 6)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(scheduler.total_steps - 1):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    assert min(found) == found[-1] == pytest.approx(5 * 0.4 / 25 / 1e4)
    assert max(found) == pytest.approx(5 * 0.4, rel=0.1)


def test_floors_lists_that_are_shared_and_several_schedulers() -> None:
    optimizer = sgd()
    warm_up = schedulers.LinearLR(optimizer, 0.5, 1, 60)
    plateau = schedulers.ReduceLROnPlateau(optimizer, min_lr=0.01)
    PAPER.apply(optimizer, [warm_up, plateau])
    assert plateau.min_lrs == [0.05, 0.05]
    assert warm_up.total_iters == 10
    optimizer = sgd()
    both = schedulers.SequentialLR(
        optimizer, [schedulers.ConstantLR(optimizer), schedulers.StepLR(optimizer, 60)], [60]
    )
    PAPER.apply(optimizer, both)
    assert both.get_last_lr() == pytest.approx([0.5 / 3, 0.5 / 3])


def test_what_becomes_much_shorter_or_longer_than_asked_is_said() -> None:
    optimizer = sgd()
    with pytest.warns(
        UserWarning, match="3 cannot be made 6 times shorter, it becomes 1: let the scheduler count in steps"
    ):
        PAPER.apply(optimizer, schedulers.MultiStepLR(optimizer, [3, 60]))


def test_layers_without_batch_normalization_keep_their_rate() -> None:
    model = bn.accelerate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4))
    optimizer = sgd(model)
    scheduler = schedulers.MultiStepLR(optimizer, [60, 120])
    model.batchnorm_recipe.apply(optimizer, scheduler, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in (model[0].weight, model[0].batch_norm.bias)] == [0.5, 0.5]
    assert [rates[id(p)] for p in (model[2].weight, model[2].bias)] == [0.1, 0.1]
    assert [decays[id(p)] for p in (model[0].weight, model[2].weight)] == pytest.approx([0.002, 0.002])
    assert [decays[id(p)] for p in (model[0].batch_norm.weight, model[2].bias)] == [0, 0]
    for _ in range(11):
        optimizer.step()
        scheduler.step()
    assert sorted(scheduler.get_last_lr()) == pytest.approx([0.01, 0.01, 0.05, 0.05])
    other = sgd(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"and an optimizer of its parameters: torch\.optim\.SGD\(accelerated"):
        PAPER.apply(other, None, model)


class Inner(nn.Module):
    """As a wrapper names what is in it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


def parts_compiled(model: nn.Sequential) -> nn.Module:
    model[2] = torch.compile(model[2])
    return model


def weight_computed(model: nn.Sequential) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model[2])
    return model


@pytest.mark.parametrize("wrap", [Inner, torch.compile, lambda m: torch.compile(Inner(m)), parts_compiled,
                                  weight_computed, lambda m: bn.from_torch(m, example=torch.randn(3, 4))])  # fmt: skip
def test_layers_keep_their_rate_in_wrappers_too(wrap: Any) -> None:
    model = wrap(bn.accelerate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)))
    optimizer = sgd(model)
    PAPER.apply(optimizer, model=model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {("2." in name): rates[id(p)] for name, p in model.named_parameters()}
    assert len(rates) == len([*model.parameters()])
    assert found == {False: 0.5, True: 0.1}


def test_a_report_that_does_not_tell_which_layers_are_normalized_is_refused_and_the_way_out_works() -> None:
    model, x = network(), torch.randn(3, 4)
    ours = bn.from_torch(model, example=x)
    with pytest.raises(
        ValueError, match=r"does not tell which layers .*make the model by accelerate\(\) or insert\(\)"
    ):
        PAPER.apply(sgd(ours), model=ours)
    for told in (bn.from_torch(bn.insert(model, x), example=x), bn.insert(ours, x)):
        optimizer = sgd(told)
        PAPER.apply(optimizer, model=told)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert [rates[id(p)] for p in told.parameters()] == [0.5, 0.5, 0.5, 0.1, 0.1]


@pytest.mark.parametrize("kind", ["CosineAnnealingLR", "CosineAnnealingWarmRestarts", "Sequential", "closed form"])
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_a_kept_rate_keeps_its_floor(kind: str) -> None:
    """Beside schedulers of optimizers that have one of the two rates alone."""
    cosine, restarts = schedulers.CosineAnnealingLR, schedulers.CosineAnnealingWarmRestarts

    def make(optimizer: torch.optim.Optimizer, k: int, times: float) -> Any:
        if kind == "Sequential":
            warm = schedulers.LinearLR(optimizer, 0.2, 1, 60 // k)
            return schedulers.SequentialLR(
                optimizer, [warm, restarts(optimizer, 60 // k, eta_min=0.05 * times)], [60 // k]
            )
        of = restarts if "Restarts" in kind else cosine
        return of(optimizer, 240 // k, eta_min=0.05 * times)

    def rates(optimizer: torch.optim.Optimizer, scheduler: Any) -> list[list[float]]:
        found = []
        for step in range(1, 60):
            optimizer.step()
            scheduler.step(*[step] * (kind == "closed form"))
            found.append(sorted({round(group["lr"], 9) for group in optimizer.param_groups}))
        return found

    model = bn.accelerate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4))
    kept, faster, given = sgd(lr=0.1), sgd(lr=0.5), sgd(model)
    scheduler = make(given, 1, 1)
    PAPER.apply(given, scheduler, model)
    again = pickle.loads(pickle.dumps(scheduler.state_dict()))
    wanted = [rates(kept, make(kept, 6, 1)), rates(faster, make(faster, 6, 5))]
    expected = [[*a, *b] for a, b in zip(*wanted, strict=True)]
    assert rates(given, scheduler) == [pytest.approx(one) for one in expected]
    scheduler.load_state_dict(again)


class Slower:
    """A factor with a state."""

    def __init__(self) -> None:
        self.k = 1

    def __call__(self, step: int) -> float:
        return self.k / (1 + step)


def test_a_factor_with_a_state_saves_and_loads_it() -> None:
    found = []
    for k in (1, 3):
        factor, optimizer = Slower(), sgd()
        factor.k = k
        scheduler = schedulers.LambdaLR(optimizer, factor)
        PAPER.apply(optimizer, scheduler)
        assert scheduler.state_dict()["lr_lambdas"] == [{"k": k}, {"k": k}]
        found.append((scheduler, optimizer, factor))
    (scheduler, optimizer, factor), (other, _, _) = found
    scheduler.load_state_dict(pickle.loads(pickle.dumps(other.state_dict())))
    assert factor.k == 3
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5 * 0.1 * 3 / 7)
    assert copy.deepcopy(scheduler.lr_lambdas[0])(2) == 3 / 13


def test_names_of_parameters_go_where_they_go() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, weight_decay=0.01)
    PAPER.apply(optimizer)
    assert [g["param_names"] for g in optimizer.param_groups] == [
        ["0.weight", "3.weight"], ["1.weight", "1.bias", "3.bias"]
    ]  # fmt: skip


def test_a_plateau_is_waited_for_a_sixth_of_the_time() -> None:
    optimizer = sgd()
    scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=12, cooldown=6)
    PAPER.apply(optimizer, scheduler)
    for _ in range(4):
        optimizer.step()
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


def test_refused_before_anything_is_changed() -> None:
    optimizer = sgd()
    scheduler = schedulers.StepLR(optimizer, 60)
    state = optimizer.state_dict()

    def refuse(kind: type[Exception], message: str, recipe: bn.Recipe = PAPER, at: object = scheduler) -> None:
        with pytest.raises(kind, match=message):
            recipe.apply(optimizer, at)  # type: ignore[arg-type]
        assert optimizer.state_dict() == state

    refuse(
        TypeError,
        "does not know what a MultiplicativeLR counts in steps. Known: StepLR",
        at=schedulers.MultiplicativeLR(sgd(), float),
    )
    refuse(ValueError, "the StepLR stands on another optimizer", at=schedulers.StepLR(sgd(), 6))
    refuse(ValueError, "a scheduler stands on this optimizer: pass it too", at=None)
    optimizer.step()
    scheduler.step()
    refuse(ValueError, "the StepLR has stepped already: apply a recipe before training")
    optimizer = sgd()
    PAPER.apply(optimizer)
    state = optimizer.state_dict()
    refuse(ValueError, "recipe paper has been applied to this optimizer", at=None)
    for optimizer in (sgd(momentum=0), sgd(dampening=0.5), torch.optim.AdamW(network().parameters())):
        state = optimizer.state_dict()
        refuse(ValueError, "the recipe asks for Nesterov's momentum", bn.RECIPES["sgd"], at=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"decay_speed": -1}, r"decay_speed is a factor, so a finite number of at least 0 \(got -1\)"),
        ({"weight_decay": math.inf}, "weight_decay is a factor"),
        ({"dropout": 1.5}, "dropout multiplies probabilities, so it is at most 1"),
    ],
)
def test_wrong_recipes(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PAPER, **changes)  # type: ignore[arg-type]


def test_a_recipe_prints_what_it_changes_and_who_does_it() -> None:
    assert str(bn.Recipe()) == "recipe mine"
    assert str(bn.Recipe("x", weight_decay=2)).splitlines()[1].split("    ") == ["weight decay x2", "apply(optimizer)"]
    assert "no weight decay on gamma, beta and biases" in str(bn.Recipe(only_weights=True))
    assert "learning-rate decay 2 times slower, for 2 times the steps" in str(bn.Recipe(decay_speed=0.5))
    assert "dropout x0.5" in str(bn.Recipe(dropout=0.5))
    assert len(str(PAPER).splitlines()) == 6


def test_a_group_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) is many]} for many in (True, False)]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.01)
    PAPER.apply(optimizer, schedulers.StepLR(optimizer, 60))
    assert [(g["lr"], len(g["params"])) for g in optimizer.param_groups] == [(0.5, 1), (0.5, 0)]


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(model.parameters())


class KeepsItsParameters(torch.optim.SGD):
    """As optimizers of other packages do; a list of its own."""

    def __init__(self, parameters: Any, **options: float) -> None:
        super().__init__(parameters, **options)
        self.kept = [p for group in self.param_groups for p in group["params"]]


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.1)


REFUSED: dict[str, tuple[Any, Any, bn.Recipe, str]] = {
    "one group": (lbfgs, None, PAPER, r"the parameters of LBFGS into 2 groups .* takes one \(_params\): use SGD"),
    "one group, after loading": (
        lambda m: (o := lbfgs(m)).load_state_dict(o.state_dict()) or o, None, PAPER, "LBFGS takes one",
    ),
    "one group, others'": (
        lambda m: KeepsItsParameters(m.parameters(), lr=0.1), None, PAPER, r"KeepsItsParameters takes one \(kept\)",
    ),
    "no rate": (adafactor, None, FASTER, None),
    "no rate, multiplied": (adafactor, None, PAPER, r"Adafactor has lr=None, .* cannot multiply: give it a number, "),
    "no decay": (
        lambda m: torch.optim.SGD([{"params": m.parameters(), "weight_decay": None}], lr=0.1), None, PAPER,
        r"SGD has weight_decay=None",
    ),
    "scheduler unknown": (
        sgd, lambda o: schedulers.MultiplicativeLR(o, float), PAPER, "does not know what a MultiplicativeLR counts",
    ),
    "a part unknown": (
        sgd, lambda o: schedulers.ChainedScheduler([schedulers.StepLR(o, 6), schedulers.MultiplicativeLR(o, float)]),
        PAPER, "does not know what a MultiplicativeLR counts",
    ),
    "a function of iterations": (
        sgd, lambda o: schedulers.CyclicLR(o, 0.1, 1, mode="exp_range", gamma=0.9), PAPER,
        "does not know what a CyclicLR scaled by iterations counts in steps",
    ),
    "another's scheduler": (sgd, lambda o: schedulers.StepLR(sgd(), 6), PAPER, "stands on another optimizer"),
    "not passed": (lambda m: schedulers.StepLR(sgd(m), 6).optimizer, None, PAPER, "pass it too"),
    "a scheduler unknown, in the same time": (
        sgd, lambda o: schedulers.MultiplicativeLR(o, float), bn.Recipe(learning_rate=5),
        r"ChainedScheduler\. Apply the recipe to the optimizer, before the scheduler is made",
    ),
    "the model second": (sgd, lambda o: network(), PAPER, r"a scheduler second, got a Sequential: .*model=model\)"),
    "an optimizer second": (sgd, lambda o: sgd(), PAPER, "a scheduler second, got a SGD"),
    "patience": (
        sgd, lambda o: schedulers.ReduceLROnPlateau(o, patience=2), PAPER,
        "2 cannot be made 6 times shorter, it becomes 0",
    ),
    "warnings are errors": (
        sgd, lambda o: [schedulers.StepLR(o, 60), schedulers.StepLR(o, 2)], PAPER, "2 cannot be made 6 times shorter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("error:.*times shorter")
def test_what_is_refused_leaves_optimizer_and_schedulers_as_they_were(case: str) -> None:
    make, schedule, recipe, message = REFUSED[case]
    optimizer = make(network())
    scheduler = None if schedule is None else schedule(optimizer)
    members = scheduler if isinstance(scheduler, list) else [] if scheduler is None else [scheduler]

    def state() -> Any:
        groups = [(id(g), {**g, "params": [id(p) for p in g["params"]]}) for g in optimizer.param_groups]
        return copy.deepcopy([groups, [{**vars(s), "optimizer": 0, "_schedulers": 0} for s in members]])

    before = state()
    if message is None:
        recipe.apply(optimizer, scheduler)
        assert [g["lr"] for g in optimizer.param_groups] == [None]
        return
    with pytest.raises((ValueError, TypeError, UserWarning), match=message):
        recipe.apply(optimizer, scheduler)
    assert str(state()) == str(before)


@pytest.mark.parametrize("given", [network(), network().parameters(), schedulers.StepLR(sgd(), 60)], ids=type)
def test_what_is_no_optimizer_or_no_model_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=rf"an optimizer first, got a {type(given).__name__}: apply\(optimizer, sched"):
        PAPER.apply(given)
    if not isinstance(given, nn.Module):
        with pytest.raises(TypeError, match=rf"takes a model third, got a {type(given).__name__}: apply\(optimizer"):
            PAPER.apply(sgd(), None, given)


def test_an_optimizer_with_one_group_takes_a_recipe_that_cuts_nothing() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    bn.Recipe(learning_rate=5).apply(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    x = torch.randn(4, 4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).pow(2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert closure() < first


def test_a_rate_that_is_a_tensor_is_one_per_group() -> None:
    optimizer = torch.optim.AdamW(network().parameters(), lr=torch.tensor(0.1))
    scheduler = schedulers.ExponentialLR(optimizer, 0.9)
    bn.Recipe(only_weights=True).apply(optimizer, scheduler)
    optimizer.step()
    scheduler.step()
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.09, 0.09])

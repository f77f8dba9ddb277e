"""recipe/recipe.py, followers.py, warm_up.py: a recipe that brings its optimizer and scheduler."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import on_ranks
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.recipe.followers import normalized, parameter_groups
from batchnorm.recipe.muon import Muon

FAST = bn.RECIPES["fast"]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Dropout(),
        nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block as networks that have batch normalization are written, and layers that it does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.pooled, self.bn2 = nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.bn3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.also_read, self.bn4 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.tied, self.bn5 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.tie = nn.Conv2d(3, 3, 1)
        self.tie.weight = self.tied.weight
        self.frozen, self.bn6 = nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3)
        bn.freeze(self.bn6)
        self.computed, self.bn7 = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(F.max_pool2d(self.pooled(F.relu(self.bn1(self.conv1(x)))), 2))
        y = F.relu(self.bn3(self.twice(y))) + F.relu(self.bn3(self.twice(2 * y)))
        z = self.also_read(y)
        y = F.tanh(self.tie(F.relu(self.bn5(self.tied(self.bn4(z) + z)))))
        y = F.tanh(self.bn6(self.frozen(y)))
        return self.head(F.relu(self.bn7(self.computed(y))).mean((2, 3)))


def names(optimizer: Any) -> list[str]:
    weights = [g for g in optimizer.param_groups if g["orthogonalize"]]
    return [name for group in weights for name in group["param_names"]]


def test_two_lines_train_a_network_of_somebody_elses() -> None:
    torch.manual_seed(0)
    y = (X[:, 0].mean((1, 2)) > 0).long()
    model = bn.accelerate(plain(), X, recipe="fast")
    optimizer = model.batchnorm_recipe.optimizer(model)
    scheduler = model.batchnorm_recipe.scheduler(optimizer, 20)
    weights, others = optimizer.param_groups
    assert names(optimizer) == ["0.weight", "2.weight"]
    assert weights["blocks"] == [1, 4]
    assert (weights["lr"], others["lr"]) == pytest.approx((0.015, 0.25))  # 10% of 20 steps: the first of two
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert len(weights["params"]) + len(others["params"]) == len([*model.parameters()])
    norm, losses = model[0].weight.norm().item(), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert model[0].weight.norm().item() == pytest.approx(norm, rel=1e-5)
    assert scheduler.get_last_lr() == [0, 0]
    assert model[4].p == 0


def test_where_batch_normalization_is_there_already_an_example_shows_its_layers() -> None:
    """What it alone reads: behind a maximum and called twice too; not what others read or hold, nor a frozen one's."""
    optimizer = FAST.optimizer(Block(), X)
    assert names(optimizer) == ["conv1.weight", "pooled.weight", "twice.weight"]


def test_what_it_finds_is_what_scale_does_nothing_to() -> None:
    """Each weight of a residual network by itself, times 3: outputs in train tell."""
    torch.manual_seed(0)
    model, found = Block().double(), []
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 1e-30
    x, wanted = X.double(), {"conv1.weight", "pooled.weight", "twice.weight"}
    before = model(x)
    for name, p in model.named_parameters():
        if p.ndim > 1 and not name.startswith("computed"):
            with torch.no_grad():
                p.mul_(3)
                found += [name] * torch.allclose(model(x), before, rtol=1e-9, atol=1e-12)
                p.div_(3)
    assert {*found} == wanted


@pytest.mark.parametrize("kind", ["accelerate", "insert", "insert into one that has it", "from_torch"])
def test_a_report_tells_the_layers_too(kind: str) -> None:
    model: Any = bn.accelerate(plain(), X, "fast") if kind in ("accelerate", "from_torch") else bn.insert(plain(), X)
    if kind == "from_torch":
        model = bn.from_torch(model, example=X)
    if kind == "insert into one that has it":
        model = bn.insert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)), X)
    told = names(FAST.optimizer(model))
    assert told == names(FAST.optimizer(model, X))
    assert told == (["0.weight"] if "one that" in kind else ["0.weight", "2.weight"])
    if kind == "insert":
        model[2].batch_norm = nn.Identity()  # and what is there counts
        assert names(FAST.optimizer(model)) == ["0.weight"]
        nn.utils.parametrizations.weight_norm(model[0])
        assert normalized(model) == [model[0]]
        assert parameter_groups(model, normalized(model))[0]["orthogonalize"] is False


class Wrapper(nn.Module):
    """As a wrapper names what is in it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)


def parts_compiled(model: Any) -> Any:
    model[0] = torch.compile(model[0])
    return model


@pytest.mark.parametrize("wrap", [Wrapper, torch.compile, lambda m: torch.compile(Wrapper(m)), parts_compiled])
@pytest.mark.parametrize("example", [None, X], ids=["by report", "by example"])
def test_wrappers_are_looked_through(wrap: Any, example: Any) -> None:
    model = wrap(bn.accelerate(plain(), X, "fast"))
    optimizer = FAST.optimizer(model, example)
    assert [name.replace("_orig_mod.", "") for name in names(optimizer)] == ["0.weight", "2.weight"]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len([*model.parameters()])


def test_a_network_without_it_takes_the_same_steps_as_a_control() -> None:
    model, with_bn = plain(), bn.accelerate(plain(), X, "fast")
    layers = [model.get_submodule(name) for name in with_bn.batchnorm_report.of("normalized")]
    optimizer = Muon(parameter_groups(model, layers, keep_norm=False))
    assert names(optimizer) == names(FAST.optimizer(with_bn))
    start = layers[0].weight.detach().clone()
    model(X).square().sum().backward()
    optimizer.step()
    step = (layers[0].weight.detach() - start).norm() / start.norm()
    assert step == pytest.approx(0.03, rel=1e-4)
    assert layers[0].weight.norm() != start.norm()


def test_the_rates_rise_and_fall_as_lines_and_go_on_where_they_were() -> None:
    recipe = replace(FAST, warm_up=0.25, learning_rate=2)
    model = bn.accelerate(plain(), X, recipe)

    def rates(scheduler: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(scheduler.get_last_lr()[0] / 0.06)
            scheduler.optimizer.step()
            scheduler.step()
        return found

    first = recipe.scheduler(recipe.optimizer(model), 8)
    whole = rates(recipe.scheduler(recipe.optimizer(model), 8), 9)
    assert whole == pytest.approx([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    part = rates(first, 3)
    stream = io.BytesIO()
    torch.save((first.optimizer.state_dict(), first.state_dict()), stream)
    stream.seek(0)
    states = torch.load(stream, weights_only=True)
    again = recipe.scheduler(recipe.optimizer(model), 1000)
    again.optimizer.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert part + rates(again, 6) == pytest.approx(whole)
    at_once = replace(recipe, warm_up=0)
    assert rates(at_once.scheduler(at_once.optimizer(model), 2), 3) == pytest.approx([1, 1 / 2, 0])


def test_it_prints_what_it_brings() -> None:
    assert str(FAST) == (
        "recipe fast\n"
        "Muon, learning rate 0.03: weights before batch normalization    optimizer(model)\n"
        "SGD, learning rate 0.5, Nesterov momentum: all others           optimizer(model)\n"
        "their gradients cut to 2% of what they move                     optimizer(model)\n"
        "no weight decay                                                 optimizer(model)\n"
        "learning rates up over 10% of the steps, then linearly to 0     scheduler(optimizer, steps)\n"
        "no dropout                                                      accelerate\n"
        "training examples reshuffled each epoch                         you: DataLoader(..., shuffle=True)"
    )
    assert "learning rates linearly to 0 " in str(replace(FAST, warm_up=0))
    assert "their gradients" not in str(replace(FAST, clip=0))
    assert "learning-rate decay 6 times faster" in str(replace(FAST, decay_speed=6))
    assert replace(FAST, name="fast") == FAST


def sharded(rank: int, world: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(bn.accelerate(plain(), X, "fast"), mesh=init_device_mesh("cpu", (world,)))
    try:
        FAST.optimizer(model)
    except RuntimeError as error:
        return str(error)
    return "taken"


def test_refused() -> None:
    model = bn.accelerate(plain(), X, "fast")
    paper = bn.RECIPES["paper"]
    with pytest.raises(ValueError, match=r"recipe fast brings its optimizer: optimizer = recipe\.optimizer\(model\)"):
        FAST.apply(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"recipe paper brings no optimizer, it changes yours: recipe\.apply\("):
        paper.optimizer(model)
    with pytest.raises(ValueError, match=r"recipe paper brings no scheduler, it changes yours: recipe\.apply\("):
        paper.scheduler(torch.optim.SGD(model.parameters(), lr=0.1), 10)
    with pytest.raises(ValueError, match=r"is seen when the model runs: pass an input, recipe\.optimizer\(model, exam"):
        FAST.optimizer(Block())
    with pytest.raises(ValueError, match=r"is seen when the model runs"):
        FAST.optimizer(bn.from_torch(Block(), example=X))  # its report is about other things
    for example in (None, X):
        with pytest.raises(ValueError, match=r"no layer of the model has batch normalization behind it: make the"):
            FAST.optimizer(plain(), example)
    with pytest.raises(TypeError, match=r"optimizer takes a model, got a generator: recipe\.optimizer\(model\)"):
        FAST.optimizer(model.parameters())  # type: ignore[arg-type]
    for steps in (0, 2.5, True):
        with pytest.raises(ValueError, match=rf"steps of the whole training, at least 1 \(got {steps}\)"):
            FAST.scheduler(FAST.optimizer(model), steps)  # type: ignore[arg-type]
    has_it = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    with pytest.raises(ValueError, match=r'The rest of the recipe: batchnorm\.RECIPES\["fast"\]\.optimizer\(model, ex'):
        bn.accelerate(has_it, X, "fast")
    assert on_ranks(1, sharded)[0].startswith("Muon does not support parameters that are sharded")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"muon_lr": -1}, "muon_lr is a rate, so a finite number of at least 0"),
        ({"warm_up": -1}, "warm_up is a share, so a finite number of at least 0"),
        ({"clip": -1}, "clip is a share, so a finite number of at least 0"),
        ({"warm_up": 1}, "warm_up is a share of the steps, so below 1"),
        ({"sgd_lr": 0}, "muon_lr is for weights before batch normalization alone: give sgd_lr too"),
        ({"muon_lr": 0}, "sgd_lr is of a recipe that brings its optimizer: give muon_lr too"),
        ({"muon_lr": 0, "sgd_lr": 0}, "clip is of a recipe that brings its optimizer: give muon_lr too"),
        ({"nesterov": True}, "nesterov changes an optimizer of the user's, and with muon_lr the recipe brings its own"),
        ({"weight_decay": 0.2}, "weight_decay changes an optimizer of the user's"),
    ],
)
def test_wrong_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FAST, **changes)

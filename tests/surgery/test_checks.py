"""Models that hide their calls, or know themselves as they are: done right, or refused by name, never half."""

import copy
import functools
import itertools
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

import batchnorm as bn
from tests.processes import on_ranks

X = torch.randn(3, 4, 6, 6)
VERBS = {
    "from_torch": lambda model: bn.from_torch(model, example=X),
    "to_torch": bn.to_torch,
    "convert_sync_batchnorm": bn.convert_sync_batchnorm,
    "revert_sync_batchnorm": bn.revert_sync_batchnorm,
    "insert": lambda model: bn.insert(model, X),
    "accelerate": lambda model: bn.accelerate(model, X),
    "fold": lambda model: bn.fold(model, X),
    "remove": lambda model: bn.remove(model, X),
}
every_verb = pytest.mark.parametrize("verb", VERBS)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.plain, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x):
        return self.relu(self.plain(F.relu(self.bn(self.conv(x)))))


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPED = [
    (compiled, "the model is compiled by torch.compile: pass model._orig_mod, and compile the result"),
    (lambda m: nn.Sequential(compiled(m)), "0 is compiled by torch.compile: put its _orig_mod in its place"),
    (nn.DataParallel, "the model is wrapped by DataParallel: pass model.module, and wrap the result"),
    (lambda m: nn.Sequential(nn.DataParallel(m)), "0 is wrapped by DataParallel: put its module in its place"),
    (torch.jit.script, "the model is a RecursiveScriptModule, .* pass the module that it was made from"),
    (lambda m: torch.jit.trace(m, X), "the model is a TopLevelTracedModule, .* script or trace the result"),
]


@every_verb
@pytest.mark.parametrize(("wrap", "why"), WRAPPED, ids=[why.split(":")[0] for _, why in WRAPPED])
def test_wrappers_are_refused_with_what_to_pass(verb, wrap, why):
    with pytest.raises(ValueError, match=f"{verb}: {why}"):
        VERBS[verb](wrap(Block().eval()))


@every_verb
def test_what_is_no_module(verb):
    with pytest.raises(TypeError, match=rf"{verb} takes a torch.nn.Module, got list"):
        VERBS[verb]([Block()])


@pytest.mark.parametrize("verb", ["from_torch", "insert", "accelerate", "fold"])
def test_what_cannot_run_yet_is_named(verb):
    lazy = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    with pytest.raises(ValueError, match=r"0 \(LazyConv2d\) does not know its shapes yet: run the model once"):
        VERBS[verb](lazy)
    with pytest.raises(ValueError, match=r"conv \(Conv2d\) is on the meta device"):
        VERBS[verb](Block().to("meta"))


def sharded_or_distributed(rank, world):
    found = {}
    for verb, call in VERBS.items():
        sharded = Block().eval()
        fully_shard(sharded.plain)
        for name, model in (("shard", sharded), ("ddp", nn.parallel.DistributedDataParallel(Block().eval()))):
            try:
                call(model)
            except ValueError as error:
                found[verb, name] = str(error)
    return found


def test_sharded_and_distributed_ones():
    (found,) = on_ranks(1, sharded_or_distributed)
    for verb in VERBS:
        advice = f"cut by fully_shard, which knows its parameters: call {verb} before, and shard the result."
        assert found[verb, "shard"] == f"{verb}: plain is {advice}"
        if verb not in ("insert", "accelerate", "remove"):
            assert "wrapped by DistributedDataParallel" in found[verb, "ddp"]
            assert "pass model.module, and wrap the result" in found[verb, "ddp"]
    assert ("insert", "ddp") not in found
    assert ("remove", "ddp") not in found


def trained(rank, world):
    torch.manual_seed(rank)
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    ddp = nn.parallel.DistributedDataParallel(plain, find_unused_parameters=True)
    normalized = bn.insert(ddp, X, skip=["module.3"])
    accelerated = bn.accelerate(ddp, X)
    spread = []
    for model in (normalized, accelerated):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.randn(8, 4, 6, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        spread.append([p.detach() for p in model.parameters()])
    rows = [tuple(row) for row in normalized.batchnorm_report]
    return spread, rows, normalized.find_unused_parameters, accelerated.batchnorm_recipe.learning_rate, len(spread[0])


def test_insert_in_distributed_data_parallel_trains_alike_on_all_ranks():
    first, second = on_ranks(2, trained)
    for a, b in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert first[1:] == second[1:]
    rows = [("module.0", "normalized", "before 1"), ("module.3", "left alone", "skipped")]
    assert first[1:] == (rows, True, 5.0, 5)


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["scripted", "traced"])
@every_verb
def test_scripted_parts_are_in_the_report_or_refused(verb, make):
    model = nn.Sequential(make(Block().eval()), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    if verb == "convert_sync_batchnorm":
        with pytest.raises(ValueError, match=r"in 0 there is batch normalization, and a .* use the module that it was"):
            VERBS[verb](model)
        return
    done = VERBS[verb](model)
    if not verb.endswith(("to_torch", "revert_sync_batchnorm")):
        row = next(row for row in done.batchnorm_report if row.layer == "0")
        assert row.done == "left alone"
        assert "can be neither changed nor seen into" in row.why
    without = nn.Sequential(torch.jit.script(nn.ReLU()), nn.BatchNorm2d(4))
    assert type(bn.convert_sync_batchnorm(without)[1]) is bn.BatchNorm2d


# ---- forwards that were replaced on the object -----------------------------------------------------------------------


def as_method(module):
    module._old_forward = module.forward
    module.forward = types.MethodType(lambda self, *args: self._old_forward(*args), module)


def as_partial(module):
    """As accelerate's ``add_hook_to_module`` does."""

    def called(module, *args):
        return module._old_forward(*args)

    module._old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(called, module), module._old_forward)


def as_closure(module):
    old = module.forward
    module.forward = lambda *args: old(*args)


@pytest.mark.parametrize("replace", [as_method, as_partial, as_closure])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("0", "the forward of 0 cannot be traced: it was replaced on the object, and a new one would not be called"),
        (
            "0.bn",
            "its forward was replaced on the object: take that away first (torch.nn.modules.batchnorm.BatchNorm2d)",
        ),
        ("2", "its output goes to 2, which has hooks"),
    ],
)
def test_replaced_forwards(replace, name, why):
    model = nn.Sequential(Block(), nn.BatchNorm2d(4), nn.ReLU(), Block()).double().eval()
    replace(model.get_submodule(name))
    before, x = copy.deepcopy(model.state_dict()), X.double()
    fused = bn.from_torch(model, example=x)
    rows = {row.layer: (row.done, row.why) for row in fused.batchnorm_report}
    left = "1" if name == "2" else "0.bn"
    assert rows.pop(left) == ("left alone", why)
    assert {done for done, _ in rows.values()} == {"fused"}
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(bn.to_torch(fused)(x), model(x))
    fused.train()(x)  # shares its statistics with the model, on purpose
    model.load_state_dict(before)
    for verb in (bn.fold, lambda m, x: bn.convert_sync_batchnorm(m)):
        if name == "0.bn" and verb is not bn.fold:
            with pytest.raises(ValueError, match=r"layer '0.bn': its forward was replaced on the object"):
                verb(model, x)
        else:
            torch.testing.assert_close(verb(model, x).eval()(x), model(x))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_one_of_ours_does_not_go_back_with_another_forward():
    model = nn.Sequential(bn.BatchNorm2d(4))
    as_partial(model[0])
    with pytest.raises(ValueError, match=r"layer '0': its forward was replaced on the object: take that away first"):
        bn.to_torch(model)


def test_a_child_with_a_replaced_forward_is_not_written_into_another():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.BatchNorm2d(4))

        def forward(self, x):
            return F.relu(self.inner(x))

    model = Around().eval()
    as_partial(model.inner)
    report = bn.from_torch(model, example=X).batchnorm_report
    assert report[0].why.endswith("the forward of inner in it was replaced on the object")


# ---- what the model notices ------------------------------------------------------------------------------------------


class Holding(Block):
    def __init__(self, kind):
        super().__init__()
        blocks, named = [self.conv, self.bn], {"relu": self.relu}

        def path(x, plain=self.plain):
            for block in blocks:
                x = block(x)
            return named["relu"](plain(F.relu(x)))

        own = {
            "closure": lambda x: super(Holding, self).forward(x),
            "containers and defaults": path,
            "partial": functools.partial(Block.forward, self),
            "partial of a closure": functools.partial(path),
            "method": super().forward,
            "in a list": [path],
            "in an object": types.SimpleNamespace(path=path),
        }
        self.path = own[kind]

    def forward(self, x):
        path = self.path[0] if isinstance(self.path, list) else getattr(self.path, "path", self.path)
        return path(x)


KINDS = ["closure", "containers and defaults", "partial", "partial of a closure", "method", "in a list", "in an object"]


@every_verb
@pytest.mark.parametrize("kind", KINDS)
def test_functions_that_hold_the_model_hold_the_copy_in_the_copy(verb, kind):
    model = Holding(kind).eval()
    before, expected = copy.deepcopy(model.state_dict()), model(X)
    done = VERBS[verb](model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    called = []
    model.conv.register_forward_hook(lambda *_: called.append(1))
    y = done.eval()(X)
    assert not called  # the original's layers stay out of it
    if verb not in ("insert", "accelerate", "remove"):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_hook_that_holds_the_model():
    model = Block().eval()
    model.seen = 0

    def hook(*_):
        model.seen += 1

    model.conv.register_forward_hook(hook)
    ours = bn.from_torch(model, example=X)
    ours(X)
    assert (model.seen, ours.seen) == (0, 1)


class Counting:
    def __init__(self):
        self.n = 0

    def hook(self, *_):
        self.n += 1


SEEN, NUMBER, SUM, COUNTING = [], 0, torch.zeros(()), Counting()
RANDOM = torch.Generator().manual_seed(0)


def _add(output):
    SEEN.append(output)


def through_a_function(module, inputs, output):
    _add(output)


def by_a_number(module, inputs, output):
    global NUMBER
    NUMBER += 1


def by_a_tensor(module, inputs, output):
    SUM.add_(1)


def by_an_object(module, inputs, output):
    COUNTING.n += 1


def drawing(module, inputs, output):
    return output + 0 * torch.rand(output.shape, generator=RANDOM)


def by_a_default(module, inputs, output, seen=SEEN):
    seen.append(output)


def closures():
    calls, n, places, generator = [], 0, itertools.count(), torch.Generator().manual_seed(0)

    def by_a_number(module, inputs, output):
        nonlocal n
        n += 1

    def drawing(module, inputs, output):
        return output + 0 * torch.rand(output.shape, generator=generator)

    hooks = {
        "list": lambda m, i, output: calls.append(output),
        "nonlocal": by_a_number,
        "iterator": lambda m, i, output: calls.append(next(places)),
        "generator": drawing,
        "partial": functools.partial(lambda held, *_: held.append(1), []),
    }
    return hooks, lambda: (len(calls), n, repr(places), generator.get_state().tolist())


CLOSURES, in_closures = closures()
WRITING = {
    **CLOSURES,
    "method": COUNTING.hook,
    "global list": through_a_function,
    "global number": by_a_number,
    "global tensor": by_a_tensor,
    "global object": by_an_object,
    "global generator": drawing,
    "default": by_a_default,
}
with_batches = pytest.mark.parametrize("verb", [*VERBS, "insert of trained ones"])


@with_batches
@pytest.mark.parametrize("kind", WRITING)
def test_what_hooks_write_to_stays_as_it_was(verb, kind):
    """The copies that run while a verb looks have their own; what it returns writes where the original does,
    unless torch's ``copy.deepcopy`` gives it its own."""

    def written():
        return in_closures(), len(SEEN), NUMBER, SUM.item(), RANDOM.get_state().tolist()

    model = Block().eval()
    model.relu.register_forward_hook(WRITING[kind])
    before, counted = written(), COUNTING.n
    verbs = {**VERBS, "insert of trained ones": lambda model: bn.insert(model, X, batches=[X, X])}
    done = verbs[verb](model)
    assert (written(), COUNTING.n) == (before, counted)
    with torch.set_grad_enabled(kind != "partial"):  # torch copies no tensor that gradients go through
        done(X)
    assert kind in ("method", "partial") or written() != before or COUNTING.n != counted


def test_a_function_that_reads_the_model_as_a_global_variable():
    model = Block()
    program = "path = lambda x: model.bn(model.conv(x))"
    names = {"model": model}
    exec(program, names)
    model.path = names["path"]
    with pytest.raises(
        ValueError, match=r"cannot be copied: path is a function that reads the global variable 'model'"
    ):
        bn.from_torch(model)


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(Block())
    model[0].lock = threading.Lock()
    with pytest.raises(ValueError, match=r"cannot be copied: 0.lock cannot \(.*lock.*\). Take it out first"):
        bn.from_torch(model)


class Noticing(Block):
    """Counts, keeps and draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.calls, self.kept, self.generator = 0, {"shapes": []}, torch.Generator().manual_seed(0)
        self.threshold = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.kept["shapes"].append(tuple(x.shape))
        self.threshold.data += 1
        return super().forward(x) + torch.rand(1, generator=self.generator)


@every_verb
def test_neither_the_model_nor_the_result_notices_that_it_ran(verb):
    model = Noticing().eval()
    state = model.generator.get_state()
    done = VERBS[verb](model)
    for each in (model, done):
        assert (each.calls, each.kept, each.threshold.item()) == (0, {"shapes": []}, 0)
        assert torch.equal(each.generator.get_state(), state)


def test_full_backward_hooks_stay():
    model, seen = nn.Sequential(Block(), nn.Conv2d(4, 4, 1)), []
    model[0].register_full_backward_hook(lambda *_: seen.append("block"))
    model[0].conv.register_full_backward_hook(lambda *_: seen.append("conv"))
    fused = bn.from_torch(model, example=X)
    assert fused.batchnorm_report.of("fused") == ["0.bn"]
    seen.clear()
    fused(X.clone().requires_grad_()).sum().backward()
    assert sorted(seen) == ["block", "conv"]


# ---- reasons ---------------------------------------------------------------------------------------------------------


def why_of(model, layer):
    return next(row.why for row in model.batchnorm_report if row.layer == layer)


def test_a_replaced_forward_is_the_reason_without_an_example_too():
    model = nn.Sequential(nn.BatchNorm2d(4))
    as_partial(model[0])
    assert why_of(bn.from_torch(model), "0").startswith("its forward was replaced on the object: take that away first")


@pytest.mark.parametrize("computed", [True, False], ids=["with gradients", "without"])
def test_pruned_layers_are_named_with_what_to_do(computed):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    for layer in (model[0], model[3]):
        prune.l1_unstructured(layer, "weight", 0.3)
    with torch.set_grad_enabled(computed):
        expected = model(X)
    advice = "is pruned: torch.nn.utils.prune.remove(layer, 'weight') first"
    folded = bn.fold(model, X)
    assert why_of(folded, "1").startswith(f"the weight of 0 before it {advice}")
    assert why_of(bn.insert(model, X), "3") == f"its weight {advice}"
    torch.testing.assert_close(folded(X), expected)
    torch.testing.assert_close(bn.from_torch(model, example=X)(X), expected)
    for layer in (model[0], model[3]):
        prune.remove(layer, "weight")
    assert bn.fold(model, X).batchnorm_report.of("folded") == ["1"]


@pytest.mark.parametrize("name", ["0", "1"])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_keep_a_layer_from_folding(name, register):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    getattr(model[int(name)], register)(lambda *_: None)
    assert "it has hooks, which would see something else" in why_of(bn.fold(model, X), "1")


def test_what_hooks_of_a_layer_and_of_its_weight_see_after_insert():
    model, seen = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), []
    model[0].register_forward_hook(lambda *_: seen.append("output"))
    model[0].weight.register_hook(lambda gradient: seen.append("gradient"))
    inserted = bn.insert(model, X)
    assert why_of(inserted, "0") == "before 1; its hooks now see the normalized output"
    seen.clear()
    inserted(X).sum().backward()
    assert seen == ["output", "gradient"]


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_batch_normalization_in_a_container_that_torch_does_not_see(kind):
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, norm = nn.Conv2d(4, 4, 1), nn.Sequential(nn.BatchNorm2d(4))
            self.norms = {0: norm} if kind is dict else kind([norm])

        def forward(self, x):
            return self.norms[0](self.conv(x))

    model = Hiding().eval()
    for container in self_and_list(model):
        place = "norms[0]" if container is model else "0.norms[0]"
        why = f"it is in a {kind.__name__}, in which torch sees no modules: use nn.Module"
        assert why_of(bn.from_torch(container), place).startswith(why)
        assert why_of(bn.from_torch(container, example=X), place).startswith(why)
    with pytest.raises(ValueError, match=rf"does not run in float64, .* norms\[0\]: {why}"):
        bn.fold(model, X)


def self_and_list(model):
    return model, nn.Sequential(model)

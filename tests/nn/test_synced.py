"""Synchronized statistics in real processes over gloo: equal to one process, whatever the ranks have."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import arrange
from processes import on_ranks, outcomes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

KINDS = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}
SHAPES = ((12, 3), (12, 3, 7), (12, 4, 6, 3), (12, 2, 3, 2, 5))
SPLITS = {1: [(12,)], 2: [(6, 6), (11, 1), (12, 0)], 3: [(4, 4, 4), (5, 0, 7)], 4: [(3, 3, 3, 3), (0, 9, 2, 1)]}
CASES = [  # shape, layout, activation, with residual, masked
    (shape, layout, activation, residual, masked)
    for shape in SHAPES
    for layout in ("contiguous", "channels_last")
    for activation, residual in ((None, False), ("relu", True), ("silu", True))
    for masked in (False, True)
]


def tensors(case):
    """x, residual, mask, dy of the whole batch, the same on every rank."""
    shape, layout, _, with_residual, masked = case
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    mask = torch.rand(shape[:1] + shape[2:], generator=generator) > 0.4
    return arrange(x * 3 + 5, layout), residual if with_residual else None, mask if masked else None, dy


def layer_of(case, **options):
    layer = KINDS[len(case[0])](case[0][1], dtype=torch.float64, activation=case[2], **options)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, case[0][1]))
        layer.bias.copy_(torch.linspace(-1, 1, case[0][1]))
    return layer


def step(layer, x, residual, mask, dy):
    """y, dx, dresidual, dweight, dbias and the state after one step."""
    x, residual = x.detach().requires_grad_(), None if residual is None else residual.detach().requires_grad_()
    y = layer(x, residual, mask)
    y.backward(dy)
    gradients = {"x": x.grad, "residual": None if residual is None else residual.grad}
    return {"y": y.detach(), **gradients, "weight": layer.weight.grad, "bias": layer.bias.grad}, layer.state_dict()


def every_case(rank, world):
    done = {}
    for case in CASES:
        for sizes in SPLITS[world]:
            mine = [None if t is None else t.split(sizes)[rank] for t in tensors(case)]
            done[case, sizes] = step(layer_of(case, statistics=bn.Synced()), *mine)
    return done


@pytest.mark.parametrize("world", SPLITS)
def test_ranks_together_are_one_process(world):  # pains 4, 10 and 17
    ranks = on_ranks(world, every_case)
    for case, sizes in ranks[0]:
        expected, state = step(layer_of(case), *tensors(case))
        each = [rank[case, sizes][0] for rank in ranks]
        for name in ("y", "x", "residual"):
            if expected[name] is not None:
                found = torch.cat([found[name] for found in each])
                torch.testing.assert_close(found, expected[name], rtol=1e-11, atol=1e-12, msg=f"{case} {sizes} {name}")
        for name in ("weight", "bias"):
            found = sum(found[name] for found in each)
            torch.testing.assert_close(found, expected[name], rtol=1e-11, atol=1e-12, msg=f"{case} {sizes} {name}")
        for rank in ranks:
            torch.testing.assert_close(rank[case, sizes][1], state, rtol=1e-12, atol=1e-13)
            same = ranks[0][case, sizes][1]
            assert all(torch.equal(t, same[name]) for name, t in rank[case, sizes][1].items())  # bit for bit


def some_ranks_and_no_eval(rank, world):
    """In eval nothing is sent, and with a group nothing goes beyond it."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    layer = bn.BatchNorm1d(3, statistics=bn.Synced(pairs[rank // 2]))
    found = copy.deepcopy(layer)(x)  # a group is not copied
    count = []
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for name in (gather, "all_reduce"):
        real = getattr(dist, name)
        setattr(
            dist,
            name,
            lambda *a, real=real, name=name, **k: (
                count.append((name, a[-1].numel() if name == "all_reduce" else a[1].numel())),
                real(*a, **k),
            )[1],
        )
    layer.eval()(x)
    in_eval = list(count)
    layer.train()
    bn.freeze(layer)
    layer(x)
    in_eval += count
    bn.unfreeze(layer)
    layer(x.requires_grad_()).sum().backward()
    return found, in_eval, count


def test_collectives_of_a_group_and_none_in_eval():
    ranks = on_ranks(4, some_ranks_and_no_eval)
    x = [torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    for pair in (0, 2):
        expected = bn.BatchNorm1d(3)(torch.cat(x[pair : pair + 2]))
        torch.testing.assert_close(torch.cat([ranks[pair][0], ranks[pair + 1][0]]), expected)
    for _, in_eval, count in ranks:
        assert in_eval == []
        assert [(name[:8], size) for name, size in count] == [
            ("all_gath", 7),
            ("all_redu", 6),
        ]  # 2 C + 1 numbers, 2 C numbers


def few_values(rank, world):
    layer = bn.BatchNorm1d(3, statistics=bn.Synced())
    one_each = layer(torch.full((1, 3), float(rank)))
    layer.reset_running_stats()
    alone = layer(torch.full((1 if rank == 0 else 0, 3), 5.0))  # one value on all ranks together
    return one_each, alone, layer.running_mean, layer.running_var, layer.num_batches_tracked


def test_one_value_for_each_rank_is_enough():
    ranks = on_ranks(2, few_values)
    torch.testing.assert_close(
        torch.cat([r[0] for r in ranks]), torch.tensor([[-1.0] * 3, [1.0] * 3]), rtol=0, atol=1e-4
    )
    for _, alone, mean, var, batches in ranks:
        assert not alone.any()
        assert (mean == 0.5).all()
        assert (var == 1).all()
        assert batches == 1


# ---- whole networks --------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10),
    ).double()  # fmt: skip


def real_images():
    from batchnorm.racing.data import load_images

    images = load_images()
    return images.train_images[:480, None].double() / 255, images.train_labels[:480].long()


def train(model, x, y, sizes, rank, scale):
    """20 steps; each rank's loss is its sum over the whole batch's size, times what DDP will divide by."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for i in range(20):
        mine = slice(24 * i + sum(sizes[:rank]), 24 * i + sum(sizes[: rank + 1]))
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine], reduction="sum") / 24 * scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def in_ddp(rank, world, sizes, data):
    model = DistributedDataParallel(bn.convert_sync_batchnorm(network()))
    return train(model, *data, sizes, rank, world).module.state_dict()


@pytest.mark.parametrize("sizes", [(12, 12), (17, 7), (8, 8, 8)], ids=str)
def test_twenty_steps_in_ddp_end_with_one_processs_weights(sizes):
    data = real_images()
    expected = train(network(), *data, (24,), 0, 1).state_dict()
    for state in on_ranks(len(sizes), in_ddp, sizes, data):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


def in_fsdp(rank, world, data):
    from torch.distributed.fsdp import fully_shard

    model = bn.convert_sync_batchnorm(network())
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for part in (model[4], model[7], model):
        fully_shard(part, mesh=mesh)
    train(model, *data, (12, 12), rank, world)
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}


def test_twenty_steps_in_fsdp2_end_with_one_processs_weights():
    data = real_images()
    expected = train(network(), *data, (24,), 0, 1).state_dict()
    for state in on_ranks(2, in_fsdp, data):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)


def checkpointed(rank, world, use_reentrant):
    layer = bn.BatchNorm1d(3, dtype=torch.float64, statistics=bn.Synced())
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).pow(3).sum().backward()
    return x.grad, layer.state_dict()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant):
    ranks = on_ranks(2, checkpointed, use_reentrant)
    x = [torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    whole, layer = torch.cat(x).requires_grad_(), bn.BatchNorm1d(3, dtype=torch.float64)
    layer(whole).pow(3).sum().backward()
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), whole.grad)
    for _, state in ranks:
        torch.testing.assert_close(state, layer.state_dict())


def compiled_and_twice(rank, world):
    layer = bn.BatchNorm1d(3, statistics=bn.Synced())
    eager = copy.deepcopy(layer)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    y = torch.compile(layer, backend="aot_eager")(x)
    try:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(eager(leaf).square().sum(), leaf, create_graph=True)
        twice = ""
    except RuntimeError as error:
        twice = str(error)
    return torch.equal(y, copy.deepcopy(layer).train()(x)), twice


def test_compile_breaks_the_graph_and_second_derivatives_are_refused():
    for same, twice in on_ranks(2, compiled_and_twice):
        assert same
        assert "second derivatives through synchronized statistics are not supported" in twice


NODE = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{tests!r}, {here!r}]
import test_synced
dist.init_process_group("gloo")
rank, data = dist.get_rank(), torch.load({folder!r} + "/data.pt")
state = test_synced.in_ddp(rank, dist.get_world_size(), {sizes}, data)
torch.save(state, f"{folder}/{{rank}}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("sizes", [(15, 9), pytest.param((5, 7, 8, 4), marks=pytest.mark.slow)], ids=str)
def test_two_torchrun_nodes_that_meet_over_loopback(tmp_path, sizes):
    data = real_images()
    torch.save(data, tmp_path / "data.pt")
    here = Path(__file__).parent
    script = tmp_path / "train.py"
    script.write_text(NODE.format(tests=str(here.parent), here=str(here), folder=str(tmp_path), sizes=sizes))
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={len(sizes) // 2}",
             f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}", str(script)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    output = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(output)
    expected = train(network(), *data, (24,), 0, 1).state_dict()
    for rank in range(len(sizes)):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-5, atol=1e-5)


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- ranks that are gone ---------------------------------------------------------------------------------------------


def one_is_missing(rank, world, how, stage):
    model = bn.convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4))))
    model(torch.randn(4, 3))  # all are there at first
    x = torch.randn(4, 3)
    y = model(x) if stage == "backward" else None
    started = time.monotonic()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LIMIT + 1)
        os._exit(0)
    try:
        model(x) if y is None else y.sum().backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - started
    return "", time.monotonic() - started


LIMIT = 6.0  # seconds


@pytest.mark.parametrize(
    ("world", "how", "stage", "backend"),
    [
        (2, "killed", "backward", "gloo"),
        pytest.param(4, "killed", "forward", "gloo", marks=pytest.mark.slow),
        (2, "never arrives", "forward", None),
        pytest.param(4, "never arrives", "backward", "cpu:gloo", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_is_named_within_the_time_limit(world, how, stage, backend):
    ranks = outcomes(world, one_is_missing, how, stage, seconds=LIMIT, backend=backend)
    assert ranks[1] is None
    for rank, outcome in enumerate(ranks):
        if rank == 1:
            continue
        assert outcome is not None
        error, seconds = outcome[1]
        assert f"synchronized statistics of 1.0, {stage} on rank {rank}, failed" in error, error
        assert "rank 1 did not answer: killed, stuck, or never in this layer" in error, error
        assert seconds < LIMIT + 0.5


def one_is_late(rank, world, seconds):
    group = dist.new_group([1, 2])  # whose ranks have other numbers in it
    layer = bn.BatchNorm1d(3, statistics=bn.Synced(group if rank else None))
    if rank == 0:
        return None
    for late in seconds:
        if rank == 2:
            time.sleep(late)
        y = layer(torch.full((2, 3), float(rank)))
    try:
        if rank == 1:
            layer(y)
    except RuntimeError as error:
        return y, str(error)
    time.sleep(LIMIT + 1)
    return y, ""


def test_a_rank_that_is_late_is_waited_for_and_one_of_a_group_is_named_as_torchrun_does():
    # The second one is so late that rank 1 asks who is there; it comes while that goes on.
    _, one, two = on_ranks(3, one_is_late, (1.0, LIMIT - 1.5, 0.0), seconds=LIMIT)
    assert (one[0] + two[0]).abs().max() < 1e-3
    assert "on rank 1, failed" in one[1]
    assert "rank 2 did not answer" in one[1]


def of_functions(rank, world):
    x, errors = torch.randn(4, 3), []
    layer = bn.BatchNorm1d(3, statistics=bn.Synced(), track_running_stats=False)
    for transform in (torch.func.grad(lambda x: layer(x).sum()), lambda x: torch.func.jvp(layer, (x,), (x,))):
        try:
            transform(x)
        except RuntimeError as error:
            errors.append(str(error))
    again = pickle.loads(pickle.dumps(layer))
    return errors, again.statistics == layer.statistics


def test_functorch_is_refused():
    (errors, same), _ = on_ranks(2, of_functions)
    assert same
    assert len(errors) == 2
    assert all("synchronized statistics have no derivatives under torch.func" in error for error in errors)


def not_in_the_group(rank, world):
    group = dist.new_group([0])
    try:
        bn.BatchNorm1d(3, statistics=bn.Synced(group))(torch.randn(4, 3))
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_outside_the_group_is_told():
    inside, outside = on_ranks(2, not_in_the_group)
    assert inside == ""
    assert "need a process group that this rank is in" in outside


def test_without_a_process_group():
    layer = bn.BatchNorm1d(3, statistics=bn.Synced())
    with pytest.raises(
        ValueError, match=r"Default process group has not been initialized.*init_process_group\(\) before"
    ):
        layer(torch.randn(4, 3))
    layer.eval()(torch.randn(4, 3))
    assert repr(layer).endswith(", statistics=Synced())")

"""Runs a function in several processes that form a gloo group, and gives what each returned."""

import io
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank, world, folder, seconds, backend, function, arguments):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    try:
        result = ("result", function(rank, world, *arguments))
    except Exception as error:
        result = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    stream = io.BytesIO()
    torch.save(result, stream)
    Path(folder, f"{rank}.part").write_bytes(stream.getvalue())
    Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.pt"))
    if result[0] == "result":
        dist.barrier()  # nobody leaves while others still talk
        dist.destroy_process_group()


def outcomes(world, function, *arguments, seconds=60.0, backend="gloo"):
    """("result", value) or ("error", text) of each rank; None of one that did not live to tell."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")  # imports once, before the fork
        context.set_forkserver_preload(["batchnorm", "pytest", "torch._dynamo", "torch.distributed.fsdp"])
        processes = [
            context.Process(target=_enter, args=(rank, world, folder, seconds, backend, function, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
        files = [Path(folder, f"{rank}.pt") for rank in range(world)]
        return [torch.load(f, weights_only=False) if f.exists() else None for f in files]


def on_ranks(world, function, *arguments, seconds=60.0):
    """What each rank returned; fails if one raised."""
    found = outcomes(world, function, *arguments, seconds=seconds)
    wrong = [f"rank {rank}: {o and o[1]}" for rank, o in enumerate(found) if o is None or o[0] == "error"]
    assert not wrong, "\n".join(wrong)
    return [outcome[1] for outcome in found]

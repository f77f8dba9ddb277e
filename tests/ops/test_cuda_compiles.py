"""The Triton kernels through the compiler for real GPUs, where there is none: what the interpreter would let pass."""

import os
import re

import pytest
import torch
from helpers import channel_tensors

pytest.importorskip("triton")

from batchnorm.ops import cuda
from batchnorm.ops.activations import NAMES
from batchnorm.ops.arguments import Affine, Running

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the compiler is not used with TRITON_INTERPRET=1"
)


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def compiled(request, monkeypatch):
    """Kernels are compiled for such a GPU and not launched: their names, with the assembler code."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", request.param, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    run, found = JITFunction.run, []

    def compile_only(self, *args, **options):
        kernel = run(self, *args, **{**options, "warmup": True})
        found.append((self.fn.__name__, kernel.asm["ptx"]))

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(cuda, "_processors", lambda device: 132)
    return found


def call(x, activation, residual):
    """Every op once on x: which kernels run depends on its sizes."""
    channels = [t.detach() for t in channel_tensors(x.shape[1], torch.float32)]
    mean, var, weight, bias = channels
    r = torch.empty_like(x) if residual else None
    affine = Affine(weight, bias, r, 1e-5, activation, 0.01, 0.5)
    cuda.train(x, *affine, *Running(mean, var, torch.tensor(0), torch.zeros(x.shape[1]).long()))
    cuda.backward(torch.empty_like(x), x, mean.double(), var.double(), *affine, True)


def widths(code, access):
    """Bits that each load or store of global memory moves at once."""
    found = re.findall(rf"{access}\.global\S*?(?:\.v(\d))?\.b(\d+)", code)
    return [int(times or 1) * int(bits) for times, bits in found]


SPLIT, WHOLE = (64, 64, 56, 56), (8, 2048, 7, 7)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [(SPLIT, torch.contiguous_format), (SPLIT, torch.channels_last), ((1, 64, 128, 128), torch.contiguous_format)],
    ids=str,
)
def test_large_tensors_are_read_and_written_16_bytes_at_a_time(compiled, shape, layout):
    call(torch.empty(shape, dtype=torch.bfloat16, memory_format=layout), 1, True)
    kernels = dict(compiled)
    accesses = {
        "sum_x": ("ld", 1),
        "write_y": ("ld st", 2),
        "sum_dz": ("ld", 3),
        "write_dx": ("ld st", 3),
        "forward": ("ld st", 2),
    }
    assert set(kernels) in ({"sum_x", "merge_x", "write_y", "sum_dz", "merge_dz", "write_dx"}, {"forward", "backward"})
    for name, code in kernels.items():
        if name in accesses:
            kinds, tensors = accesses[name]
            for kind in kinds.split():
                wide = [width for width in widths(code, kind) if width == 128]
                assert len(wide) * 8 * 256 >= cuda.TILE * (tensors if kind == "ld" else 1), (name, kind)


def test_one_program_does_all_of_a_short_channel(compiled):
    call(torch.empty(WHOLE, dtype=torch.bfloat16), 4, True)
    assert [name for name, _ in compiled] == ["forward", "backward"]


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2))])
@pytest.mark.parametrize("activation", range(len(NAMES)), ids=NAMES)
def test_every_activation_and_dtype(compiled, activation, turn):
    """Activations take turns with dtypes; in three turns each has had all."""
    dtype = cuda.DTYPES[(activation + turn) % 3]
    call(torch.empty((4, 5, 3, 3), dtype=dtype), activation, residual=False)
    call(torch.empty((4000, 12), dtype=dtype), activation, residual=True)
    assert all(code for _, code in compiled)


def test_split_ops_and_average_statistics(compiled):
    x, mean, var = torch.empty(SPLIT), torch.zeros(64), torch.ones(64)
    cuda.statistics(x)
    cuda.update_running_(mean, var, torch.tensor(0), None, None, mean.double(), var.double(), 9)
    cuda.train(x, *Affine(), *Running(mean, var, torch.tensor(0), torch.zeros(64).long(), None))
    cuda.gradient_sums(x, x, mean, var, *Affine(activation=1))
    cuda.input_gradient(x, x, mean, var, *Affine(activation=1), mean, var)
    assert {"sum_x", "merge_x", "update_running", "sum_dz", "merge_dz", "write_dx"} <= {name for name, _ in compiled}


@pytest.mark.parametrize(
    "shape", [(1 << 31, 2), ((1 << 31) - 1, 2), (1, 1, 3_000_000_000), (3, 2, 800_000_000)], ids=str
)
def test_sizes_beyond_32_bits(compiled, shape):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    channels = [torch.empty(shape[1], device="meta") for _ in range(4)]
    cuda.train(x, *Affine(*channels[:2], activation=1), *Running(*channels[2:]))
    cuda.backward(x, x, *channels[:2], *Affine(*channels[2:], activation=1), True)
    assert [name for name, _ in compiled] == ["sum_x", "merge_x", "write_y", "sum_dz", "merge_dz", "write_dx"]
    assert cuda.cut(x).big == (max(shape) > 1 << 30)


def test_a_smaller_last_batch_compiles_nothing_again(compiled):
    for size in (64, 61, 17):
        call(torch.empty((size, 64, 56, 56), dtype=torch.bfloat16), 1, False)
    assert len({code for _, code in compiled}) == 6

"""The Triton kernels through the compiler for real GPUs, where there is none: what the interpreter would let pass."""

import re

import pytest
import torch
from helpers import channel_tensors

pytest.importorskip("triton")

from batchnorm.ops import cuda

pytestmark = pytest.mark.skipif(cuda.INTERPRETED, reason="the compiler is not used with TRITON_INTERPRET=1")


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
    cuda.train(x, weight, bias, r, mean, var, torch.tensor(0), 0.1, 1e-5, activation, 0.01)
    given = (torch.empty_like(x), x, mean.double(), var.double(), weight, bias, r, 1e-5, activation, 0.01)
    cuda.backward(*given, True)


def widths(code, access):
    """Bits that each load or store of global memory moves at once."""
    found = re.findall(rf"{access}\.global\S*?(?:\.v(\d))?\.b(\d+)", code)
    return [int(times or 1) * int(bits) for times, bits in found]


SPLIT, WHOLE = (64, 64, 56, 56), (8, 2048, 7, 7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_large_tensors_are_read_and_written_16_bytes_at_a_time(compiled, layout):
    call(torch.empty(SPLIT, dtype=torch.bfloat16, memory_format=layout), 1, True)
    kernels = dict(compiled)
    assert list(kernels) == ["sum_x", "merge_x", "write_y", "sum_dz", "merge_dz", "write_dx"]
    for name in ("sum_x", "write_y", "sum_dz", "write_dx"):
        assert max(widths(kernels[name], "ld")) == 128, name
        if "write" in name:
            assert max(widths(kernels[name], "st")) == 128, name


def test_one_program_does_all_of_a_short_channel(compiled):
    call(torch.empty(WHOLE, dtype=torch.bfloat16), 4, True)
    assert [name for name, _ in compiled] == ["forward", "backward"]


@pytest.mark.parametrize("activation", range(8))
def test_every_activation_and_dtype(compiled, activation):
    for dtype in cuda.DTYPES:
        call(torch.empty((4, 5, 3, 3), dtype=dtype), activation, residual=False)
        call(torch.empty((4000, 12), dtype=dtype), activation, residual=True)
    assert all(code for _, code in compiled)


def test_split_ops_and_average_statistics(compiled):
    x, mean, var = torch.empty(SPLIT), torch.zeros(64), torch.ones(64)
    cuda.statistics(x)
    cuda.update_running_(mean, var, torch.tensor(0), mean.double(), var.double(), 9, None)
    cuda.train(x, None, None, None, mean, var, torch.tensor(0), None, 1e-5, 0, 0.0)
    cuda.gradient_sums(x, x, mean, var, None, None, None, 1e-5, 1, 0.0)
    cuda.input_gradient(x, x, mean, var, None, None, None, mean, var, 1e-5, 1, 0.0)
    assert {"sum_x", "merge_x", "update_running", "sum_dz", "merge_dz", "write_dx"} <= {name for name, _ in compiled}


def test_another_batch_size_compiles_nothing_again(compiled):
    for size in (64, 61, 17):
        call(torch.empty((size, 64, 56, 56), dtype=torch.bfloat16), 1, False)
    assert len({code for _, code in compiled}) == 6

"""The clock: on CUDA, between events, with a GPU whose calls take a known time."""

import pytest
import torch

from batchnorm.bench import clock


class Gpu:
    """A device on which each call takes 20 microseconds of its own time."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self):
        self.now, self.calls = self.now + 20e-6, self.calls + 1


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now

    def elapsed_time(self, last):
        return 1e3 * (last.at - self.at)


@pytest.mark.parametrize("turn", [0, 1e-3, 0.02])
def test_seconds_on_cuda_are_those_between_events(monkeypatch, turn):
    gpu = Gpu(monkeypatch)
    assert clock.seconds_of(gpu.call, "cuda", turn) == pytest.approx(20e-6)
    assert turn / 40e-6 <= gpu.calls <= 5 * turn / 20e-6 + 1


def test_seconds_on_the_cpu(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 1e-3

    assert clock.seconds_of(call, "cpu", 0.01) == pytest.approx(1e-3)
    assert now[0] == pytest.approx(0.01, abs=2e-3)


def test_tensors_come_back_when_the_caches_of_a_gpu_are_full_of_others(monkeypatch):
    monkeypatch.setattr(clock, "COLD", 1000)

    def make():
        return [torch.zeros(2, 25, requires_grad=True), torch.zeros(25)]  # 300 bytes

    turns = clock.rotating(make, "cuda")
    seen = [next(turns) for _ in range(5)]
    assert len({id(tensors[0]) for tensors in seen}) == 4
    assert seen[4][0] is seen[0][0]
    assert all(tensors[0].requires_grad and tensors[0].is_leaf for tensors in seen)
    same = clock.rotating(make, "cpu")
    assert next(same) is next(same)

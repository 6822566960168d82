"""The counting of `engine_memory.py` is right: torch's own tracker and the events of the allocator in a step with real
tensors say the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SECONDS = 300
TRACKERS = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from tests.planning.engine_memory import live_storages

def step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(torch.ones(64, 256)).square().sum().backward()
    optimizer.step()

def model():
    return torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(6)))

with FakeTensorMode():
    tracker, built = MemTracker(), model()
    tracker.track_external(built)
    with tracker:
        step(built)
    total = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
with FakeTensorMode(), live_storages() as memory:
    step(model())
print(total, memory.peak)
"""
ALLOCATOR = """
import torch
from torch.profiler import ProfilerActivity, profile
from tests.planning.engine_memory import live_storages

def training():
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(2):
        model(torch.ones(128, 512)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

training()
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
    training()
events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
level = top = 0
for event in sorted(events, key=lambda event: event.start_ns()):
    level += event.nbytes()
    top = max(top, level)
with live_storages() as memory:
    training()
print(top, memory.peak)
"""


def figures(program: str) -> tuple[int, int]:
    """Run ``program`` and return the two numbers that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    first, second = done.stdout.split()[-2:]
    return int(first), int(second)


@pytest.mark.timeout(SECONDS)
def test_the_count_is_that_of_torchs_tracker() -> None:
    tracked, counted = figures(TRACKERS)
    assert counted == pytest.approx(tracked, rel=0.01)


@pytest.mark.timeout(SECONDS)
def test_the_count_is_that_of_the_allocator_with_real_tensors() -> None:
    allocated, counted = figures(ALLOCATOR)
    assert counted == pytest.approx(allocated, rel=0.01)

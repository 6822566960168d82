"""Measures the memory that a function takes, from the events of torch's allocator on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def memory_of(step: Callable[[], object]) -> tuple[int, int]:
    """Call ``step``, and return by how many bytes the memory of torch's tensors has grown, and by how many bytes it had
    grown at most in between."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    grown = most = 0
    results: Any = profiled.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda event: event.start_ns()):
        grown += event.nbytes()
        most = max(most, grown)
    return grown, most

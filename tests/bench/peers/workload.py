"""The input and the result of a contender. `__main__.py` passes a `Workload` as a JSON file, and each contender writes
a `Measured` as a JSON file."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

from pydantic import BaseModel

LORA_RANK, LORA_ALPHA = 8, 16
TEMPLATE = "Question: {prompt}\nAnswer: "


class Workload(BaseModel):
    """One LoRA run of `updates` optimizer steps, which trains on `batch` rows per step in the order of the file."""

    model: Path
    """Folder of the base model."""
    rows: Path
    """JSON Lines file with the fields `question` and `answer`: first the rows of update 1, then those of update 2, and
    so on."""
    batch: int
    micro_batch: int
    updates: int
    learning_rate: float
    max_length: int
    threads: int
    seed: int

    def read_rows(self) -> list[dict[str, str]]:
        """Return the rows in the order of training."""
        return [json.loads(line) for line in self.rows.read_text().splitlines()]


class Measured(BaseModel):
    """The figures of one contender. Times and tokens leave out the first update, because memory is allocated in it."""

    supervised_tokens: int
    """Number of tokens that carry a loss."""
    real_tokens: int
    """Number of tokens without padding."""
    cpu_seconds: float
    """CPU seconds of the process, summed over all threads."""
    wall_seconds: float
    peak_bytes: int
    """Largest resident memory of the process, in bytes."""
    losses: list[float]
    """Training loss of every update, including the first one."""


class Clock:
    """Records CPU time and wall time at the end of each update."""

    def __init__(self) -> None:
        """Start without recorded times."""
        self._marks: list[tuple[float, float]] = []

    def update_ended(self) -> None:
        """Record the current CPU time and wall time."""
        self._marks.append((time.process_time(), time.perf_counter()))

    def measured(self, tokens: list[tuple[int, int]], losses: list[float]) -> Measured:
        """Return the figures of the run. ``tokens`` holds a pair (supervised tokens, tokens without padding) for each
        update, including the first one."""
        (cpu_from, wall_from), (cpu_to, wall_to) = self._marks[0], self._marks[-1]
        return Measured(
            supervised_tokens=sum(supervised for supervised, _ in tokens[1:]),
            real_tokens=sum(real for _, real in tokens[1:]),
            cpu_seconds=cpu_to - cpu_from,
            wall_seconds=wall_to - wall_from,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            losses=losses,
        )

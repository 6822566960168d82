"""What a contender (one of the compared programs) gets and what it returns. `__main__.py` passes a `Workload` to the
contender as a JSON file, and the contender writes a `Measured` as a JSON file."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

from pydantic import BaseModel

LORA_RANK, LORA_ALPHA = 8, 16
TEMPLATE = "Question: {prompt}\nAnswer: "


class Workload(BaseModel):
    """A LoRA run of `updates` optimizer steps with `batch` rows in each step."""

    model: Path
    """Folder of the base model."""
    rows: Path
    """JSON Lines file with the fields `question` and `answer`. The file for our trainer has the rows in any order,
    because our trainer orders them itself. The file for the other contenders has the rows in the order in which our
    trainer takes them."""
    batch: int
    micro_batch: int
    updates: int
    learning_rate: float
    max_length: int
    threads: int
    seed: int

    def read_rows(self) -> list[dict[str, str]]:
        """Read the file `rows` and return its rows in the order of the file."""
        return [json.loads(line) for line in self.rows.read_text().splitlines()]


class Measured(BaseModel):
    """The figures of one compared program. Times and token counts leave out the first update, because most memory is
    allocated in it."""

    supervised_tokens: int
    """Number of tokens that carry a loss."""
    real_tokens: int
    """Number of tokens of the rows, without padding."""
    cpu_seconds: float
    """CPU seconds of the process, summed over all threads."""
    wall_seconds: float
    peak_bytes: int
    """Highest resident memory that the process ever had, in bytes."""
    losses: list[float]
    """Training loss of every update, including the first one."""

    @property
    def speed(self) -> float:
        """Supervised tokens per CPU second."""
        return self.supervised_tokens / self.cpu_seconds


def in_one_epoch(sequences: int, updates: int) -> tuple[int, int]:
    """Return how many sequences an update computes, and how many updates compute each of ``sequences`` packed sequences
    once. There are at most ``updates`` updates, and the last one may have fewer sequences than the others."""
    each = -(-sequences // updates)
    return each, -(-sequences // each)


class Clock:
    """Records the CPU time and the wall-clock time at which each update ends."""

    def __init__(self) -> None:
        """Make a clock that has recorded nothing yet."""
        self._marks: list[tuple[float, float]] = []

    def update_ended(self) -> None:
        """Record that an update ends now."""
        self._marks.append((time.process_time(), time.perf_counter()))

    def measured(self, tokens: list[tuple[int, int]], losses: list[float]) -> Measured:
        """Return the figures of the run. ``tokens`` holds one pair for each update, including the first: the number of
        tokens that carry a loss, and the number of all tokens without padding."""
        (cpu_from, wall_from), (cpu_to, wall_to) = self._marks[0], self._marks[-1]
        return Measured(
            supervised_tokens=sum(supervised for supervised, _ in tokens[1:]),
            real_tokens=sum(real for _, real in tokens[1:]),
            cpu_seconds=cpu_to - cpu_from,
            wall_seconds=wall_to - wall_from,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            losses=losses,
        )

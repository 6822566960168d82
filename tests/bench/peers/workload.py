"""What every contender trains, as a JSON file that they are started with, and what each of them leaves behind."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

from pydantic import BaseModel

LORA_RANK, LORA_ALPHA = 8, 16
TEMPLATE = "Question: {prompt}\nAnswer: "


class Workload(BaseModel):
    """One LoRA run: `updates` optimizer steps of `batch` rows each, in the order of the file."""

    model: Path
    """Folder of the base model."""
    rows: Path
    """jsonl with `question` and `answer`: the rows of update 1, then of update 2, and so on."""
    batch: int
    micro_batch: int
    updates: int
    learning_rate: float
    max_length: int
    threads: int
    seed: int

    def read_rows(self) -> list[dict[str, str]]:
        """Return the rows in the order in which they are trained on."""
        return [json.loads(line) for line in self.rows.read_text().splitlines()]


class Measured(BaseModel):
    """What a contender took. The first update is left out: memory is allocated in it."""

    supervised_tokens: int
    """Tokens that the loss was taken on."""
    real_tokens: int
    """All tokens but padding."""
    cpu_seconds: float
    """Process CPU time over all threads."""
    wall_seconds: float
    peak_bytes: int
    """Largest resident set of the process."""
    losses: list[float]
    """Training loss of every update, the first one too."""


class Clock:
    """Marks the end of each update."""

    def __init__(self) -> None:
        """Begin with no marks."""
        self._marks: list[tuple[float, float]] = []

    def update_ended(self) -> None:
        """Take the time of process and wall."""
        self._marks.append((time.process_time(), time.perf_counter()))

    def measured(self, tokens: list[tuple[int, int]], losses: list[float]) -> Measured:
        """Return the figures; ``tokens`` are (supervised, real) of each update, the first one too."""
        (cpu_from, wall_from), (cpu_to, wall_to) = self._marks[0], self._marks[-1]
        return Measured(
            supervised_tokens=sum(supervised for supervised, _ in tokens[1:]),
            real_tokens=sum(real for _, real in tokens[1:]),
            cpu_seconds=cpu_to - cpu_from,
            wall_seconds=wall_to - wall_from,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            losses=losses,
        )

"""Records in which order a rank makes micro-batches, computes them, and reads what the device has computed.

On a GPU the CPU issues work and waits only where it reads a result. On the CPU everything is computed at once, so a
time shows nothing, but the order of the calls is the same. `faults.py` calls `recorded_calls` in a rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from finetune_trainer.data.batches import Batch
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.engine.engine import Engine
from finetune_trainer.engine.plain_engine import PlainEngine
from finetune_trainer.evaluation.scorer import Scorer
from finetune_trainer.loop import TrainingLoop
from finetune_trainer.ranks.gang import Gang

ENGINE_CALLS = ("loss", "backward", "gradient_norm", "step", "discard_gradient")
READING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
"""Operators whose result the CPU needs before it can go on. On a GPU each of them is a wait."""
NOT_READING = ("nonzero_static",)
"""Operators with such a name that are told how large their result is."""
ON_CPU = ("ranks/gang.py", "data/", "loss/linear_head.py:backward", "engine/gradient_norm.py:clipping_factor")
"""Code of the trainer that reads tensors on the CPU only."""
PACKAGES = ("finetune_trainer", "deepspeed")


class Reads(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """Writes a line for each result that the CPU reads of the device, with the place in the code."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self._write = write

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if name.startswith(READING) and name not in NOT_READING:
            place = _place()
            if not place.startswith(ON_CPU):
                self._write("read", place)
        return function(*args, **(kwargs or {}))


def _place() -> str:
    """Return file and function of the innermost frame of the trainer or of DeepSpeed, such as
    `engine/host_copy.py:read`."""
    frame = sys._getframe(2)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        package = next((name for name in PACKAGES if name in parts), None)
        if package is not None:
            inside = parts[len(parts) - parts[::-1].index(package) :]
            prefix = "deepspeed/" if package == "deepspeed" else ""
            return f"{prefix}{'/'.join(inside)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"


@contextmanager
def recorded_calls(file: Path) -> Iterator[None]:
    """Write one JSON list a line to ``file`` while the block runs: name and details of a call.

    - ["train", s]: step s begins
    - ["made", s, i]: the i-th micro-batch of step s was made; step 0 is an evaluation
    - ["loss"], ["backward"], ["gradient_norm"], ["step"], ["discard_gradient"]: this function of the engine is called
    - ["sum"]: numbers of all ranks are added up
    - ["read", p]: the code at p reads a result of the device, in a step
    - ["score"]: an evaluation begins
    """

    def write(*call: Any) -> None:
        with file.open("a") as lines:
            print(json.dumps(call), file=lines)

    def before(owner: type, name: str, call: str) -> Any:
        made = getattr(owner, name)

        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            write(call)
            return made(self, *args, **options)

        return mock.patch.object(owner, name, wrapped)

    made, train = MicroBatcher.tensors, TrainingLoop._train_step

    def tensors(self: MicroBatcher, plan: Any, *, step: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(made(self, plan, step=step), start=1):
            write("made", step, number)
            yield batch

    def train_step(self: TrainingLoop, step: int) -> Any:
        write("train", step)
        with Reads(write):
            return train(self, step)

    with ExitStack() as stack:
        for engine in (Engine, PlainEngine):
            for name in ENGINE_CALLS:
                stack.enter_context(before(engine, name, name))
        stack.enter_context(before(Gang, "sum_over_ranks", "sum"))
        stack.enter_context(before(Scorer, "perplexity", "score"))
        stack.enter_context(mock.patch.object(MicroBatcher, "tensors", tensors))
        stack.enter_context(mock.patch.object(TrainingLoop, "_train_step", train_step))
        yield


def calls_of(file: Path) -> list[list[Any]]:
    """Return what `recorded_calls` has written to ``file``."""
    return [json.loads(line) for line in file.read_text().splitlines()]

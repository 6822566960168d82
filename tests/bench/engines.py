"""Measure the CPU seconds of an optimizer step of the method Full in one process with three programs: a hand-written
loop of plain PyTorch, the trainer's plain engine, and the trainer's DeepSpeed engine with ZeRO stages 1 and 2. The
result is a table with the ratios to the plain loop, and with the goals of these ratios.

All programs train the same model in fp32 on the same micro-batches, which are made before the clock starts, and their
losses must agree. Each run of a program is a forked process of its own with one thread. The programs run in turns, and
a ratio compares two runs of one round. CPU seconds count the work of this process alone, so other work on the machine
changes them less than it changes the time on the clock. `FINETUNE_BENCH_STEPS` (default 16) is the number of steps of a
run, and `FINETUNE_BENCH_ROUNDS` (default 3) the number of rounds.

    python -m tests.bench --only engines
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM

from finetune_trainer.data.batches import collate
from finetune_trainer.data.examples import Example
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.ranks.process import prepare_environment
from tests.bench.step import write_model
from tests.trainer.engine_runs import PLAIN, EngineRun, Kind, load, make_engine
from tests.trainer.objectstore import free_port

STEPS = int(os.environ.get("FINETUNE_BENCH_STEPS", "16"))
ROUNDS = int(os.environ.get("FINETUNE_BENCH_ROUNDS", "3"))
WARM_UP = 2
"""Number of steps at the start of a run that are not counted, because memory is allocated in them."""
MICRO_BATCHES = 2
SEQUENCES = 4
"""Number of sequences of a micro-batch."""
LENGTHS = (16, 32)
"""Number of tokens of the shortest and of the longest sequence. The second half of a sequence is supervised. A step has
about as few tokens as one of `step.py`, so that the update takes a large part of it."""
RATE = 1e-3
SECONDS = 600
LOOP = "plain loop"
KINDS: Mapping[str, Kind] = {"plain engine": PLAIN, "DeepSpeed, ZeRO 1": 1, "DeepSpeed, ZeRO 2": 2}
GOALS: Mapping[str, float] = {"plain engine": 1.10, "DeepSpeed, ZeRO 1": 1.35, "DeepSpeed, ZeRO 2": 1.35}
"""The largest ratio to the plain loop that each engine may have."""

Result = TypeVar("Result")


class Run(BaseModel):
    """The figures of one run of a program."""

    seconds: list[float]
    """CPU seconds of each step, over all threads of the process."""
    losses: list[float]
    """Mean loss of the supervised tokens of each step, in nats."""

    @property
    def counted(self) -> float:
        """CPU seconds of the steps that count."""
        return sum(self.seconds[WARM_UP:])


def made_examples(vocabulary: int) -> list[list[list[Example]]]:
    """Return the examples of each micro-batch of each step, with random tokens."""
    rng = random.Random(1)

    def example() -> Example:
        length = rng.randint(*LENGTHS)
        return Example([rng.randrange(vocabulary) for _ in range(length)], [(length // 2, length)])

    return [[[example() for _ in range(SEQUENCES)] for _ in range(MICRO_BATCHES)] for _ in range(STEPS)]


def timed(step: Callable[[int], float]) -> Run:
    """Call ``step`` with the number of each step, and return what the calls took and the losses that they returned."""
    seconds, losses = [], []
    for number in range(STEPS):
        began = time.process_time()
        losses.append(step(number))
        seconds.append(time.process_time() - began)
    return Run(seconds=seconds, losses=losses)


def loop_run(folder: Path) -> Run:
    """Train with a plain loop: the model's own forward pass, cross entropy of the supervised tokens, clipping, and
    torch's fused AdamW."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    steps = [[padded(examples) for examples in step] for step in made_examples(model.config.vocab_size)]

    def step(number: int) -> float:
        count = sum(int((labels >= 0).sum()) for _, _, labels in steps[number])
        total = 0.0
        for ids, mask, labels in steps[number]:
            logits = model(input_ids=ids, attention_mask=mask).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            total += float(loss.detach())
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total / count

    return timed(step)


def padded(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, mask and labels of ``examples``, padded to the longest of them."""
    width = max(len(example.ids) for example in examples)
    ids, mask, labels = (torch.full((len(examples), width), fill) for fill in (0, 0, -100))
    for line, example in enumerate(examples):
        (first, last), length = example.spans[0], len(example.ids)
        ids[line, :length] = torch.tensor(list(example.ids))
        mask[line, :length] = 1
        labels[line, first:last] = ids[line, first:last]
    return ids, mask, labels


def engine_run(kind: Kind, folder: Path) -> Run:
    """Train with the engine ``kind`` as the trainer's loop does."""
    run = EngineRun(method="Full", parts=((kind, STEPS),), micro=SEQUENCES, rate=RATE)
    model: Any = load(run, folder)
    vocabulary = model.config.vocab_size
    engine = make_engine(run, kind, model)
    engine.train()
    steps = [
        [collate([[(example, 0)] for example in examples], pad=0, packed=False) for examples in step]
        for step in made_examples(vocabulary)
    ]

    def step(number: int) -> float:
        batches = steps[number]
        count, total = sum(batch.tokens for batch in batches), 0.0
        for place, batch in enumerate(batches, 1):
            loss = engine.loss(batch, factor=1 / count)
            total += float(loss.detach())
            engine.backward(loss * (1 / count), last=place == len(batches))
        engine.gradient_norm()
        engine.step(RATE)
        return total / count

    return timed(step)


def program(name: str, folder: Path, port: int) -> Run:
    """Run the program ``name`` on the model in ``folder`` and return its figures. ``port`` is for the process group of
    DeepSpeed."""
    torch.set_num_threads(1)
    if name == LOOP:
        return loop_run(folder)
    if KINDS[name] != PLAIN:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        Gang(device=torch.device("cpu"))
    return engine_run(KINDS[name], folder)


def in_child(work: Callable[..., Result], *arguments: object) -> Result:
    """Call ``work`` with ``arguments`` in a forked process and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(work, *arguments).result(SECONDS)


def check_same_work(rounds: Sequence[Mapping[str, Run]]) -> None:
    """End the program where the losses of a step differ by more than a thousandth between two programs."""
    for found in rounds:
        for name, run in found.items():
            for step, (own, other) in enumerate(zip(found[LOOP].losses, run.losses, strict=True), 1):
                if not abs(own - other) <= 1e-3 * abs(own):
                    sys.exit(f"error: step {step}: loss {own:.6f} with the {LOOP}, {other:.6f} with {name}")


def table_of(rounds: Sequence[Mapping[str, Run]]) -> Table:
    """Return the table of ``rounds``, each of which has one run of each program."""
    table = Table(title="one optimizer step, Full, fp32, one process, one thread (median of rounds)")
    for column in ("", "CPU ms a step", "ratio", "ratios from to", "goal"):
        table.add_column(column, justify="right" if column else "left")
    for name in rounds[0]:
        ratios = sorted(found[name].counted / found[LOOP].counted for found in rounds)
        milliseconds = statistics.median(found[name].counted for found in rounds) / (STEPS - WARM_UP) * 1000
        goal = f"at most {GOALS[name]:.2f}" if name in GOALS else ""
        table.add_row(
            name,
            f"{milliseconds:.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} {ratios[-1]:.2f}",
            goal,
        )
    return table


def run() -> None:
    """Measure all programs in turns and print the table."""
    if STEPS <= WARM_UP or ROUNDS < 1:
        sys.exit(f"error: FINETUNE_BENCH_STEPS must be more than {WARM_UP}, and FINETUNE_BENCH_ROUNDS at least 1")
    programs = (LOOP, *KINDS)
    rounds: list[dict[str, Run]] = []
    with tempfile.TemporaryDirectory() as temporary, Progress(console=Console(stderr=True), transient=True) as progress:
        folder = Path(temporary)
        prepare_environment(folder)
        os.environ.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
        import_module("deepspeed")  # once, before the processes are forked
        model = in_child(write_model, folder / "model")
        task = progress.add_task("programs in turns", total=ROUNDS * len(programs))
        for _ in range(ROUNDS):
            found: dict[str, Run] = {}
            for name in programs:
                found[name] = in_child(program, name, model, free_port())
                progress.advance(task)
            rounds.append(found)
    check_same_work(rounds)
    Console(width=120).print(table_of(rounds))


if __name__ == "__main__":
    run()

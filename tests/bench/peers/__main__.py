"""Run the contenders (compared programs) one after the other, in several rounds. Print for each contender the
supervised tokens per CPU second and the highest memory, and the ratios of both to those of transformers' Trainer with
all rows padded to 512 tokens. A second table has the ratios of this project's trainer to the others, with their goals.

    python -m tests.bench.peers --pairs 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.demo.base_model import base_model
from finetune_trainer.data.order import global_batch
from tests.bench.peers.rows import gsm8k_rows, write_rows
from tests.bench.peers.workload import Measured, Workload
from tests.trainer.objectstore import minio_binary, running_store

SEED = 42
CONTENDER_SECONDS = 1200
OURS = "finetune-operator, packed"
BASELINE = "Trainer + peft, padded to 512"
TRL = "trl SFTTrainer, bfd packing"
GOALS: Mapping[str, float] = {BASELINE: 3.5, TRL: 1.6}
"""How many times as many supervised tokens per CPU second as a contender this project's trainer must compute."""


def contenders(endpoint: str, credentials: Path) -> dict[str, list[str]]:
    """Return the command of each contender, by the contender's name in the table. A command is a list of the Python
    module and the arguments that only this contender gets."""
    return {
        OURS: ["tests.bench.peers.ours", endpoint, str(credentials)],
        BASELINE: ["tests.bench.peers.padded", "max_length"],
        "Trainer + peft, padded to the longest": ["tests.bench.peers.padded", "longest"],
        TRL: ["tests.bench.peers.sft"],
    }


def measure(command: Sequence[str], workload: Path, out: Path, threads: int) -> Measured:
    """Run the contender ``command`` in a process of its own and return its figures. If the contender fails, end this
    program and print the contender's output."""
    module, *rest = command
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module, str(workload), str(out), *rest],
        env=environment,
        capture_output=True,
        text=True,
        timeout=CONTENDER_SECONDS,
    )
    if done.returncode != 0 or not out.is_file():
        sys.exit(f"error: {module} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return Measured.model_validate_json(out.read_text())


def check_same_work(taken: Mapping[str, Sequence[Measured]]) -> None:
    """End the program if contenders did not do the same work: in each update of the first round their losses must agree
    within a thousandth. trl's losses are not compared, because trl packs rows across batches."""
    unpacked = [name for name in taken if not name.startswith("trl")]
    reference = taken[unpacked[0]][0].losses
    for name in unpacked[1:]:
        for step, (own, other) in enumerate(zip(reference, taken[name][0].losses, strict=True), start=1):
            if abs(own - other) > 1e-3 * abs(own):
                sys.exit(f"error: update {step}: loss {own:.6f} here, {other:.6f} with {name}: not the same work")


def table_of(taken: Mapping[str, Sequence[Measured]]) -> Table:
    """Return the table with the medians of all contenders. The ratio of speeds is the median of the ratios between a
    contender and `BASELINE` in the same round."""
    table = Table(title="LoRA r 8 on SmolLM2-135M, GSM8K rows, fp32, one process")
    for column in ("", "supervised tokens / CPU s", "ratio (from, to)", "real tokens / s", "peak memory", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    base = taken[BASELINE]
    for name, runs in taken.items():
        speeds = [run.speed for run in runs]
        ratios = sorted(run.speed / other.speed for run, other in zip(runs, base, strict=True))
        peak = statistics.median(run.peak_bytes for run in runs)
        table.add_row(
            name,
            f"{statistics.median(speeds):.0f}",
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})",
            f"{statistics.median(run.real_tokens / run.wall_seconds for run in runs):.0f}",
            f"{peak / 2**30:.2f} GiB",
            f"{peak / statistics.median(run.peak_bytes for run in base):.2f}",
        )
    return table


def goals_of(taken: Mapping[str, Sequence[Measured]]) -> Table:
    """Return the table with the ratios of this project's trainer to the contenders of `GOALS`. A ratio of speeds
    compares two runs of one round, and the ratio of memory compares the medians."""
    table = Table(title=f"{OURS}, against the others")
    for column in ("", "speed", "from, to", "goal", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    ours = taken[OURS]
    for name, goal in GOALS.items():
        others = taken[name]
        ratios = sorted(own.speed / other.speed for own, other in zip(ours, others, strict=True))
        memory = statistics.median(run.peak_bytes for run in ours) / statistics.median(run.peak_bytes for run in others)
        table.add_row(
            name,
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f}, {ratios[-1]:.2f}",
            f"at least {goal:.1f}",
            f"{memory:.2f}",
        )
    return table


def main() -> None:
    """Run the comparison with the options of the command line and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.peers",
        description="Compare the trainer with transformers' Trainer + peft and with trl, in turns.",
        epilog="example: python -m tests.bench.peers --pairs 3 --updates 5",
    )
    parser.add_argument("--pairs", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--updates", type=int, default=5, help="optimizer steps, the first of which is left out")
    parser.add_argument("--batch", type=int, default=16, help="rows per update (default 16)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender (default 1)")
    options = parser.parse_args()
    binary = minio_binary()
    if binary is None:
        sys.exit("error: no MinIO program: run `python -m tests.cluster build`, or set FINETUNE_MINIO")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        total = options.updates * options.batch
        rows = gsm8k_rows(total)
        order = [
            row
            for step in range(1, options.updates + 1)
            for row in global_batch(step, rows=total, global_batch_size=options.batch, seed=SEED)
        ]
        workload = Workload(
            model=base_model(),
            # Our trainer orders the rows itself, but transformers' Trainer reads the rows in the order of the file. The
            # file for transformers' Trainer is therefore written in our trainer's order, so that both train on the same
            # batches.
            rows=write_rows(folder / "ordered.jsonl", [rows[index] for index in order]),
            batch=options.batch,
            micro_batch=8,
            updates=options.updates,
            learning_rate=1e-4,
            max_length=512,
            threads=options.threads,
            seed=SEED,
        )
        # In our trainer `micro_batch` counts packed sequences, not rows. With 1, our trainer computes one packed
        # sequence at a time, as trl does in `sft.py`.
        mine = {"rows": write_rows(folder / "rows.jsonl", rows), "micro_batch": 1}
        ours = workload.model_copy(update=mine)
        files = {}
        for name, value in (("others", workload), ("ours", ours)):
            files[name] = folder / f"{name}.json"
            files[name].write_text(value.model_dump_json())
        (folder / "minio").mkdir()
        taken: dict[str, list[Measured]] = {}
        console = Console(stderr=True)
        with running_store(binary, folder / "minio") as store, Progress(console=console, transient=True) as progress:
            commands = contenders(store.endpoint, store.credentials)
            task = progress.add_task("contenders in turns", total=options.pairs * len(commands))
            for pair in range(options.pairs):
                for number, (name, command) in enumerate(commands.items()):
                    file = files["ours" if command[0].endswith("ours") else "others"]
                    found = measure(command, file, folder / f"out-{pair}-{number}.json", options.threads)
                    taken.setdefault(name, []).append(found)
                    progress.advance(task)
    check_same_work(taken)
    Console().print(table_of(taken), goals_of(taken))


if __name__ == "__main__":
    main()

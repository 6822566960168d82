"""Measure how much slower the training thread is while checkpoints are uploaded in the background to a MinIO that
receives only 5 MB/s.

The result is two ratios between a run with checkpoints and a run without. The first is the ratio of the training
thread's CPU times for the same steps. The second is the ratio of the 99th percentiles of the seconds of a step. All
runs are made in one process. A run with checkpoints and a run without, one right after the other, make a pair, and the
table shows the median of the ratios of all pairs. A last row shows for how long a checkpoint pauses the training.

    python -m tests.bench --only uploads
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from finetune_trainer.pod.plan import Inputs
from finetune_trainer.storage.step_log import StepRow
from tests.trainer import tiny
from tests.trainer.gangs import step_rows, train_all
from tests.trainer.objectstore import minio_binary, running_store
from tests.trainer.pods import run_config
from tests.trainer.storeproxy import proxy_before

PAIRS = 5
STEPS = 120
WARM_UP = 10
"""Number of steps at the start of a run that are not counted, because memory is allocated in them."""
EVERY = 10
"""Number of steps from one checkpoint to the next. This number of steps takes about as long as the upload of one
checkpoint."""
NEVER = 1_000_000
BYTES_PER_SECOND = 5_000_000


@dataclass(frozen=True)
class Measured:
    """The figures of one run, without its first `WARM_UP` steps."""

    cpu_seconds: float
    """CPU seconds of the training thread, summed over all counted steps."""
    p99_seconds: float
    """99th percentile of the seconds of a step."""
    stall_seconds: float
    """Mean seconds for which training paused while a checkpoint was copied in memory. This time is not part of the
    seconds of a step."""

    @classmethod
    def of(cls, rows: list[StepRow]) -> Measured:
        """Compute the figures of a run from ``rows``, the lines of its step log."""
        counted = rows[WARM_UP:]
        stalls = [row.checkpoint_seconds for row in counted if row.checkpoint_seconds]
        return cls(
            cpu_seconds=sum(row.cpu_seconds for row in counted),
            p99_seconds=statistics.quantiles((row.seconds for row in counted), n=100, method="inclusive")[98],
            stall_seconds=statistics.fmean(stalls) if stalls else 0.0,
        )


def write_model(folder: Path) -> Path:
    """Write a Llama model of about 3.4 million parameters, with the tokenizer of the tests, into ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny.write_model(folder)
    torch.manual_seed(7)
    config = LlamaConfig.from_pretrained(folder)
    config.update({"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4})
    config.update({"num_key_value_heads": 4, "head_dim": 64})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measure(folder: Path, binary: Path) -> list[tuple[Measured, Measured]]:
    """Run `PAIRS` pairs of runs. Return for each pair first the figures of the run with checkpoints, then those of the
    run without."""
    (folder / "minio").mkdir()
    model = write_model(folder / "model")
    rows = tiny.write_jsonl(folder / "train.jsonl", tiny.rows(64, seed=1))
    with running_store(binary, folder / "minio") as store, proxy_before(store.endpoint) as proxy:
        proxy.bytes_per_second = BYTES_PER_SECOND
        # Every second pair starts with the run without checkpoints. The first run of a pair may make the second run
        # faster or slower. With this order, this effect is about the same for both kinds of runs.
        names = [
            (f"uploads-{number}-{every}", every)
            for number in range(PAIRS)
            for every in ((EVERY, NEVER) if number % 2 == 0 else (NEVER, EVERY))
        ]
        configs = [
            run_config(
                store,
                name,
                world__nodes=1,
                dataset__validation=None,
                lora={"rank": 16, "alpha": 16},
                optimization__zeroStage=1,
                optimization__maxSteps=STEPS,
                optimization__globalBatchSize=8,
                optimization__microBatchSize=8,
                storage__checkpointEverySteps=every,
                storage__endpoint=proxy.endpoint,
            )
            for name, every in names
        ]
        inputs = Inputs(model=model, train=rows, validation=None)
        train_all(configs, inputs, folder / "runs", credentials=store.credentials, seconds=1200)
        taken = {name: Measured.of(step_rows(store, name)) for name, _ in names}
    return [(taken[f"uploads-{number}-{EVERY}"], taken[f"uploads-{number}-{NEVER}"]) for number in range(PAIRS)]


def run() -> None:
    """Run the measurement and print the table."""
    binary = minio_binary()
    if binary is None:
        sys.exit("error: no MinIO program: run `python -m tests.cluster build`, or set FINETUNE_MINIO")
    with tempfile.TemporaryDirectory() as temporary:
        pairs = measure(Path(temporary), binary)
    table = Table(title=f"with checkpoints every {EVERY} steps at 5 MB/s, against without (median of {PAIRS} pairs)")
    for column in ("of the training thread", "with", "without", "ratio", "ratios from to"):
        table.add_column(column, justify="right")
    for what, name in (("CPU time of the steps", "cpu_seconds"), ("p99 of a step", "p99_seconds")):
        ratios = sorted(getattr(with_, name) / getattr(without, name) for with_, without in pairs)
        table.add_row(
            what,
            *(f"{statistics.median(getattr(pair[side], name) for pair in pairs):.3f} s" for side in (0, 1)),
            f"{statistics.median(ratios):.3f}",
            f"{ratios[0]:.3f} {ratios[-1]:.3f}",
        )
    stall = statistics.median(with_.stall_seconds for with_, _ in pairs)
    table.add_row("stall of a snapshot", f"{stall:.3f} s", "", "", "")
    Console().print(table)


if __name__ == "__main__":
    run()

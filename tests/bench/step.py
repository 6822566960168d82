"""Measure the seconds of one optimizer step of the trainer, and compare them with those of a plain PyTorch loop with
the same model, rows, batches and optimizer. The result is a table with the seconds of both programs and their ratio,
once for the method LoRA and once for the method Full (all weights are trained). The trainer runs as one process with
ZeRO stage 1.

Runs of the trainer and of the plain loop alternate, so that other work on the machine affects both. A run of the
trainer and the run of the plain loop right after it make a pair, and the table shows the median of the ratios of all
pairs.

    python -m tests.bench --only step
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finetune_core.api.method import LoRASpec
from finetune_trainer.data.order import global_batch
from finetune_trainer.model.adapters import add_adapters
from finetune_trainer.pod.plan import Inputs
from tests.bench.peers.hugging_face import DENSE
from tests.trainer import tiny
from tests.trainer.gangs import step_rows, train_all
from tests.trainer.objectstore import ObjectStore, minio_binary, running_store
from tests.trainer.pods import run_config

STEPS = 16
WARM_UP = 4
"""Number of steps at the start of a run that are not counted, because memory is allocated in them."""
ROWS = 64
BATCH = 8
RATE = 1e-3
METHODS = ("LoRA", "Full")


@dataclass(frozen=True)
class Pair:
    """The median seconds of a step in one run of the trainer, and in the run of the plain loop right after it."""

    trainer: float
    plain: float

    @property
    def ratio(self) -> float:
        """The trainer's seconds divided by the plain loop's seconds."""
        return self.trainer / self.plain


def write_model(folder: Path) -> Path:
    """Write a Llama model of about 11 million parameters, with the tokenizer of the tests, into ``folder``. The model
    is large enough that a step spends more time in arithmetic than in Python."""
    tiny.write_model(folder)
    torch.manual_seed(7)
    config = LlamaConfig.from_pretrained(folder)
    config.update({"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6})
    config.update({"num_key_value_heads": 6, "head_dim": 64})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trainer_seconds(store: ObjectStore, model: Path, rows: Path, method: str, name: str, folder: Path) -> float:
    """Run the trainer and return the median seconds of a step. The seconds come from the step log in the object
    store."""
    config = run_config(
        store,
        name,
        world__nodes=1,
        method=method,
        dataset__validation=None,
        optimization__zeroStage=1,
        optimization__maxSteps=STEPS,
        optimization__globalBatchSize=BATCH,
        optimization__microBatchSize=BATCH,
        optimization__learningRate=RATE,
        storage__checkpointEverySteps=1000,
    )
    folder.mkdir()
    train_all([config], Inputs(model=model, train=rows, validation=None), folder, credentials=store.credentials)
    return statistics.median(row.seconds for row in step_rows(store, name)[WARM_UP:])


def plain_seconds(model_folder: Path, rows: list[dict[str, str]], method: str) -> float:
    """Run a short PyTorch loop that makes the same updates as the trainer, and return the median seconds of a step.
    Each batch is padded to its longest row."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if method == "LoRA":
        model = add_adapters(model, LoRASpec(rank=4, alpha=8), targets=DENSE, seed=42, base_name="bench")
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    seconds = []
    for step in range(1, STEPS + 1):
        started = time.perf_counter()
        examples = []
        for row in global_batch(step, rows=ROWS, global_batch_size=BATCH, seed=42):
            prompt = tokenizer(tiny.TEMPLATE.replace("{prompt}", rows[row]["question"]))["input_ids"]
            ids = [*prompt, *tokenizer(rows[row]["reply"])["input_ids"], tokenizer.eos_token_id]
            examples.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
        width = max(len(ids) for ids, _ in examples)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def measure(store: ObjectStore, pairs: int, folder: Path) -> dict[str, list[Pair]]:
    """Measure ``pairs`` pairs for each method, and return them by method. Runs of the trainer and of the plain loop
    alternate."""
    torch.set_num_threads(1)
    model = write_model(folder / "model")
    rows = tiny.rows(ROWS, seed=1)
    file = tiny.write_jsonl(folder / "train.jsonl", rows)
    measured: dict[str, list[Pair]] = {method: [] for method in METHODS}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("trainer against plain loop", total=pairs * len(METHODS))
        for number in range(pairs):
            for method in METHODS:
                name = f"bench-{method}-{number}".lower()
                trainer = trainer_seconds(store, model, file, method, name, folder / name)
                measured[method].append(Pair(trainer, plain_seconds(model, rows, method)))
                progress.advance(task)
    return measured


def run(pairs: int = 5) -> None:
    """Measure ``pairs`` pairs for each method and print the table."""
    binary = minio_binary()
    if binary is None:
        sys.exit("error: no MinIO program: run `python -m tests.cluster build`, or set FINETUNE_MINIO")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "minio").mkdir()
        with running_store(binary, folder / "minio") as store:
            measured = measure(store, pairs, folder)
    table = Table(title="one optimizer step, fp32, one process, one thread (median of pairs)")
    for column in ("method", "trainer", "plain PyTorch", "ratio", "ratios from to"):
        table.add_column(column, justify="right")
    for method, taken in measured.items():
        ratios = sorted(pair.ratio for pair in taken)
        table.add_row(
            method,
            f"{statistics.median(pair.trainer for pair in taken) * 1000:.0f} ms",
            f"{statistics.median(pair.plain for pair in taken) * 1000:.0f} ms",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} {ratios[-1]:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    run()

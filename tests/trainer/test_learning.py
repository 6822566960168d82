"""LoRA teaches ViGGO to SmolLM2-135M: the scores of the tuned model are compared with those of the base model."""

from __future__ import annotations

import csv
import math
import os
import random
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from examples.demo.base_model import base_model
from finetune_core.contract import Outcome
from finetune_trainer.pod.plan import Inputs
from tests.trainer.gangs import step_rows, train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config

DATA = Path(os.environ.get("FINETUNE_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "viggo"
TEMPLATE = "Sentence: {prompt}\nMeaning: "
STEPS, BATCH, HELD_OUT, SHOWN = 240, 8, 40, 4
SECONDS = 1400
FEW_TOKENS = 96
"""Longest generated answer in tokens; the longest reference answer of the held-out rows is shorter."""


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["mr", "ref"])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.skipif(not DATA.is_dir(), reason="the data set is not there")
def test_lora_teaches_viggo_to_a_model_that_can_not_do_it(store: ObjectStore, tmp_path: Path) -> None:
    """The base model's prompt contains solved examples. The examples and the training rows come from the training file,
    the held-out rows from the validation file."""
    rng = random.Random(0)
    train, held_out = read(DATA / "viggo-train.csv"), rng.sample(read(DATA / "viggo-valid.csv"), HELD_OUT)
    rng.shuffle(train)
    shown = "".join(f"Sentence: {row['ref']}\nMeaning: {row['mr']}\n\n" for row in rng.sample(train, SHOWN))
    config = run_config(
        store,
        "viggo",
        dataset__train={"volume": {"claimName": "viggo", "path": "train.csv"}},
        dataset__validation=None,
        dataset__test={"volume": {"claimName": "viggo", "path": "test.csv"}},
        dataset__format={
            "promptCompletion": {"promptField": "ref", "completionField": "mr", "template": TEMPLATE},
        },
        dataset__maxLength=256,
        dataset__packing=True,
        dataset__task={"name": "ViGGO"},
        lora={"rank": 8, "alpha": 16},
        optimization__learningRate=1e-3,
        optimization__schedule="Linear",
        optimization__warmupSteps=5,
        optimization__maxSteps=STEPS,
        optimization__globalBatchSize=BATCH,
        optimization__microBatchSize=1,
        optimization__precision="bf16",
        storage__checkpointEverySteps=STEPS,
    )
    config["evaluation"]["generation"] = {"maxNewTokens": FEW_TOKENS, "batchSize": 20}
    config["evaluation"]["basePrompt"] = f"{shown}{TEMPLATE}"
    inputs = Inputs(
        model=base_model(),
        train=write(tmp_path / "train.csv", train),
        test=write(tmp_path / "test.csv", held_out),
    )
    (result,) = train_all([config], inputs, tmp_path / "gang", credentials=store.credentials, seconds=SECONDS)

    assert result.outcome is Outcome.COMPLETED
    record = result.evaluation
    assert record is not None
    assert record.base is not None
    assert record.tuned is not None
    rows = step_rows(store, "viggo")
    table = Table(
        title=f"SmolLM2-135M on {HELD_OUT} held-out rows of ViGGO, LoRA r 8, {STEPS} steps of {BATCH} rows, bf16"
    )
    for column in ("", "perplexity", *record.tuned.scores):
        table.add_column(column, justify="right")
    for name, score in (("base", record.base), ("tuned", record.tuned)):
        shares = (f"{score.scores[key]:.0%}" for key in record.tuned.scores)
        table.add_row(name, f"{score.perplexity:.3g}", *shares)
    Console(width=110).print(table)
    print(
        f"loss {rows[0].loss:.3f} to {rows[-1].loss:.3f}; a step took {sum(row.seconds for row in rows) / STEPS:.1f} s"
    )
    assert (record.rows, record.tuned_step) == ("Test", STEPS)
    assert record.base.graded == record.tuned.graded == HELD_OUT
    assert record.base.task_score is not None
    assert record.tuned.task_score is not None
    assert record.base.task_score <= 0.1
    assert record.tuned.task_score >= 0.3
    assert record.tuned.scores["function"] >= 0.8
    # Losses in nats per token are compared. The perplexities would differ too little, because perplexity is at least 1
    # and the base model's is close to 1.
    assert math.log(record.tuned.perplexity) < 0.05 * math.log(record.base.perplexity)

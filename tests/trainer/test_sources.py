"""Jobs get their rows from all kinds of sources. One job trains on a split on the hub with packing, and has validation
rows in the bucket and test rows on a volume. The other job trains on a mix of a folder in the bucket and files on a
volume.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from finetune_trainer.data.mixture import Mixture
from tests.trainer import tiny
from tests.trainer.conftest import StartPods
from tests.trainer.data_hub import Hub, served
from tests.trainer.gangs import step_rows
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.pods import run_config


def parquet_of(path: Path, rows: list[dict[str, str]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_rows_of_hub_bucket_and_volume_are_packed_and_learned(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    rows = tiny.rows(24, seed=9)
    files = {f"data/train-{part}.parquet": parquet_of(tmp_path / f"{part}.parquet", rows[part::2]) for part in (0, 1)}
    validation = tmp_path / "validation"
    validation.mkdir()
    parquet_of(validation / "rows.parquet", tiny.rows(5, seed=2))
    store.upload("parquet", validation)
    volume = tmp_path / "volumes" / "claim"
    volume.mkdir(parents=True)
    tiny.write_jsonl(volume / "test.jsonl", tiny.rows(3, seed=3))
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tokens / "dataset.train").write_text("hf_secret\n")
    hub_source = {"repo": "acme/rows", "split": "train", "tokenSecretRef": {"name": "hub", "key": "token"}}
    changes: dict[str, Any] = {
        "dataset__train": {"huggingFace": hub_source},
        "dataset__validation": {"s3": {"uri": f"s3://{BUCKET}/parquet/rows.parquet"}},
        "dataset__test": {"volume": {"claimName": "claim", "path": "test.jsonl"}},
        "dataset__packing": True,
        "optimization__maxSteps": None,
        "optimization__epochs": 1,
        "optimization__globalBatchSize": 12,
        "optimization__microBatchSize": 1,
    }
    with served(Hub("acme/rows", {name: path.read_bytes() for name, path in files.items()}, token="hf_secret")) as hub:
        attempt = pods(
            run_config(store, "sources", world__nodes=1, **changes),
            arguments=("--volumes", str(tmp_path / "volumes"), "--hub-data-tokens", str(tokens)),
            variables={"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"},
        )
        assert attempt.wait() == [0], attempt.output
    assert "24 examples, 2 steps of 12" in attempt.output
    log = step_rows(store, "sources")
    assert [row.step for row in log] == [1, 2]
    # Every answer consists of the words of its prompt and the end token, and the tokenizer makes one token of each
    # word. So the number of supervised tokens follows from the rows.
    assert sum(row.tokens for row in log) == sum(len(row["reply"].split()) + 1 for row in rows)
    assert "hf_secret" not in attempt.output
    assert not any(b"hf_secret" in store.read(key) for key in store.keys("runs/default/sources/"))


def test_a_mix_of_a_folder_and_a_glob_is_learned_in_its_shares(
    store: ObjectStore, pods: StartPods, tmp_path: Path
) -> None:
    """Every step takes half of its examples from each source, although one source has three times as many rows as the
    other."""
    folder, volume = tmp_path / "folder", tmp_path / "volumes" / "claim"
    (folder / "deep").mkdir(parents=True)
    volume.mkdir(parents=True)
    large, small = tiny.rows(24, seed=9), tiny.rows(8, seed=5)
    lines = ["".join(json.dumps(row) + "\n" for row in part).encode() for part in (large[:10], large[10:])]
    (folder / "part-0.jsonl.gz").write_bytes(gzip.compress(lines[0]))
    (folder / "deep" / "part-1.jsonl.zst").write_bytes(pyarrow.compress(lines[1], codec="zstd", asbytes=True))
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / "README.md").write_text("These are rows.")
    store.upload("mixed/deep", folder / "deep")
    shutil.rmtree(folder / "deep")
    store.upload("mixed", folder)
    for number in (0, 1):
        text = "".join(f'"{row["question"]}",{row["reply"]}\n' for row in small[number::2])
        (volume / f"rows-{number}.csv").write_text(f"question,reply\n{text}")
    mix = [
        {"s3": {"uri": f"s3://{BUCKET}/mixed"}, "weight": "1"},
        {"volume": {"claimName": "claim", "path": "*.csv"}, "weight": "1.0"},
    ]
    changes: dict[str, Any] = {
        "dataset__train": {"mix": mix},
        "dataset__validation": {"s3": {"uri": f"s3://{BUCKET}/mixed/**/*.jsonl.zst"}},
        "optimization__maxSteps": None,
        "optimization__epochs": 1,
        "optimization__globalBatchSize": 8,
    }
    attempt = pods(
        run_config(store, "mixed", world__nodes=1, **changes),
        arguments=("--volumes", str(tmp_path / "volumes")),
        forked=True,
    )
    assert attempt.wait() == [0], attempt.output
    assert "32 examples, 4 steps of 8" in attempt.output
    left_out = f"a file that is no data file is left out of s3://{BUCKET}/mixed: mixed/README.md"
    assert f"dataset.train.mix[0].s3.uri: {left_out}" in attempt.output
    assert (
        f"dataset.train.mix[0]: 24 rows of 2 files were read, from s3://{BUCKET}/mixed/deep/part-1.jsonl.zst to"
        f" s3://{BUCKET}/mixed/part-0.jsonl.gz"
    ) in attempt.output
    assert (
        f"dataset.train: an epoch takes 16 times one of 24 examples from s3://{BUCKET}/mixed;"
        " 16 times one of 8 examples from claim/*.csv"
    ) in attempt.output
    # `rows` are in the order in which the trainer numbers the examples. `Mixture` draws the examples of each step with
    # the seed of the job, so the number of supervised tokens of each step is known.
    mixture = Mixture.of([24, 8], ["1", "1"])
    rows = [*large[10:], *large[:10], *small[0::2], *small[1::2]]
    expected = [
        sum(len(rows[row]["reply"].split()) + 1 for row in mixture.global_batch(step, global_batch_size=8, seed=42))
        for step in range(1, 5)
    ]
    assert [row.tokens for row in step_rows(store, "mixed")] == expected

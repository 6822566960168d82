"""Rows from all kinds of sources are trained on: a split on the hub, parquet in the bucket, and jsonl on a volume, with
packing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

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
    assert "24 rows, 2 steps of 12 examples" in attempt.output
    log = step_rows(store, "sources")
    assert [row.step for row in log] == [1, 2]
    # Every answer consists of the words of its prompt and the end token, and the tokenizer makes one token of each
    # word. So the number of supervised tokens follows from the rows.
    assert sum(row.tokens for row in log) == sum(len(row["reply"].split()) + 1 for row in rows)
    assert "hf_secret" not in attempt.output
    assert not any(b"hf_secret" in store.read(key) for key in store.keys("runs/default/sources/"))

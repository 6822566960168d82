"""Rows keep their line numbers, every row is consumed once per epoch, and every rank computes the same number of
micro-batches.
"""

from __future__ import annotations

import hashlib
import math
import random
import secrets
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.contract import OptimizationConfig
from finetune_core.errors import UserError
from finetune_trainer.data import order
from finetune_trainer.data.batches import IGNORED, collate
from finetune_trainer.data.examples import Example
from finetune_trainer.data.order import batches_per_epoch, cursor, digest_order, global_batch, micro_batches
from finetune_trainer.data.packing import best_fit_decreasing, pack
from finetune_trainer.data.reader import read_rows
from finetune_trainer.decisions.schedule import learning_rate_at
from finetune_trainer.engine.state import assign_owners
from tests.trainer.plain_loop import plain_order


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_rows_keep_physical_line_numbers_and_broken_lines_their_problem(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '\ufeff{"a": 1}\n\n{"a": \n[1]\n{"a": "\u2028"}\n')
    rows = list(read_rows(path, "dataset.train"))
    assert [(row.number, row.problem is None) for row in rows] == [(1, True), (3, False), (4, False), (5, True)]
    assert rows[0].fields == {"a": 1}
    assert rows[2].problem == "is not a JSON object"
    assert rows[3].fields == {"a": "\u2028"}


def test_csv_rows_begin_where_their_first_line_is(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'a,b\n1,"two\nlines"\n\n3,4\n5\n')
    rows = list(read_rows(path, "dataset.train"))
    assert [(row.number, dict(row.fields)) for row in rows[:2]] == [
        (2, {"a": "1", "b": "two\nlines"}),
        (5, {"a": "3", "b": "4"}),
    ]
    assert (rows[2].number, rows[2].problem) == (6, "has 1 fields where the header has 2")


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.xlsx", b"a", "must be a file with the suffix .jsonl, .json, .csv, .tsv, .parquet or .txt, each also"),
        ("a.parquet", b"PAR1", "a.parquet can't be read as parquet after row 0"),
        ("b.csv", b"a,a\n1,2", "can't be read as csv: its header has 'a' twice"),
        ("a.jsonl", b"\xff\xfe{\x00}\x00", "is UTF-16 text"),
        ("a.csv", b'"open', "has a header that can't be read: unexpected end of data"),
    ],
)
def test_unreadable_files_are_refused_by_field(name: str, data: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"dataset.train: .*{problem}"):
        list(read_rows(tmp_path / name, "dataset.train"))


@given(rows=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 99))
def test_an_epoch_consumes_every_row_once(rows: int, size: int, seed: int) -> None:
    per_epoch = batches_per_epoch(rows, size)
    for epoch in range(2):
        steps = range(1 + epoch * per_epoch, 1 + (epoch + 1) * per_epoch)
        seen = Counter(
            row for step in steps for row in global_batch(step, rows=rows, global_batch_size=size, seed=seed)
        )
        assert seen == Counter(range(rows))
        assert {cursor(step, rows=rows, global_batch_size=size).epoch for step in steps} == {epoch}


def test_the_order_is_fixed_for_ever() -> None:
    assert global_batch(1, rows=8, global_batch_size=8, seed=42) == (2, 7, 6, 5, 4, 1, 3, 0)
    assert global_batch(2, rows=8, global_batch_size=8, seed=42) != global_batch(
        1, rows=8, global_batch_size=8, seed=42
    )


@pytest.mark.parametrize("equal_bytes", [0, 8])
@given(rows=st.integers(0, 60), name=st.text(st.characters(codec="utf-8"), max_size=10))
def test_rows_are_in_the_order_of_their_digests(equal_bytes: int, rows: int, name: str) -> None:
    """The order holds even where the first halves of digests are equal, which does not happen with real digests."""

    def blake2b(text: bytes, *, digest_size: int) -> Any:
        digest = hashlib.blake2b(text, digest_size=digest_size).digest()
        return SimpleNamespace(digest=lambda: bytes(equal_bytes) + digest[equal_bytes:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "hashlib", SimpleNamespace(blake2b=blake2b))
        patch.setattr(order, "HASHED_AT_ONCE", 7)
        found = digest_order(rows, name).tolist()
    digests = {row: blake2b(f"{name}/{row}".encode(), digest_size=16).digest() for row in range(rows)}
    assert found == sorted(range(rows), key=digests.__getitem__)


def test_the_order_of_many_rows_takes_little_memory() -> None:
    """Every rank of a node holds the order of all rows. A list of Python objects would take 118 bytes for each row
    while it is sorted, which is more than the tokens of a short row take."""
    rows = 100_000
    tracemalloc.start()
    try:
        found = digest_order(rows, "42/0")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found[:3].tolist() == plain_order(rows, "42/0")[:3]
    assert held < 10 * rows
    assert peak < 50 * rows


@given(batch=st.integers(1, 40), world=st.integers(1, 8), size=st.integers(1, 8), packed=st.booleans())
def test_ranks_share_a_batch_without_loss_in_equally_many_micro_batches(
    batch: int, world: int, size: int, packed: bool
) -> None:
    lengths = [1 + (7 * row) % 13 for row in range(batch)]
    sequences = pack(range(batch), lengths, capacity=16, ranks=world) if packed else [[row] for row in range(batch)]
    shares = [
        micro_batches(sequences, lengths, rank=rank, world_size=world, micro_batch_size=size) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for micro in share for sequence in micro for row in sequence]
    assert sorted(rows) == list(range(batch))
    assert all(len(micro) <= size for share in shares for micro in share)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60), st.integers(1, 8))
def test_packing_fills_no_sequence_over_its_capacity_and_costs_no_rank_more_time(
    lengths: list[int], ranks: int
) -> None:
    rows = range(len(lengths))
    sequences = pack(rows, lengths, capacity=32, ranks=ranks)
    fewest = len(best_fit_decreasing(rows, lengths, 32))
    assert sorted(row for sequence in sequences for row in sequence) == list(rows)
    assert all(sum(lengths[row] for row in sequence) <= 32 for sequence in sequences)
    assert -(-len(sequences) // ranks) == -(-fewest // ranks)


def test_best_fit_takes_the_fullest_bin_with_room() -> None:
    assert best_fit_decreasing(range(6), [5, 7, 3, 2, 4, 1], 10) == [[1, 2], [0, 4, 5], [3]]


def test_packing_fills_the_sequences_of_gsm8k_like_lengths() -> None:
    rng = random.Random(3)
    lengths = [min(512, max(60, round(rng.gauss(200, 75)))) for _ in range(4096)]
    sequences = best_fit_decreasing(range(len(lengths)), lengths, 2048)
    assert sum(lengths) / (len(sequences) * 2048) > 0.99


def test_only_completion_and_end_are_supervised() -> None:
    first, second = Example((5, 6, 7, 1), [(2, 4)]), Example((8, 9, 1), [(1, 3)])
    batch = collate([[(first, 11)], [(second, 12)]], pad=0, packed=False)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1], [8, 9, 1, 0]]
    assert batch.position_ids is None
    assert batch.index.tolist() == [1, 2, 4, 5]
    assert batch.targets.tolist() == [7, 1, 9, 1]
    assert (batch.tokens, batch.real_tokens) == (4, 7)


def test_packed_examples_begin_at_position_zero_and_keep_their_targets_and_dropout() -> None:
    first, second = Example((5, 6, 7, 1), [(2, 4)]), Example((8, 9, 1), [(0, 3)])
    padded = collate([[(first, 11)], [(second, 12)]], pad=0, packed=False)
    batch = collate([[(first, 11), (second, 12)], [(second, 13)]], pad=0, packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 8, 9, 1], [8, 9, 1, 0, 0, 0, 0]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [7, 1, 9, 1, 9, 1]
    assert batch.input_ids.flatten()[batch.index].tolist() == [6, 7, 8, 9, 8, 9]
    assert batch.dropout_keys[0, 4:].tolist() == padded.dropout_keys[1, :3].tolist()


def test_a_rank_without_examples_computes_a_dummy() -> None:
    for packed in (False, True):
        dummy = collate([], pad=3, packed=packed)
        assert dummy.tokens == 0
        assert dummy.input_ids.shape == (1, 1)
        assert dummy.targets.tolist() == [IGNORED]


def test_trap_22_the_rate_is_a_function_of_the_step() -> None:
    base = {
        "learning_rate": 1.0, "global_batch_size": 1, "micro_batch_size": 1, "weight_decay": 0, "gradient_clipping": 1,
        "precision": "fp32", "gradient_checkpointing": False, "seed": 1, "zero_stage": 1,
    }  # fmt: skip

    def rates(schedule: str, warmup: int) -> list[float]:
        optimization = OptimizationConfig(**base, schedule=schedule, warmup_steps=warmup)
        return [learning_rate_at(step, 6, optimization) for step in range(1, 7)]

    assert rates("Constant", 2) == [0.5, 1, 1, 1, 1, 1]
    assert rates("Linear", 2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert rates("Cosine", 0)[0] == 1
    assert rates("Cosine", 0)[3] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert rates("Linear", 6) == pytest.approx([step / 6 for step in range(1, 7)])


@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(1, 50), min_size=1, max_size=2)), st.integers(1, 8))
def test_training_state_is_spread_over_ranks_by_size(shapes: dict[str, list[int]], world: int) -> None:
    chosen = assign_owners(shapes, world)
    assert chosen.keys() == shapes.keys()
    loads = [sum(math.prod(shapes[name]) for name, rank in chosen.items() if rank == at) for at in range(world)]
    assert max(loads) - min(loads) <= max((math.prod(shape) for shape in shapes.values()), default=0)


def test_a_parquet_file_that_expands_ten_thousand_times_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.data.files.streams.EXPANDED_BYTES", 1 << 20)
    monkeypatch.setattr("finetune_trainer.data.files.streams.LARGEST_EXPANSION", 100)
    bomb, honest = tmp_path / "bomb.parquet", tmp_path / "honest.parquet"
    pq.write_table(pa.table({"text": ["a" * 10_000] * 5000}), bomb, compression="zstd")
    pq.write_table(pa.table({"text": [secrets.token_hex(500) for _ in range(5000)]}), honest, compression="zstd")
    with pytest.raises(UserError, match=r"^dataset.train: bomb.parquet has \d+ bytes and expands to more than \d+"):
        list(read_rows(bomb, "dataset.train"))
    assert len(list(read_rows(honest, "dataset.train"))) == 5000


def test_only_the_named_columns_of_a_parquet_file_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a"], "more": [["b"]]}), path)
    assert [row.fields for row in read_rows(path, "dataset.train", columns=["text", "absent"])] == [{"text": "a"}]
    assert [set(row.fields) for row in read_rows(path, "dataset.train", columns=["absent"])] == [{"text", "more"}]

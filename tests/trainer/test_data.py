"""Rows keep their line numbers, every row is seen once an epoch, every rank does the same number of micro-batches."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.contract import OptimizationConfig
from finetune_core.errors import UserError
from finetune_trainer.data.batches import IGNORED, collate
from finetune_trainer.data.examples import Example
from finetune_trainer.data.order import batches_per_epoch, cursor, global_batch, micro_batches
from finetune_trainer.data.reader import read_rows
from finetune_trainer.training.schedule import rate
from finetune_trainer.training.state import owners


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_rows_keep_physical_line_numbers_and_broken_lines_their_problem(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '\ufeff{"a": 1}\n\n{"a": \n[1]\n{"a": "\u2028"}\n')
    rows = list(read_rows(path, "dataset.train"))
    assert [(row.line, row.problem is None) for row in rows] == [(1, True), (3, False), (4, False), (5, True)]
    assert rows[0].fields == {"a": 1}
    assert rows[2].problem == "is not a JSON object"
    assert rows[3].fields == {"a": "\u2028"}


def test_csv_rows_begin_where_their_first_line_is(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'a,b\n1,"two\nlines"\n\n3,4\n5\n')
    rows = list(read_rows(path, "dataset.train"))
    assert [(row.line, dict(row.fields)) for row in rows[:2]] == [
        (2, {"a": "1", "b": "two\nlines"}),
        (5, {"a": "3", "b": "4"}),
    ]
    assert (rows[2].line, rows[2].problem) == (6, "has 1 fields where the header has 2")


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.parquet", b"PAR1", "must be a .jsonl or .csv file"),
        ("a.jsonl", b'{"a": "\xff"}', "is not UTF-8"),
        ("a.csv", b'a\n"open', "can't be read as csv"),
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


@given(batch=st.integers(1, 40), world=st.integers(1, 8), size=st.integers(1, 8))
def test_ranks_share_a_batch_without_loss_in_equally_many_micro_batches(batch: int, world: int, size: int) -> None:
    lengths = [(7 * row) % 13 for row in range(batch)]
    shares = [
        micro_batches(range(batch), lengths, rank=rank, world_size=world, micro_batch_size=size)
        for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for micro in share for row in micro) == list(range(batch))
    assert all(len(micro) <= size for share in shares for micro in share)


def test_only_completion_and_end_are_supervised() -> None:
    batch = collate([Example((5, 6, 7, 1), 2), Example((8, 9, 1), 1)], pad=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1], [8, 9, 1, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.positions.tolist() == [0, 1, 2]
    assert batch.targets.tolist() == [[IGNORED, 7, 1], [9, 1, IGNORED]]
    assert batch.tokens == 4


def test_a_rank_without_examples_computes_a_dummy() -> None:
    assert collate([], pad=3).tokens == 0
    assert collate([], pad=3).input_ids.shape == (1, 1)


def test_the_rate_is_a_function_of_the_step() -> None:
    base = {
        "learning_rate": 1.0, "global_batch_size": 1, "micro_batch_size": 1, "weight_decay": 0, "gradient_clipping": 1,
        "precision": "fp32", "gradient_checkpointing": False, "seed": 1, "zero_stage": 1,
    }  # fmt: skip

    def rates(schedule: str, warmup: int) -> list[float]:
        optimization = OptimizationConfig(**base, schedule=schedule, warmup_steps=warmup)
        return [rate(step, 6, optimization) for step in range(1, 7)]

    assert rates("Constant", 2) == [0.5, 1, 1, 1, 1, 1]
    assert rates("Linear", 2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert rates("Cosine", 0)[0] == 1
    assert rates("Cosine", 0)[3] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert rates("Linear", 6) == pytest.approx([step / 6 for step in range(1, 7)])


@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(1, 50), min_size=1, max_size=2)), st.integers(1, 8))
def test_training_state_is_spread_over_ranks_by_size(shapes: dict[str, list[int]], world: int) -> None:
    chosen = owners(shapes, world)
    assert chosen.keys() == shapes.keys()
    loads = [sum(math.prod(shapes[name]) for name, rank in chosen.items() if rank == at) for at in range(world)]
    assert max(loads) - min(loads) <= max((math.prod(shape) for shape in shapes.values()), default=0)

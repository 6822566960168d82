"""The compared programs train each row once, and engines on the same micro-batches have the same losses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.bench.engines import LENGTHS, MICRO_BATCHES, SEQUENCES, STEPS, made_examples, padded
from tests.bench.peers.workload import in_one_epoch


@given(sequences=st.integers(1, 10_000), updates=st.integers(1, 200))
def test_each_packed_sequence_is_trained_once(sequences: int, updates: int) -> None:
    """16 sequences in 5 updates of 4 sequences would train 4 of them twice."""
    each, made = in_one_epoch(sequences, updates)
    assert made <= updates
    assert each * (made - 1) < sequences <= each * made


def test_all_programs_get_the_same_micro_batches() -> None:
    steps = made_examples(100)
    assert steps == made_examples(100)
    assert [len(step) for step in steps] == [MICRO_BATCHES] * STEPS
    examples = steps[0][0]
    ids, mask, labels = padded(examples)
    assert len(ids) == SEQUENCES
    for line, example in enumerate(examples):
        length, (first, last) = len(example.ids), example.spans[0]
        assert LENGTHS[0] <= length <= LENGTHS[1]
        assert ids[line, :length].tolist() == list(example.ids)
        assert mask[line].sum() == length
        assert (labels[line] >= 0).nonzero().flatten().tolist() == list(range(first, last))

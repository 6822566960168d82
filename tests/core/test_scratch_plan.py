"""The scratch space of a pod follows from the sizes of model and data, and from what the job writes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.planning.scratch import GIBIBYTE, ScratchNeed, scratch_need

LORA: dict[str, Any] = {
    "model_bytes": 140 * GIBIBYTE,
    "data_bytes": GIBIBYTE,
    "rank": 16,
    "models_written": 0,
    "model_is_elsewhere": False,
}


@pytest.mark.parametrize(
    ("changes", "gibibytes"),
    [
        ({}, 1 + 140 + 14 + 2),
        ({"rank": 160}, 1 + 140 + 0.4 * 140 + 2),
        ({"models_written": 1}, 1 + 2 * 140 + 14 + 2),
        ({"model_is_elsewhere": True}, 1 + 14 + 2),
        ({"rank": None, "models_written": 1}, 1 + 2 * 140 + 6 * 140 + 2),
        ({"rank": None, "models_written": 2}, 1 + 3 * 140 + 6 * 140 + 2),
        ({"model_bytes": 0, "data_bytes": 0}, 1),
    ],
)
def test_what_is_requested_is_what_a_training_writes(changes: dict[str, Any], gibibytes: int) -> None:
    assert scratch_need(**LORA | changes).request_gibibytes == gibibytes


def test_a_small_job_asks_for_little_and_is_ended_only_when_it_runs_wild() -> None:
    assert scratch_need(**LORA | {"model_bytes": 5, "data_bytes": 5}) == ScratchNeed(
        request_gibibytes=2, limit_gibibytes=36
    )


sizes = st.integers(0, 1 << 50)


@given(
    model=sizes,
    data=sizes,
    rank=st.none() | st.integers(1, 512),
    models=st.integers(0, 2),
    is_elsewhere=st.booleans(),
)
def test_the_limit_leaves_much_room_above_the_request(
    model: int, data: int, rank: int | None, models: int, is_elsewhere: bool
) -> None:
    need = scratch_need(
        model_bytes=model, data_bytes=data, rank=rank, models_written=models, model_is_elsewhere=is_elsewhere
    )
    assert need.request_gibibytes >= 1
    assert need.limit_gibibytes >= 3 * (need.request_gibibytes - 1) + 32

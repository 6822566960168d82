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
    "trains_all": False,
    "writes_model": False,
    "nodes": 2,
    "model_is_elsewhere": False,
}


@pytest.mark.parametrize(
    ("changes", "gibibytes"),
    [
        ({}, 1 + 140 + 14 + 2),
        ({"writes_model": True}, 1 + 2 * 140 + 14 + 2),
        ({"merges_adapter": True}, 1 + 2 * 140 + 14 + 2),
        ({"merges_adapter": True, "writes_model": True}, 1 + 3 * 140 + 14 + 2),
        ({"model_is_elsewhere": True}, 1 + 14 + 2),
        ({"trains_all": True}, 1 + 2 * 140 + 3 * 140 + 2),
        ({"trains_all": True, "nodes": 4}, 1 + 2 * 140 + 1.5 * 140 + 2),
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


@given(model=sizes, data=sizes, nodes=st.integers(1, 99), flags=st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_the_limit_leaves_much_room_above_the_request(
    model: int, data: int, nodes: int, flags: tuple[bool, bool, bool]
) -> None:
    need = scratch_need(
        model_bytes=model,
        data_bytes=data,
        nodes=nodes,
        trains_all=flags[0],
        writes_model=flags[1],
        model_is_elsewhere=flags[2],
    )
    assert need.request_gibibytes >= 1
    assert need.limit_gibibytes >= 3 * (need.request_gibibytes - 1) + 32

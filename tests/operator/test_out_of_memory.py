"""An attempt that ran out of memory is followed by one with half its micro-batch, at most three times, and is charged
once. A job that a smaller micro-batch can't help ends with advice."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.api.conditions import Reason
from finetune_core.api.status import AttemptsStatus, CurrentAttempt
from finetune_core.contract import Phase
from finetune_core.planning.micro_batch import MicroBatch, micro_batch_of
from finetune_core.planning.training_plan import micro_batch_size, process_share
from finetune_operator.decide.accounting import cause_of, close
from finetune_operator.decide.out_of_memory import HALVINGS_LIMIT, MemoryFailure, rule_on
from finetune_operator.decide.verdict import Verdict

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ADVICE = "set `training.gradientCheckpointing`"
FAILED = MemoryFailure(message="out of memory at step 1", phase=Phase.TRAINING, node="n1")


@given(
    global_batch=st.integers(1, 300),
    processes=st.integers(1, 16),
    requested=st.none() | st.integers(1, 70),
    fitting=st.integers(0, 70),
    most_retries=st.integers(0, 2),
)
def test_a_job_finds_the_micro_batch_that_fits_or_ends(
    global_batch: int, processes: int, requested: int | None, fitting: int, most_retries: int
) -> None:
    """Memory is enough for ``fitting`` examples at once. The attempts are counted as the operator counts them."""
    planned = micro_batch_size(requested, global_batch_size=global_batch, processes=processes)
    share = process_share(global_batch, processes)
    attempts, halvings, verdicts = AttemptsStatus(), 0, list[str]()
    while True:
        used = micro_batch_of(planned, halvings=halvings, share=share)
        assert used.size * used.accumulation_steps >= share > used.size * (used.accumulation_steps - 1)
        if used.size <= fitting:
            break
        left = most_retries - attempts.charged
        ruling = rule_on(FAILED, planned=planned, halvings=halvings, share=share, retries_left=left, advice=ADVICE)
        current = CurrentAttempt(number=halvings + 1, start_time=NOW + timedelta(minutes=halvings))
        attempts = close(attempts, current, cause_of(ruling, NOW), [], NOW)
        verdicts.append(attempts.recent[-1].verdict)
        assert (ruling.reason, ruling.node) == (Reason.OUT_OF_MEMORY, "n1")
        if ruling.verdict is Verdict.PERMANENT:
            assert ADVICE in ruling.message
            break
        assert attempts.charged <= most_retries, "another attempt follows, as the message says"
        assert micro_batch_of(planned, halvings=halvings + 1, share=share).size == used.size // 2
        halvings += 1
    assert halvings <= HALVINGS_LIMIT
    halvings_allowed = HALVINGS_LIMIT if most_retries else 0
    fits = max(1, min(planned, share) >> halvings_allowed) <= fitting
    assert (Verdict.PERMANENT not in verdicts) == fits
    assert attempts.charged == (halvings > 0), "the search is charged once"
    assert attempts.free == max(0, halvings - 1)


@pytest.mark.parametrize(
    ("planned", "halvings", "size", "steps"),
    [(8, 0, 8, 2), (8, 1, 4, 4), (8, 3, 1, 16), (5, 1, 2, 8), (64, 0, 16, 1), (64, 1, 8, 2)],
)
def test_half_the_examples_are_computed_in_twice_the_steps(planned: int, halvings: int, size: int, steps: int) -> None:
    assert micro_batch_of(planned, halvings=halvings, share=16) == MicroBatch(size=size, accumulation_steps=steps)


def test_the_status_says_what_the_next_attempt_does() -> None:
    ruling = rule_on(FAILED, planned=8, halvings=1, share=8, retries_left=0, advice=ADVICE)
    assert ruling.verdict is Verdict.FREE
    assert ruling.message == (
        "the next attempt has a micro-batch of 2 instead of 4, gradient accumulation of 4, and the same updates (halved"
        " 2 of at most 3 times): out of memory at step 1"
    )


@pytest.mark.parametrize(
    ("failure", "planned", "halvings", "why"),
    [
        (FAILED, 1, 0, "the micro-batch has one example, so it can't be halved"),
        (FAILED, 4, 2, "the micro-batch has one example, so it can't be halved"),
        (FAILED, 64, 3, "the micro-batch was halved 3 times, to 8"),
        (
            MemoryFailure(message=FAILED.message, phase=Phase.TRAINING, in_node_memory=True),
            8,
            0,
            "the memory of a pod that computes on GPUs does not depend on the micro-batch",
        ),
        *(
            (
                MemoryFailure(message=FAILED.message, phase=phase),
                8,
                0,
                f"the memory of phase {phase} does not depend on the micro-batch",
            )
            for phase in (Phase.LOADING, Phase.GENERATING, Phase.SAVING, Phase.EXPORTING)
        ),
    ],
)
def test_a_job_that_no_smaller_micro_batch_helps_ends_with_advice(
    failure: MemoryFailure, planned: int, halvings: int, why: str
) -> None:
    ruling = rule_on(failure, planned=planned, halvings=halvings, share=64, retries_left=3, advice=ADVICE)
    assert ruling.verdict is Verdict.PERMANENT
    assert ruling.message == f"{why}; {ADVICE}; out of memory at step 1"


def test_a_job_that_may_not_be_retried_ends_with_advice_and_not_with_a_promise() -> None:
    ruling = rule_on(FAILED, planned=8, halvings=0, share=8, retries_left=0, advice=ADVICE)
    assert ruling.verdict is Verdict.PERMANENT
    assert ruling.message == f"{ADVICE}; out of memory at step 1"


@pytest.mark.parametrize("phase", ["", Phase.TRAINING, Phase.EVALUATING])
def test_phases_whose_memory_depends_on_the_micro_batch_get_another_attempt(phase: str) -> None:
    failure = MemoryFailure(message="out of memory", phase=phase)
    assert rule_on(failure, planned=2, halvings=0, share=2, retries_left=1, advice="").verdict is Verdict.CHARGED

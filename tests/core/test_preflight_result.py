"""The result of a preflight check fits into a termination message. A shortened result still contains the decisive
finding. A message of another program is never parsed as a result."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune_core.api.resources import MOST_CPUS, MOST_MEMORY
from finetune_core.api.status import ADVICE_LENGTH
from finetune_core.contract import RESULT_LIMIT_BYTES, EvaluationRecord, Outcome, Result, ScoreRecord
from finetune_core.contract.contract_model import LARGEST_NUMBER
from finetune_core.contract.preflight_result import (
    FINDING_LIMIT,
    Finding,
    FindingKind,
    FoundRun,
    InputSizes,
    PlannedChoices,
    PlannedNeeds,
    PreflightResult,
    ordered,
)
from finetune_core.names import attempt_name, preflight_name
from finetune_core.task_declaration import SCORE_LIMIT
from finetune_core.tasks import TASKS

FINAL, OUTSIDE = FindingKind.FINAL, FindingKind.OUTSIDE
SCORE_NAMES = sorted({score.name for task in TASKS.values() for score in task.scores})[:SCORE_LIMIT]
findings = st.builds(
    Finding, kind=st.sampled_from(FindingKind), message=st.text(st.characters(codec="utf-8"), max_size=FINDING_LIMIT)
)


score = ScoreRecord(perplexity=1.23456789, scores=dict.fromkeys(SCORE_NAMES, 0.123456789), graded=1000)
scored = EvaluationRecord(rows="Test", examples=1000, base=score, tuned=score, tuned_step=100)
artifacts = st.fixed_dictionaries(
    {
        "run": st.integers(1, 999_999),
        "bytes": st.integers(0, LARGEST_NUMBER),
        "manifest_sha256": st.just("f" * 64),
        "outcome": st.sampled_from([Outcome.COMPLETED, Outcome.EARLY_STOPPED]),
    }
)
runs = st.fixed_dictionaries(
    {
        "run_id": st.from_regex(r"[a-zA-Z0-9][-_.a-zA-Z0-9]{0,61}[a-zA-Z0-9]", fullmatch=True),
        "uid": st.from_regex("[-A-Za-z0-9]{0,64}", fullmatch=True),
        "time": st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC)),
        "step": st.integers(0, LARGEST_NUMBER),
        "artifact": st.none() | artifacts,
        "evaluation": st.sampled_from([None, scored]),
    }
).map(FoundRun.model_validate)


choices = PlannedChoices(zero_stage=None, offload_optimizer=False, gradient_checkpointing=False, micro_batch_size=65536)


@given(
    run=runs,
    found=st.lists(findings, max_size=3),
    notices=st.lists(st.text(max_size=600), max_size=4),
    advice=st.text(st.characters(codec="utf-8"), max_size=ADVICE_LENGTH),
)
@example(
    run=FoundRun(run_id="r" * 63, uid="u" * 64, time=datetime(2026, 1, 1, tzinfo=UTC), step=LARGEST_NUMBER),
    found=[],
    notices=[],
    advice="\0" * ADVICE_LENGTH,
)
def test_a_run_that_was_found_always_fits_whatever_else_is_told(
    run: FoundRun, found: list[Finding], notices: list[str], advice: str
) -> None:
    sizes = InputSizes(model_bytes=LARGEST_NUMBER, data_bytes=LARGEST_NUMBER)
    planned = PlannedNeeds(
        gpu_memory_bytes=LARGEST_NUMBER, memory_bytes=MOST_MEMORY, cpus=MOST_CPUS, choices=choices, advice=advice
    )
    result = PreflightResult(findings=ordered(found), notices=notices, found=run, sizes=sizes, planned=planned)
    text = result.to_termination_message()
    assert len(text.encode()) <= RESULT_LIMIT_BYTES
    read = PreflightResult.from_termination_message(text)
    assert read is not None
    assert read.planned in (planned, planned.model_copy(update={"advice": ""}))
    assert read.found is not None
    assert read.found.model_copy(update={"evaluation": None}) == run.model_copy(update={"evaluation": None})


@given(found=st.lists(findings, max_size=6), notices=st.lists(st.text(max_size=600), max_size=4))
def test_whatever_is_found_fits_and_keeps_the_exit_code(found: list[Finding], notices: list[str]) -> None:
    result = PreflightResult(findings=ordered(found), notices=notices)
    text = result.to_termination_message()
    assert len(text.encode()) <= RESULT_LIMIT_BYTES
    read = PreflightResult.from_termination_message(text)
    assert read is not None
    assert read.exit_code == result.exit_code
    if found:
        first = read.findings[0].message.removesuffix("…")
        assert result.findings[0].message.startswith(first)


@pytest.mark.parametrize(("kinds", "code"), [([], 0), ([OUTSIDE], 75), ([OUTSIDE, FINAL], 64), ([FINAL], 64)])
def test_what_is_final_decides(kinds: list[FindingKind], code: int) -> None:
    found = [Finding(kind=kind, message=f"field {number}: {kind}") for number, kind in enumerate(kinds)]
    result = PreflightResult(findings=ordered(found))
    assert result.exit_code == code
    assert ("Outside" in result.sentence) == (kinds == [OUTSIDE])


def test_the_same_sentence_is_said_once() -> None:
    found = [Finding(kind=OUTSIDE, message="a"), Finding(kind=FINAL, message="b"), Finding(kind=OUTSIDE, message="a")]
    assert [finding.message for finding in ordered(found)] == ["b", "a"]


def test_no_other_programs_message_passes_for_a_result() -> None:
    other = Result(outcome=Outcome.COMPLETED).to_termination_message()
    assert PreflightResult.from_termination_message(other) is None
    assert PreflightResult.from_termination_message("{}") is None
    assert PreflightResult.from_termination_message("usage: python") is None


def test_its_objects_have_names_of_their_own() -> None:
    names = {preflight_name("job", "uid", number) for number in (1, 2, 10)}
    assert len(names) == 3
    assert names.isdisjoint(attempt_name("job", "uid", number) for number in range(1, 1000))
    assert preflight_name("job", "uid", 1) != preflight_name("job", "another uid", 1)
    assert len(preflight_name("j" * 40, "uid", 999)) <= 63

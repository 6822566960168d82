"""What `finetune compare` says of runs: their figures, and what they say about the claims of the study."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune_cli.compare.claims.findings import Comparison, Finding, Verdict
from finetune_cli.compare.claims.study import CLAIMS, findings_of
from finetune_cli.compare.compared_run import ComparedRun, JobFacts, read_run
from finetune_cli.compare.figures import difference_between, explosion_of, figures_of, gain_of, points_of
from finetune_cli.compare.folders import LocalFolder
from finetune_cli.compare.settings import differences
from finetune_cli.compare.stored_files import Step
from tests.cli.written_runs import Made, write_rolled_back, write_run

LORA = Made()
FULL = Made(method="Full", rate=5e-6, tuned=0.83, seconds=1.4, memory=12_000_000_000, artifact_bytes=900_000, seed=1)
UNFINISHED = Made(finished=False)
LONG_PROMPT = {"dataset": {"format": {"promptCompletion": {"template": "Describe the game in one line: {prompt}\n"}}}}
TOKENS = {"model": {"addedTokens": ["<START_Q>", "<END_Q>", "<START_A>", "<END_A>"]}}
EXPLODED = dataclasses.replace(LORA, explodes_at=100)


def change(made: Made, **changes: object) -> Made:
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


CASES: Sequence[tuple[int, Verdict, Sequence[Made]]] = (
    (1, Verdict.SEEN, [LORA]),
    (1, Verdict.NOT_SEEN, [change(LORA, tuned=0.2)]),
    (1, Verdict.NOT_TESTED, [UNFINISHED]),
    (2, Verdict.SEEN, [LORA, FULL]),
    (2, Verdict.NOT_SEEN, [LORA, change(FULL, settings={"optimization": {"warmupSteps": 50}})]),
    (2, Verdict.NOT_TESTED, [LORA, LORA]),
    (3, Verdict.SEEN, [EXPLODED, change(LORA, rate=3e-5)]),
    (3, Verdict.NOT_SEEN, [LORA, change(LORA, rate=3e-5)]),
    (3, Verdict.NOT_SEEN, [EXPLODED, change(EXPLODED, rate=3e-5)]),
    (3, Verdict.NOT_TESTED, [EXPLODED]),
    (3, Verdict.NOT_TESTED, [change(LORA, rate=1e-3)]),
    (4, Verdict.SEEN, [FULL]),
    (4, Verdict.NOT_SEEN, [change(FULL, explodes_at=100)]),
    (4, Verdict.NOT_TESTED, [LORA]),
    (5, Verdict.SEEN, [change(FULL, peak=1.5)]),
    (5, Verdict.NOT_SEEN, [FULL]),
    (5, Verdict.NOT_TESTED, [change(FULL, steps=50)]),
    (6, Verdict.SEEN, [LORA]),
    (6, Verdict.NOT_SEEN, [change(LORA, overfit=0.0)]),
    (6, Verdict.NOT_TESTED, [UNFINISHED]),
    (7, Verdict.SEEN, [EXPLODED]),
    (7, Verdict.NOT_SEEN, [LORA]),
    (7, Verdict.NOT_TESTED, [change(LORA, rate=3e-5)]),
    (8, Verdict.SEEN, [EXPLODED, change(LORA, settings=LONG_PROMPT)]),
    (8, Verdict.NOT_SEEN, [LORA, change(EXPLODED, settings=LONG_PROMPT)]),
    (8, Verdict.NOT_TESTED, [LORA, change(LORA, settings=LONG_PROMPT | {"optimization": {"seed": 1}})]),
    (9, Verdict.SEEN, [change(LORA, settings=TOKENS, artifact_file="new_embeddings.safetensors")]),
    (9, Verdict.NOT_SEEN, [change(LORA, settings=TOKENS)]),
    (9, Verdict.NOT_TESTED, [LORA]),
    (10, Verdict.SEEN, [LORA, FULL]),
    (10, Verdict.NOT_SEEN, [LORA, change(FULL, artifact_bytes=80_000)]),
    (10, Verdict.NOT_TESTED, [LORA, change(FULL, finished=False)]),
    (11, Verdict.SEEN, [LORA, FULL]),
    (11, Verdict.NOT_SEEN, [LORA, change(FULL, seconds=1.0)]),
    (11, Verdict.NOT_TESTED, [LORA, change(FULL, processes=4)]),
    (12, Verdict.SEEN, [LORA, FULL]),
    (12, Verdict.NOT_SEEN, [LORA, change(FULL, memory=LORA.memory)]),
    (12, Verdict.NOT_TESTED, [FULL]),
    (13, Verdict.SEEN, [LORA, change(FULL, seconds=1.0, floor=0.25)]),
    (13, Verdict.NOT_SEEN, [LORA, change(FULL, floor=1.5)]),
    (13, Verdict.NOT_TESTED, [LORA]),
    (14, Verdict.SEEN, [LORA, FULL]),
    (14, Verdict.NOT_SEEN, [LORA, change(FULL, tuned=0.5)]),
    (14, Verdict.NOT_SEEN, [change(LORA, tuned=0.5), FULL]),
    (14, Verdict.NOT_TESTED, [LORA, change(FULL, finished=False)]),
)


def read(folder: Path, made: Sequence[Made]) -> list[ComparedRun]:
    """Write runs and read them again."""
    return [
        read_run(LocalFolder(write_run(folder / str(index), one)), f"run {index}") for index, one in enumerate(made)
    ]


def finding(number: int, runs: Sequence[ComparedRun]) -> Finding:
    return next(found for claim, found in findings_of(Comparison.of(runs)) if claim.number == number)


def test_every_claim_of_the_table_has_a_section_and_each_verdict_a_case() -> None:
    assert [claim.number for claim in CLAIMS] == list(range(1, 15))
    assert {(number, verdict) for number, verdict, _ in CASES} == {
        (claim.number, verdict) for claim in CLAIMS for verdict in Verdict
    }


@pytest.mark.parametrize(("number", "verdict", "made"), CASES)
def test_a_claim_is_judged_by_the_runs(number: int, verdict: Verdict, made: Sequence[Made], tmp_path: Path) -> None:
    found = finding(number, read(tmp_path, made))
    assert found.verdict is verdict
    assert found.evidence or verdict is Verdict.NOT_TESTED
    assert found.to_test or verdict is not Verdict.NOT_TESTED


def test_evidence_has_the_figures(tmp_path: Path) -> None:
    runs = read(tmp_path, [LORA, FULL])
    (speed,) = finding(11, runs).evidence
    assert "run 0: 2,400 tokens per second, run 1: 1,714, which is +40%" in speed
    (score,) = finding(14, runs).evidence
    assert "ViGGO: run 0 80.0%, run 1 83.0%, a lead of full fine-tuning of +3.0 points" in score
    assert "paired over 200 rows" in score
    assert "GSM8K, SQL" in finding(1, runs).to_test


def test_runs_on_other_rows_are_no_pair(tmp_path: Path) -> None:
    lora, full = read(tmp_path, [LORA, FULL])
    other = dataclasses.replace(full, inputs={**full.inputs, "dataset.train": "another digest"})
    assert finding(10, [lora, other]).verdict is Verdict.NOT_TESTED


def test_runs_of_different_tasks_are_not_compared_by_their_scores(tmp_path: Path) -> None:
    lora, full = read(tmp_path, [LORA, FULL])
    other = dataclasses.replace(full, task=None, task_name="SQL")
    assert difference_between(lora, other) is None
    assert finding(14, [lora, other]).verdict is Verdict.NOT_TESTED


def test_grades_of_the_same_rows_are_paired_and_others_are_not(tmp_path: Path) -> None:
    lora, full = read(tmp_path, [LORA, FULL])
    paired = difference_between(lora, full)
    assert paired is not None
    assert (paired.paired, paired.rows) == (True, 200)
    assert full.scores is not None
    renamed = {f"other-{row}": value for row, value in full.scores.tuned_grades.items()}
    other = dataclasses.replace(full, scores=dataclasses.replace(full.scores, tuned_grades=renamed))
    unpaired = difference_between(lora, other)
    assert unpaired is not None
    assert not unpaired.paired
    assert unpaired.interval.value == pytest.approx(paired.interval.value)
    assert unpaired.interval.low < paired.interval.low
    gain = gain_of(lora)
    assert gain is not None
    assert gain.paired
    assert gain.interval.value == pytest.approx(0.6)


def test_an_own_grader_is_named_and_a_score_that_is_no_mean_is_not_paired(tmp_path: Path) -> None:
    own = {"dataset": {"task": {"name": None, "entryPoint": "my-grader"}}}
    (run,) = read(tmp_path, [change(LORA, settings=own)])
    assert (run.task, run.task_name) == (None, "my-grader")
    assert run.scores is not None
    assert run.scores.tuned is not None
    assert gain_of(run) is not None
    median = run.scores.tuned.model_copy(update={"task_score": 1.7})
    assert gain_of(dataclasses.replace(run, scores=dataclasses.replace(run.scores, tuned=median))) is None


def test_figures_are_those_of_the_step_log(tmp_path: Path) -> None:
    (run,) = read(tmp_path, [change(LORA, steps=101)])
    figures = figures_of(run, price=2.0)
    seconds = 101 * 1.0 + 0.5
    assert (figures.steps, figures.tokens) == (101, 101 * 2400)
    assert figures.tokens_per_second == pytest.approx(2400)
    assert figures.hours == pytest.approx(seconds / 3600)
    assert figures.gpu_hours == pytest.approx(2 * seconds / 3600)
    assert figures.cost == pytest.approx(4 * seconds / 3600)
    assert (figures.memory_bytes, figures.mfu, figures.counted_by_operator) == (LORA.memory, None, False)


def test_lost_steps_cost_gpu_hours_and_no_training_time(tmp_path: Path) -> None:
    run = read_run(LocalFolder(write_rolled_back(tmp_path / "run", change(LORA, steps=200))), "run")
    figures = figures_of(run, price=None)
    assert figures.discarded_steps == 70
    assert figures.gpu_hours is not None
    assert figures.gpu_hours > 2 * (figures.hours + 69 / 3600)
    assert figures.cost is None


def test_gpu_hours_of_a_job_are_those_of_the_operator(tmp_path: Path) -> None:
    (run,) = read(tmp_path, [change(LORA, settings={"world": {"device": "GPU"}})])
    facts = JobFacts(state="Completed", gpu_seconds=7200, incidents=(), settings=None)
    figures = figures_of(dataclasses.replace(run, job=facts), price=3.0)
    assert (figures.gpu_hours, figures.counted_by_operator, figures.cost) == (2.0, True, 6.0)


def test_tokens_and_hours_of_the_curves_grow_and_left_out_steps_have_no_tokens(tmp_path: Path) -> None:
    run = read_run(LocalFolder(write_rolled_back(tmp_path / "run", change(LORA, steps=200))), "run")
    points = list(points_of(run))
    assert points[-1].tokens == (200 - 14) * 2400
    assert all(before.hours <= after.hours for before, after in itertools.pairwise(points))


def steps_with(losses: Sequence[float | None]) -> list[Step]:
    """Return steps with these losses."""
    return [
        Step(1, number, loss, 1e-4, 1.0, loss is not None, 10, 10, 1.0, 0.0, None, 0, None, None)
        for number, loss in enumerate(losses, 1)
    ]


@pytest.mark.parametrize(
    ("losses", "exploded"),
    [
        ([1.0] * 60 + [2.5] * 20, True),
        ([1.0] * 60 + [2.5] * 2 + [1.0] * 40, False),
        ([0.001] * 60 + [0.05] * 20, False),
        ([3.0 - index / 40 for index in range(100)], False),
        ([1.0] * 20 + [5.0] * 8, False),
        ([1.0] * 60 + [None] * 20, False),
        ([], False),
    ],
)
def test_a_loss_explodes_where_it_stays_far_above_its_lowest_level(
    losses: Sequence[float | None], exploded: bool
) -> None:
    found = explosion_of(steps_with(losses))
    assert (found is not None) is exploded
    if found is not None:
        assert (found.before, found.level) == (1.0, 2.5)


def test_settings_that_differ_are_found_and_machines_come_last(tmp_path: Path) -> None:
    runs = read(tmp_path, [LORA, change(LORA, rate=3e-5, processes=4)])
    assert [(row.path, row.values, row.defines_training) for row in differences(runs)] == [
        ("optimization.learningRate", ("0.0001", "3e-05"), True),
        ("world.nodes", ("2", "4"), False),
    ]
    assert differences(runs[:1]) == []

"""Scores equal those of plain transformers for every batch size, number of ranks and ZeRO stage.

The best checkpoint is chosen by these scores, and real runs of two ranks report them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune_cli.compare.compared_run import Tuning, read_run
from finetune_cli.compare.figures import gain_of
from finetune_cli.compare.folders import LocalFolder
from finetune_core.contract import (
    ArtifactRecord,
    CheckpointRecord,
    EvaluationConfig,
    EvaluationRecord,
    GenerationConfig,
    Outcome,
    Result,
    ScoreRecord,
)
from finetune_trainer.decisions.selection import Selection, best_first, selection_after
from finetune_trainer.evaluation import scorer
from finetune_trainer.evaluation.comparison import ungraded_text
from finetune_trainer.evaluation.graders import Grade
from finetune_trainer.finish import told_of_run
from finetune_trainer.pod.errors import StopAgreed
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.storage.evaluation_file import EvaluationFile
from finetune_trainer.storage.step_log import StepRow
from tests.trainer import tiny
from tests.trainer.gangs import step_rows, train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config
from tests.trainer.zygote import ends_of, zygote

pytestmark = pytest.mark.gang

NEW_TOKENS, CONTEXT = 12, 18
"""The longest answer in tokens, and the longest text that the model reads. The longest prompts of `texts` leave less
room than the longest answer needs."""


@pytest.fixture(scope="module")
def wild_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny model whose weights are so large that not all prompts get the same answer, and return its folder."""
    folder = tmp_path_factory.mktemp("wild")
    torch.manual_seed(11)
    config = AutoConfig.from_pretrained(tiny_model, initializer_range=0.4, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def unused_tokens(model: Path) -> list[int]:
    """Return the ids of 20 tokens that no text of the test contains."""
    used = {token for ids, _ in texts(model, 7) for token in ids}
    return [token for token in range(4, 64) if token not in used][:20]


def texts(model: Path, count: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = []
    for row in tiny.rows(count, seed=3):
        prompt = tokenizer(tiny.TEMPLATE.replace("{prompt}", row["question"]))["input_ids"]
        ids = [*prompt, *tokenizer(row["reply"])["input_ids"], tokenizer.eos_token_id]
        made.append((ids, [(len(prompt), len(ids))]))
    return made


def scored_by_ranks(model: Path, folder: Path, world: int, *, stages: list[int], sizes: list[int]) -> list[Any]:
    """Run `score_many` on ``world`` ranks. Return for each stage and size the scores that rank 0 wrote, and the answers
    of all ranks together. Assert that all ranks have the same perplexity."""
    files = []
    for rank in range(world):
        asked = {
            "model": str(model),
            "scratch": str(folder),
            "examples": texts(model, 7),
            "stages": stages,
            "sizes": sizes,
            "newTokens": NEW_TOKENS,
            "context": CONTEXT,
            "suffix": "w3 w4",
            "suppressed": unused_tokens(model),
            "out": str(folder / f"found-{world}-{rank}.json"),
        }
        files.append(folder / f"asked-{world}-{rank}.json")
        files[-1].write_text(json.dumps(asked))
    (folder / str(world)).mkdir()
    ranks = zygote().start_ranks("tests.trainer.score_many", [[str(file)] for file in files], folder / str(world))
    assert ends_of(ranks, 240) == [0] * world, (folder / str(world) / "rank-0.log").read_text()
    found = [json.loads((folder / f"found-{world}-{rank}.json").read_text()) for rank in range(world)]
    for case, *others in zip(*found, strict=True):
        for other in others:
            assert ("cut" in other) == ("cut" in case)
            assert other["perplexity"] == case["perplexity"]
            case["answers"] |= other["answers"]
    return list(found[0])


def plain_scores(model: Path) -> dict[str, Any]:
    """Return the expected scores and answers, computed by transformers alone with one text at a time."""
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    suppressed = unused_tokens(model)
    sums, counts = [0.0, 0.0, 0.0], [0, 0, 0]
    answers = {}
    for number, (ids, [(first, _)]) in enumerate(texts(model, 7)):
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0, :-1].double()
        without = logits.clone()
        without[:, suppressed] = float("-inf")
        wanted = torch.tensor(ids[1:])
        keep = torch.tensor([place >= first for place in range(1, len(ids))])
        for kind, (scores, chosen) in enumerate([(logits, keep), (logits, keep | True), (without, keep)]):
            nll = -scores.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            sums[kind] += float(nll[chosen].sum())
            counts[kind] += int(chosen.sum())
        text, new = list(ids[:first]), list[int]()
        while len(new) < min(NEW_TOKENS, CONTEXT - first):
            with torch.no_grad():
                scores = plain(torch.tensor([[*text, *new]])).logits[0, -1]
            scores[suppressed] = float("-inf")
            token = int(scores.argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
        answers[str(number)] = tokenizer.decode(new).split("w3 w4")[0]
    means = [math.exp(total / count) for total, count in zip(sums, counts, strict=True)]
    return {"perplexity": means[0], "all": means[1], "hidden": means[2], "answers": answers}


def test_trap_6_and_24_no_score_depends_on_batch_size_ranks_or_stage(wild_model: Path, tmp_path: Path) -> None:
    """Covers trap 6, a perplexity that is a mean of the batches' means, and trap 24, padding that changes generated
    answers."""
    torch.set_num_threads(1)
    plain = plain_scores(wild_model)
    found = scored_by_ranks(wild_model, tmp_path, 1, stages=[1], sizes=[1, 2, 8, 32])
    found += scored_by_ranks(wild_model, tmp_path, 2, stages=[2, 3], sizes=[1, 8])
    assert len(found) == 8
    assert len(set(plain["answers"].values())) > 1
    rooms = {CONTEXT - first for _, [(first, _)] in texts(wild_model, 7)}
    assert min(rooms) < NEW_TOKENS < max(rooms), "some prompts leave less room than the longest answer needs"
    for case in found:
        where = (case["stage"], case["size"])
        # The logarithms (losses in nats) are compared, because exp would enlarge the rounding errors of the losses: the
        # perplexity is in the thousands.
        assert math.log(case["perplexity"]) == pytest.approx(math.log(plain["perplexity"]), rel=1e-6), where
        assert math.log(case["all"]) == pytest.approx(math.log(plain["all"]), rel=1e-6), where
        assert case["answers"] == plain["answers"], where
        assert case["notes"] > 2 * case["collectives"], "each token is progress, not only each batch of answers"
        # `hidden` is the perplexity when some unused tokens are excluded. The other tokens then have higher
        # probabilities, so this perplexity is lower.
        assert math.log(case["hidden"]) == pytest.approx(math.log(plain["hidden"]), rel=1e-6), where
        assert case["hidden"] < case["perplexity"]
    # Rank 0 was told to stop during its first batch of answers. These answers are cut off, and no rank may count them.
    stops = [case["cut"] for case in found if "cut" in case]
    assert len(stops) == 2
    for (cut,) in stops:
        assert any(answer != plain["answers"][number] for number, answer in cut.items())


def test_after_a_stop_no_rank_grades_on_while_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop comes while the second answer of five is graded. Answers and rows are made up, because only the order of
    the calls matters."""
    graded: list[str] = []

    def answers(*_: object) -> Iterator[dict[int, str]]:
        yield {number: f"answer {number}" for number in range(5)}
        raise StopAgreed

    def grade(text: str, _: object) -> Grade:
        graded.append(text)
        return Grade(scores={"exact": 1.0})

    class Rows(list[Any]):
        rows = (SimpleNamespace(fields={}, number=1),) * 5

    monkeypatch.setattr(scorer, "generate_answers", answers)
    config = EvaluationConfig(artifact_from="Last", generation=GenerationConfig(batch_size=5))
    gang: Any = SimpleNamespace(stop_requested=lambda: len(graded) == 2, note_progress=lambda: None)
    task = SimpleNamespace(main="exact")
    grading: Any = SimpleNamespace(grade=grade, columns_read=frozenset(), task=task)
    evaluation_set: Any = SimpleNamespace(
        tokenizer=None, stop_ids=[], suffix="", added_ids=[], answered=0, one_line=False, examples=Rows()
    )
    unused: Any = None
    made = scorer.Scorer(unused, gang, unused, config, grading, batch_size=5, context=128, phase=lambda _: None)
    with pytest.raises(StopAgreed):
        made.task_scores(evaluation_set)
    assert graded == ["answer 0", "answer 1"]


# ---- which checkpoint is the best ----


def evaluated(*values: float | None, score: bool = False) -> list[StepRow]:
    kind = "task_score" if score else "perplexity"
    return [
        StepRow(step=step, epoch=0, learning_rate=1, tokens=1, seconds=1, **{kind: value})
        for step, value in enumerate(values, start=1)
    ]


@pytest.mark.parametrize(
    ("config", "rows", "best", "step", "evaluations_without_improvement", "exhausted"),
    [
        ({"patience": 2}, evaluated(5.0, 4.0, None, 4.5), 4.0, 2, 1, False),
        ({"patience": 2}, evaluated(5.0, 4.0, 4.5, 4.0), 4.0, 2, 2, True),
        ({"patience": 2, "min_delta": 0.5}, evaluated(5.0, 4.6, 4.4, 4.0), 4.4, 3, 1, False),
        ({"patience": 1, "min_delta": 1.0}, evaluated(5.0, 4.5), 5.0, 1, 1, True),
        ({"patience": 2, "best_by": "TaskScore"}, evaluated(0.1, 0.3, 0.3, score=True), 0.3, 2, 1, False),
        ({"best_by": "TaskScore"}, evaluated(0.0, 0.0, 0.0, score=True), 0.0, 1, 2, False),
    ],
)
def test_patience_and_the_best_follow_from_the_step_log(
    config: dict[str, Any],
    rows: list[StepRow],
    best: float,
    step: int,
    evaluations_without_improvement: int,
    exhausted: bool,
) -> None:
    selection = selection_after(EvaluationConfig(artifact_from="Best", **config), rows)
    assert (selection.best, selection.best_step, selection.evaluations_without_improvement) == (
        best,
        step,
        evaluations_without_improvement,
    )
    assert selection.exhausted is exhausted
    assert Selection.model_validate_json(selection.to_json()) == selection


def record(step: int, perplexity: float | None, task_score: float | None = None) -> CheckpointRecord:
    return CheckpointRecord.model_validate(
        {
            "run": 1,
            "step": step,
            "uri": "",
            "bytes": 1,
            "manifestSha256": "",
            "perplexity": perplexity,
            "taskScore": task_score,
            "time": "2026-11-24T00:00:00Z",
        }
    )


def test_the_best_checkpoint_by_perplexity_and_by_score() -> None:
    records = [record(1, 5.0, 0.5), record(2, 4.0, 0.25), record(3, 4.5, 0.5), record(4, None), record(5, 4.0, 0.25)]
    assert [item.step for item in best_first(records, "Perplexity")] == [2, 5, 3, 1]
    assert [item.step for item in best_first(records, "TaskScore")] == [3, 1, 2, 5]


# ---- training runs on two ranks ----

SUMS = [*tiny.WORDS[:10], "####", *(str(number) for number in range(10)), "because", "so", ":", "Answer"]


@pytest.fixture(scope="module")
def sum_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("sums"), SUMS)


def sum_rows(first: int, last: int) -> list[dict[str, str]]:
    """Return rows like those of GSM8K: an answer is an explanation, `####` and a number."""
    return [
        {"question": f"w{number}", "answer": f"because w{number} so #### {number % 10}"}
        for number in range(first, last)
    ]


def sum_config(store: ObjectStore, name: str, **changes: Any) -> dict[str, Any]:
    config = run_config(
        store,
        name,
        method="Full",
        dataset__task={"name": "GSM8K"},
        optimization__learningRate=5e-3,
        optimization__maxSteps=60,
        optimization__globalBatchSize=5,
        optimization__microBatchSize=2,
        storage__checkpointEverySteps=100,
        evaluation__everySteps=15,
        **changes,
    )
    config["dataset"]["format"]["promptCompletion"]["completionField"] = "answer"
    config["evaluation"]["generation"] = {"maxNewTokens": 10, "batchSize": 3}
    return config


REQUIRED = [{"score": "exact", "atLeast": "0.9"}, {"score": "perplexity", "betterThanBase": True}]


def scores_of(store: ObjectStore, name: str, run: int = 1) -> EvaluationFile:
    return EvaluationFile.model_validate_json(store.read(f"runs/default/{name}/uid-1/evaluation/{run:06d}.json"))


@pytest.fixture(scope="module")
def runs(
    store: ObjectStore, sum_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Result, dict[str, Any]]]:
    """Train several jobs one after the other on two ranks, and return the result and the run file of each run. The keys
    are the names of the jobs, except for two second runs: `resumed` continues the job `cut-off`, and `after-late` the
    job `told-late`."""
    folder = tmp_path_factory.mktemp("evaluated")
    rows = tiny.write_jsonl(folder / "rows.jsonl", sum_rows(0, 10))
    few = tiny.write_jsonl(folder / "few.jsonl", sum_rows(2, 5))
    answers = ["#### 3", "so", "so"]
    odd = [{"question": f"w{place}", "answer": answer} for place, answer in enumerate(answers)]
    mixed = tiny.write_jsonl(folder / "mixed.jsonl", [*sum_rows(0, 3), *odd])
    plain = Inputs(model=sum_model, train=rows, validation=rows)
    configs = {
        "by-score": sum_config(
            store,
            "by-score",
            optimization__zeroStage=3,
            evaluation__bestBy="TaskScore",
            evaluation__artifactFrom="Best",
        ),
        "with-tokens": sum_config(store, "with-tokens", dataset__test={"volume": {"claimName": "d", "path": "few"}}),
        "patience": sum_config(store, "patience", evaluation__patience=2, evaluation__minDelta=100.0),
    }
    tokens = configs["with-tokens"]
    tokens["model"]["addedTokens"] = ["<A>", "</A>"]
    form = tokens["dataset"]["format"]["promptCompletion"]
    form |= {"template": "{prompt}<A>", "completionSuffix": "</A>"}
    tokens["evaluation"]["basePrompt"] = "Answer : {prompt}"
    configs["required"] = sum_config(store, "required", evaluation__require=REQUIRED)
    configs["required"]["optimization"]["maxSteps"] = 2
    configs["required"]["dataset"]["format"]["promptCompletion"]["template"] = "{prompt}"
    cut_off = sum_config(store, "cut-off")
    configs |= {"cut-off": cut_off, "resumed": cut_off}
    cut_off["optimization"]["maxSteps"] = 45
    early, late = sum_config(store, "told-early"), sum_config(store, "told-late")
    for config in (early, late):
        config["optimization"]["maxSteps"] = 4
    configs |= {"told-early": early, "told-late": late, "after-late": late}
    faults: dict[str, dict[str, Any]] = {
        "cut-off": {"kind": "told", "step": 30, "rank": 1},
        "told-early": {"kind": "phase", "phase": "Generating"},
        "told-late": {"kind": "phase", "phase": "Exporting"},
    }
    results = train_all(
        list(configs.values()),
        [
            plain.model_copy(
                update={
                    "test": few if name == "with-tokens" else None,
                    "validation": mixed if name == "required" else rows,
                }
            )
            for name in configs
        ],
        folder,
        credentials=store.credentials,
        faults=[faults.get(name) for name in configs],
    )
    return {name: (result, configs[name]) for name, result in zip(configs, results, strict=True)}


def test_trap_8_answers_of_an_overfit_set_end_by_themselves(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore
) -> None:
    """The model overfits the rows, and so also learns the end token. Each generated answer must therefore end by itself
    and equal the reference answer."""
    for name in ("by-score", "with-tokens"):
        scores = scores_of(store, name)
        assert scores.tuned_answers
        for answer in scores.tuned_answers:
            assert answer.answer == answer.gold["answer"], name


def test_base_and_tuned_model_are_scored_and_the_result_has_both(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore
) -> None:
    result, _ = runs["by-score"]
    assert result.outcome is Outcome.COMPLETED
    evaluation = result.evaluation
    assert evaluation is not None
    assert evaluation == scores_of(store, "by-score").evaluation.rounded()
    assert (evaluation.rows, evaluation.examples) == ("Validation", 10)
    base, tuned = evaluation.base, evaluation.tuned
    assert base is not None
    assert tuned is not None
    assert (base.task_score, tuned.task_score) == (0.0, 1.0)
    assert (base.graded, tuned.graded, tuned.scores) == (10, 10, {"exact": 1.0})
    assert tuned.perplexity < 1.5 < base.perplexity
    assert tuned.all_token_perplexity is not None
    # The loss of prompt tokens is not trained, so the perplexity of all tokens stays higher.
    assert tuned.all_token_perplexity > tuned.perplexity
    assert "100.0% of the answers right (the base model 0.0%)" in result.message
    assert len(result.to_termination_message().encode()) <= 1024
    assert Result.from_termination_message(result.to_termination_message()) == result


def test_the_best_checkpoint_by_score_is_committed_before_the_next_step_and_exported(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore
) -> None:
    result, _ = runs["by-score"]
    rows = {row.step: row for row in step_rows(store, "by-score")}
    shares = {step: row.task_score for step, row in rows.items() if row.perplexity is not None}
    assert list(shares) == [15, 30, 45, 60]
    best = min(step for step, share in shares.items() if share == max(shares.values(), key=lambda value: value or 0))
    evaluation = result.evaluation
    assert evaluation is not None
    chosen = evaluation.tuned_step
    assert chosen is not None
    assert shares[chosen] == shares[best] == 1.0
    folders = {key.split("/")[-2] for key in store.keys("runs/default/by-score/uid-1/checkpoints/")}
    assert f"000001-{chosen:09d}" in folders


def test_the_test_set_and_the_base_prompt_are_used_and_the_base_has_no_added_tokens(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore, sum_model: Path
) -> None:
    result, _ = runs["with-tokens"]
    evaluation = result.evaluation
    assert evaluation is not None
    assert (evaluation.rows, evaluation.examples) == ("Test", 3)
    assert evaluation.base is not None
    assert evaluation.tuned is not None
    assert evaluation.tuned.task_score == 1.0
    tokenizer = AutoTokenizer.from_pretrained(sum_model)
    base = AutoModelForCausalLM.from_pretrained(sum_model, dtype=torch.float32)
    total, count = 0.0, 0
    for row in sum_rows(2, 5):
        prompt = tokenizer(f"Answer : {row['question']}")["input_ids"]
        ids = [*prompt, *tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            scores = base(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        picked = scores.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :]
        total, count = total - float(picked.sum()), count + len(picked)
    assert evaluation.base.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    for answer in scores_of(store, "with-tokens").base_answers:
        assert "<A>" not in answer.answer


def test_grades_of_single_rows_are_stored_by_names_that_do_not_depend_on_the_prompt(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore
) -> None:
    for name in ("by-score", "with-tokens"):
        scores = scores_of(store, name)
        base, tuned = scores.evaluation.base, scores.evaluation.tuned
        assert base is not None
        assert tuned is not None
        assert len(scores.tuned_grades) == tuned.graded
        assert sum(scores.tuned_grades.values()) / tuned.graded == pytest.approx(tuned.task_score)
        # The base model of `with-tokens` reads the rows without the added tokens.
        assert len(scores.base_grades) == base.graded
        assert scores.base_grades.keys() <= scores.tuned_grades.keys()


def test_finetune_compare_reads_what_a_run_wrote(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore, tmp_path: Path
) -> None:
    result, config = runs["by-score"]
    prefix = "runs/default/by-score/uid-1/"
    for key in store.keys(prefix):
        path = tmp_path / key.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(key))
    run = read_run(LocalFolder(tmp_path), "run")
    assert run.notices == ()
    assert (run.tuning, run.processes, run.on_gpu) == (Tuning(config["method"]), config["world"]["nodes"], False)
    assert run.number("optimization.learningRate") == config["optimization"]["learningRate"]
    assert [step.step for step in run.training.steps] == list(range(1, len(run.training.steps) + 1))
    assert run.artifact is not None
    assert result.artifact is not None
    assert (run.artifact.bytes, run.artifact.step) == (result.artifact.bytes, result.artifact.step)
    assert "config.json" in run.artifact.files
    gain = gain_of(run)
    assert gain is not None
    assert gain.paired


def test_patience_stops_early_and_still_makes_an_artifact(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore
) -> None:
    result, _ = runs["patience"]
    assert result.outcome is Outcome.EARLY_STOPPED
    assert result.exit_code == 0
    # The evaluation at step 15 stays the best, so patience ends the run after two more evaluations, at step 45.
    assert step_rows(store, "patience")[-1].step == 45
    assert result.artifact is not None
    # evaluation.artifactFrom is Last, so the artifact is not made from the best step, 15.
    assert result.artifact.step == 45
    assert result.message.endswith("stopped early, because 2 evaluations in a row brought no improvement")
    pointer = json.loads(store.read("runs/default/patience/uid-1/ARTIFACT"))
    assert pointer["outcome"] == "EarlyStopped"


def test_an_artifact_that_another_run_committed_first_keeps_the_scores_of_that_run() -> None:
    ours, theirs = (
        EvaluationRecord(rows="Validation", examples=9, tuned=ScoreRecord(perplexity=value)) for value in (1.5, 9.0)
    )
    artifact = ArtifactRecord(uri="s3://bucket/runs/artifacts/000001", step=5, bytes=1, manifest_sha256="a")
    committed = Result(outcome=Outcome.COMPLETED, message="committed", step=5, artifact=artifact, evaluation=theirs)
    assert told_of_run(committed, 2, "ours", "s3://bucket/c", ours) == committed
    told = told_of_run(committed, 1, "ours", "s3://bucket/c", ours)
    assert (told.message, told.checkpoint, told.evaluation) == ("ours", "s3://bucket/c", ours.rounded())


def test_a_required_score_that_is_not_reached_and_rows_without_a_number_are_told_and_the_artifact_is_committed(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore
) -> None:
    result, _ = runs["required"]
    assert (result.outcome, result.exit_code) == (Outcome.GATE_FAILED, 0)
    assert result.message.startswith("evaluation.require: exact must be at least 0.9 and is ")
    assert "perplexity" not in result.message.partition(";")[0], "after two steps the perplexity is better"
    assert result.artifact is not None
    pointer = json.loads(store.read("runs/default/required/uid-1/ARTIFACT"))
    assert pointer["outcome"] == "Completed", "another job may require less of the same artifact"
    evaluation = scores_of(store, "required").evaluation
    for record in (evaluation.base, evaluation.tuned):
        assert record is not None
        assert (record.graded, record.not_graded) == (4, 2)
        assert record.ungraded == {"the gold row has no number after ####": 2}
    assert evaluation.base is not None
    assert ungraded_text(evaluation.base, "the base model") == (
        "2 of 6 answers of the base model could not be graded: 2 because the gold row has no number after ####"
    )


def test_an_evaluation_that_was_cut_off_is_made_up_for(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore
) -> None:
    """The next run repeats an evaluation that SIGTERM cut off.

    The choice of the best checkpoint must not depend on the moment of the SIGTERM.
    """
    assert runs["cut-off"][0].outcome is Outcome.STOPPED
    assert runs["cut-off"][0].message == "told to stop: the checkpoint of step 30 is committed"
    assert runs["resumed"][0].outcome is Outcome.COMPLETED
    # The job "patience" trains the same steps without an interruption.
    expected = {row.step: row.perplexity for row in step_rows(store, "patience")}
    found = {row.step: row.perplexity for row in step_rows(store, "cut-off") if row.perplexity is not None}
    assert found == {step: expected[step] for step in (15, 30, 45)}
    assert all(value is not None for value in found.values())
    # The second run takes the base model's scores from the evaluation file of the first run.
    first, second = scores_of(store, "cut-off", 1), scores_of(store, "cut-off", 2)
    assert first.evaluation.tuned is None
    assert second.evaluation.base == first.evaluation.base
    assert second.evaluation.tuned is not None


def test_told_to_stop_in_base_scoring_and_in_export(
    runs: dict[str, tuple[Result, dict[str, Any]]], store: ObjectStore
) -> None:
    early, late, after = (runs[name][0] for name in ("told-early", "told-late", "after-late"))
    assert (early.outcome, late.outcome, after.outcome) == (Outcome.STOPPED, Outcome.STOPPED, Outcome.COMPLETED)
    assert early.message == "told to stop: no step was finished yet"
    assert late.message == "told to stop: what was trained is committed"
    assert after.artifact is not None
    assert after.artifact.step == 4
    # The second run trains no step again, but exports the checkpoint that the first run committed.
    assert {key.split("/")[-1][:6] for key in store.keys("runs/default/told-late/uid-1/metrics/")} == {"000001"}

"""Compares base model and tuned model. The base model is scored before training and the tuned model at the end, both on
the same rows. The scores go into `evaluation/<run>.json` of the bucket, into the reports and into the result.

`train.py` calls `ModelComparison` before the first step, and `finish.py` calls it before the artifact is exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune_core.contract import EvaluationRecord, ScoreRecord
from finetune_trainer.evaluation.graders import Grading
from finetune_trainer.evaluation.scorer import Scorer
from finetune_trainer.evaluation.sets import base_model_set, tuned_model_set
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.preparation import TrainingData
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.reporting.progress import Progress
from finetune_trainer.storage.evaluation_file import (
    AnswerRecord,
    EvaluationFile,
    newest_base_evaluation,
    write_evaluation,
)
from finetune_trainer.storage.root import RunRoot


def ungraded_text(record: ScoreRecord, model: str) -> str:
    """Return a sentence about the answers of ``model`` that could not be graded, with the reasons."""
    answers = record.graded + record.not_graded
    reasons = "; ".join(f"{count} because {reason}" for reason, count in record.ungraded.items())
    return f"{record.not_graded} of {answers} answers of {model} could not be graded: {reasons}"


class ModelComparison:
    """Computes and holds the scores of base model and tuned model. The scores are the same on every rank."""

    def __init__(
        self,
        plan: WorkerPlan,
        gang: Gang,
        root: RunRoot,
        data: TrainingData,
        scorer: Scorer,
        run: int,
        progress: Progress | None,
        grading: Grading | None,
    ) -> None:
        """Begin without scores. If the job has neither test nor validation rows, no model will be scored.

        ``grading`` is None where the job has no task. ``run`` is the number of the run whose scores are written to the
        bucket. ``progress`` is None except on rank 0.
        """
        self._gang = gang
        self._root = root
        self._scorer = scorer
        self._run = run
        self._task = plan.config.dataset.task.label if plan.config.dataset.task is not None else None
        self._progress = progress
        one_line = grading is not None and grading.one_line
        self._base_set, self._tuned_set = base_model_set(plan, data, one_line=one_line), tuned_model_set(plan, data)
        self._digests = data.summary.evaluation_sha256
        self._file: EvaluationFile | None = None

    @property
    def evaluation(self) -> EvaluationRecord | None:
        """The scores that are known so far. None before the call of `score_base_model`, and also afterwards if the job
        has neither test nor validation rows."""
        return self._file.evaluation if self._file is not None else None

    def score_base_model(self, *, is_base: bool) -> None:
        """Score the base model, or take the scores that an earlier run of the job wrote for the same rows. All ranks
        must call this together.

        ``is_base`` says whether the ranks hold the untrained base model. If the ranks hold a checkpoint and the bucket
        has no scores of the base model on these rows, the base model stays without scores, and a notice says so.
        """
        if self._base_set is None or self._tuned_set is None:
            return
        rows_sha256 = self._digests[self._tuned_set.rows.lower()]
        found = self._gang.run_on_rank_0(lambda: self._stored_scores(rows_sha256), until_stop=True)
        if found is not None:
            self._take(EvaluationFile.model_validate(found))
            return
        record: ScoreRecord | None = None
        answers: Sequence[AnswerRecord] = ()
        grades: Mapping[str, float] = {}
        if is_base:
            record, answers, grades = self._scorer.score(self._base_set)
            self._notice_ungraded(record, "the base model")
        elif self._progress is not None:
            self._progress.notice(
                f"the base model's score on these {self._tuned_set.rows.lower()} rows is not in the bucket, and this"
                " run began with a checkpoint"
            )
        evaluation = EvaluationRecord(rows=self._base_set.rows, examples=len(self._tuned_set.examples), base=record)
        self._take(
            EvaluationFile(
                rows_sha256=rows_sha256, evaluation=evaluation, base_answers=list(answers), base_grades=grades
            )
        )
        self._write()

    def score_tuned_model(self, step: int) -> None:
        """Score the tuned model, which the ranks hold. It is the checkpoint of step ``step``, and becomes the artifact.
        Nothing happens if the job has neither test nor validation rows. All ranks must call this together."""
        if self._tuned_set is None or self._file is None:
            return
        record, answers, grades = self._scorer.score(self._tuned_set)
        self._notice_ungraded(record, "the tuned model")
        evaluation = self._file.evaluation.model_copy(update={"tuned": record, "tuned_step": step})
        self._take(
            self._file.model_copy(
                update={"evaluation": evaluation, "tuned_answers": list(answers), "tuned_grades": grades}
            )
        )
        self._write()

    def _notice_ungraded(self, record: ScoreRecord, model: str) -> None:
        if record.not_graded and self._progress is not None:
            self._progress.notice(ungraded_text(record, model))

    def _stored_scores(self, rows_sha256: str) -> object:
        found = newest_base_evaluation(self._root, rows_sha256)
        return found.model_dump(mode="json") if found is not None else None

    def _take(self, file: EvaluationFile) -> None:
        self._file = file
        if self._progress is not None:
            self._progress.evaluated(file.evaluation, self._task)

    def _write(self) -> None:
        file = self._file
        assert file is not None
        self._gang.run_on_rank_0(lambda: write_evaluation(self._root, self._run, file), until_stop=True)

"""The two scores that a job is judged by: the base model's before training, and the artifact's at the end.

Both are of the same rows, go into the bucket (`evaluation/<run>.json`), into the reports and into the result.
"""

from __future__ import annotations

from dataclasses import asdict

from finetune_core.contract import EvaluationRecord, ScoreRecord
from finetune_trainer.evaluation.scorer import Sample, Scorer
from finetune_trainer.evaluation.sets import base_questions, tuned_questions
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.preparation import TrainingData
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.reporting.progress import Progress
from finetune_trainer.storage.root import RunRoot
from finetune_trainer.storage.score_file import AnswerRecord, ScoreFile, newest_base, write_scores


class Scores:
    """What is known of both; the same on every rank."""

    def __init__(
        self,
        plan: WorkerPlan,
        gang: Gang,
        root: RunRoot,
        data: TrainingData,
        scorer: Scorer,
        run: int,
        progress: Progress | None,
    ) -> None:
        """Know nothing yet."""
        self._gang = gang
        self._root = root
        self._scorer = scorer
        self._run = run
        self._progress = progress
        self._base, self._tuned = base_questions(plan, data), tuned_questions(plan, data)
        self._file: ScoreFile | None = None

    @property
    def evaluation(self) -> EvaluationRecord | None:
        """Both scores as far as they are known."""
        return self._file.evaluation if self._file is not None else None

    def base(self, *, is_base: bool) -> None:
        """Score the base model, or find what an earlier run of the job wrote; a collective.

        ``is_base``: the model is still the base model.
        """
        if self._base is None or self._tuned is None:
            return
        found = self._gang.run_on_rank_0(self._found, until_stop=True)
        if found is not None:
            self._know(ScoreFile.model_validate(found))
            return
        record: ScoreRecord | None = None
        if is_base:
            record = self._scorer.score(self._base)
        elif self._progress is not None:
            self._progress.notice("the base model's score is not in the bucket, and this run began with a checkpoint")
        evaluation = EvaluationRecord(rows=self._base.rows, examples=len(self._tuned.examples), base=record)
        self._know(ScoreFile(evaluation=evaluation, base_answers=_answers(self._scorer.samples)))
        self._write()

    def tuned(self, step: int) -> None:
        """Score the model as it is now, the one that is exported; a collective."""
        if self._tuned is None or self._file is None:
            return
        self._scorer.samples = []
        record = self._scorer.score(self._tuned)
        evaluation = self._file.evaluation.model_copy(update={"tuned": record, "tuned_step": step})
        answers = _answers(self._scorer.samples)
        self._know(self._file.model_copy(update={"evaluation": evaluation, "tuned_answers": answers}))
        self._write()

    def _found(self) -> object:
        found = newest_base(self._root)
        return found.model_dump(mode="json") if found is not None else None

    def _know(self, file: ScoreFile) -> None:
        self._file = file
        if self._progress is not None:
            self._progress.evaluated(file.evaluation)

    def _write(self) -> None:
        file = self._file
        assert file is not None
        self._gang.run_on_rank_0(lambda: write_scores(self._root, self._run, file), until_stop=True)


def _answers(samples: list[Sample]) -> list[AnswerRecord]:
    return [AnswerRecord(**asdict(sample)) for sample in samples]

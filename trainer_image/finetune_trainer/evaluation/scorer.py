"""Scores a model on an evaluation set: perplexity of the answers, perplexity of all tokens, and the scores of the task.

The task's grader grades the generated answers, and a score of the task is computed from their grades, mostly as a mean.
The grades of all ranks are joined before a score is computed, so no score depends on batch size or number of ranks.
`loop.py` scores checkpoints with `Scorer`, and `comparison.py` scores base model and tuned model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from finetune_core.contract import EvaluationConfig, Phase, ScoreRecord
from finetune_trainer.data.examples import Example, ExampleSet, example_set
from finetune_trainer.data.files.row import Row
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.evaluation.generation import Decoding, generate_answers
from finetune_trainer.evaluation.graders import Grade, Grading
from finetune_trainer.evaluation.graders.grades import GradeList
from finetune_trainer.evaluation.perplexity import perplexity
from finetune_trainer.evaluation.sets import EvaluationSet
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.storage.evaluation_file import AnswerRecord, stored_row

MOST_STORED_ANSWERS = 20
STORED_ANSWER_LENGTH = 2000
"""A stored answer is cut off after this many characters."""
MOST_STORED_GRADES = 20_000
"""The grades of single rows are stored where there are at most so many of them."""
ROW_NAME_LENGTH = 16


class Scored(NamedTuple):
    """The scores of a model, some of its answers, and its grades."""

    record: ScoreRecord
    answers: Sequence[AnswerRecord]
    """Some answers of this rank."""
    grades: Mapping[str, float]
    """Value of the task's main score for each graded row, by `row_name`. Empty without a task, and where there are more
    than `MOST_STORED_GRADES`."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The scores of a model on an evaluation set for the job's task."""

    main: float | None
    """Value of the task's main score. None if no answer was graded."""
    scores: Mapping[str, float]
    """Value of each score of the task over the graded answers, by the score's name."""
    graded: int
    """Number of graded answers on all ranks together."""
    not_graded: int
    """Number of answers on all ranks together that could not be graded."""
    ungraded: Mapping[str, int]
    """For each reason, the number of answers that could not be graded. The most frequent reasons come first."""
    answers: Sequence[AnswerRecord]
    """The first answers that this rank generated, with their grades. At most `MOST_STORED_ANSWERS`."""
    grades: Mapping[str, float]
    """As in `Scored`."""


class Scorer:
    """Scores the model that the ranks hold. All ranks must call each method together. If a rank has received SIGTERM,
    the method raises StopAgreed before the next batch, or after the last batch of answers."""

    def __init__(
        self,
        engine: TrainingEngine,
        gang: Gang,
        batches: MicroBatcher,
        config: EvaluationConfig,
        grading: Grading | None,
        *,
        batch_size: int,
        context: int,
        phase: Callable[[Phase], None],
    ) -> None:
        """``grading`` is None where the job has no task, so that no answers are generated. ``batches`` makes
        micro-batches of examples. ``batch_size`` is the number of sequences whose loss a rank computes at once.
        ``context`` is the longest text in tokens that the model can read. ``phase`` is called with the new phase when
        evaluating or generating begins.
        """
        self._engine = engine
        self._gang = gang
        self._batches = batches
        self._config = config
        self._grading = grading
        self._batch_size = batch_size
        self._context = context
        self._phase = phase

    def perplexity(self, examples: ExampleSet) -> float:
        """Return the model's perplexity over the supervised tokens of ``examples``."""
        self._phase(Phase.EVALUATING)
        return perplexity(
            self._engine, self._gang, replace(self._batches, examples=examples), batch_size=self._batch_size
        )

    def score(self, evaluation_set: EvaluationSet) -> Scored:
        """Score the model. The scores are the perplexity of the answers, the perplexity of all tokens and, if the job
        has a task, the task's scores."""
        with self._without_tokens(evaluation_set.added_ids):
            answer_tokens = self.perplexity(evaluation_set.examples)
            every_token = self.perplexity(all_tokens(evaluation_set.examples))
            if self._grading is None:
                return Scored(ScoreRecord(perplexity=answer_tokens, all_token_perplexity=every_token), (), {})
            found = self.task_scores(evaluation_set)
        record = ScoreRecord(
            perplexity=answer_tokens,
            all_token_perplexity=every_token,
            task_score=found.main,
            scores=dict(found.scores),
            graded=found.graded,
            not_graded=found.not_graded,
            ungraded=dict(found.ungraded),
        )
        return Scored(record, found.answers, found.grades)

    def task_scores(self, evaluation_set: EvaluationSet) -> TaskScores:
        """Generate answers to the prompts of ``evaluation_set``, grade them, and return the task's scores."""
        grading = self._grading
        assert grading is not None
        self._phase(Phase.GENERATING)
        limits = self._config.generation
        decoding = Decoding(
            tokenizer=evaluation_set.tokenizer,
            stop_ids=evaluation_set.stop_ids,
            suffix=evaluation_set.suffix,
            suppressed=evaluation_set.added_ids,
            batch_size=limits.batch_size,
            max_new_tokens=limits.max_new_tokens,
            context=self._context,
        )
        grades: list[Grade] = []
        stored: list[AnswerRecord] = []
        named: dict[str, float] = {}
        prompts = [
            list(example.ids[: example.prompt_tokens]) for example in evaluation_set.examples[: evaluation_set.answered]
        ]
        for batch in generate_answers(self._engine, self._gang, prompts, decoding):
            for index, answer in batch.items():
                if self._gang.stop_requested():
                    # The next batch raises StopAgreed. Until then the other ranks would wait for this rank.
                    break
                text = answer.strip().split("\n")[0] if evaluation_set.one_line else answer
                row = evaluation_set.examples.rows[index].fields
                grade = grading.grade(text, row)
                self._gang.note_progress()
                grades.append(grade)
                if grade.is_graded and evaluation_set.answered <= MOST_STORED_GRADES:
                    name = row_name(evaluation_set.examples.rows[index], grading.columns_read)
                    named[name] = float(grade.scores[grading.task.main])
                if len(stored) < MOST_STORED_ANSWERS:
                    text = text[:STORED_ANSWER_LENGTH]
                    stored.append(
                        AnswerRecord(answer=text, gold=stored_row(row), scores=grade.scores, problem=grade.problem)
                    )
        own = GradeList.of(grading.task, grades)
        ranks = self._gang.gather(lambda: [own.to_json(), named], until_stop=True)
        total = GradeList.joined(grading.task, [GradeList.from_json(part) for part, _ in ranks])
        reported = total.reported(grading.task)
        return TaskScores(
            main=reported.get(grading.task.main),
            scores=reported,
            graded=total.graded,
            not_graded=total.not_graded,
            ungraded=total.main_reasons,
            answers=stored,
            grades={name: value for _, part in ranks for name, value in part.items()},
        )

    @contextmanager
    def _without_tokens(self, ids: Sequence[int]) -> Iterator[None]:
        """Inside the `with` block, compute losses as if the tokens ``ids`` were not in the vocabulary."""
        self._engine.exclude_tokens(ids)
        try:
            yield
        finally:
            self._engine.exclude_tokens(())


def row_name(row: Row, columns: Collection[str]) -> str:
    """Return a short name for ``row``, by which the grades of two models on the same row are found: a sha256 over the
    number of the row in its file and over the ``columns``, which the grader reads. The name does not depend on the
    prompt, so that jobs with different templates can be compared row by row."""
    values = stored_row({column: row.fields.get(column) for column in sorted(columns)})
    return hashlib.sha256(json.dumps([row.number, values]).encode()).hexdigest()[:ROW_NAME_LENGTH]


def all_tokens(examples: ExampleSet) -> ExampleSet:
    """Return the same examples with every token supervised, prompt and answer, as in the script of Anyscale's study of
    LoRA.

    Unlike in that study, padding tokens are not counted, because with them the perplexity would depend on the batch
    size.
    """
    return example_set([Example(example.ids, [(0, len(example.ids))]) for example in examples])

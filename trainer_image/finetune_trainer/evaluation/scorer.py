"""Scores a model on an evaluation set: perplexity of answer tokens, perplexity of all tokens, and the task's scores.

The task's scores are means over generated answers, each graded by the task's grader. Sums and counts of all ranks are
added up before a mean is taken, so that no figure depends on batch size or number of ranks. `loop.py` scores
checkpoints with `Scorer`, `comparison.py` scores base model and tuned model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from finetune_core.contract import EvaluationConfig, Phase, ScoreRecord
from finetune_core.tasks import TASKS
from finetune_trainer.data.examples import Example, ExampleSet, example_set
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.engine.engine import Engine
from finetune_trainer.evaluation.generation import Decoding, generate_answers
from finetune_trainer.evaluation.graders import Grade, grader_of
from finetune_trainer.evaluation.graders.grades import ScoreSums
from finetune_trainer.evaluation.perplexity import perplexity
from finetune_trainer.evaluation.sets import EvaluationSet
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.storage.evaluation_file import AnswerRecord

MOST_STORED_ANSWERS = 20
STORED_ANSWER_LENGTH = 2000
"""Longest stored answer in characters."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The task's scores of a model on an evaluation set."""

    main: float | None
    """Mean of the task's main score, None where no answer was graded."""
    scores: Mapping[str, float]
    """Mean of every score of the task over the graded answers, by the score's name."""
    graded: int
    """Number of graded answers over all ranks."""
    answers: Sequence[AnswerRecord]
    """The first answers that this rank generated, with their grades, at most `MOST_STORED_ANSWERS`."""


class Scorer:
    """Scores the model of an engine. Every method is a collective and raises StopAgreed between two batches."""

    def __init__(
        self,
        engine: Engine,
        gang: Gang,
        batches: MicroBatcher,
        config: EvaluationConfig,
        task: str,
        *,
        batch_size: int,
        context: int,
        phase: Callable[[Phase], None],
    ) -> None:
        """Take the parts that scoring needs; raises UserError where ``task`` has no grader.

        ``batches``: how examples become tensors. ``task``: value of `dataset.task`. ``batch_size``: sequences whose
        loss is computed at once. ``context``: longest text in tokens that the model reads. ``phase``: called with the
        phase that begins.
        """
        self._engine = engine
        self._gang = gang
        self._batches = batches
        self._config = config
        self._grader = grader_of(task)
        self._task = task
        self._batch_size = batch_size
        self._context = context
        self._phase = phase

    def perplexity(self, examples: ExampleSet) -> float:
        """Return the perplexity over supervised tokens."""
        self._phase(Phase.EVALUATING)
        return perplexity(
            self._engine, self._gang, replace(self._batches, examples=examples), batch_size=self._batch_size
        )

    def score(self, evaluation_set: EvaluationSet) -> tuple[ScoreRecord, Sequence[AnswerRecord]]:
        """Return both perplexities and, if the job has a task, the task's scores with some answers of this rank."""
        with self._without_tokens(evaluation_set.added_ids):
            answer_tokens = self.perplexity(evaluation_set.examples)
            every_token = self.perplexity(all_tokens(evaluation_set.examples))
            if self._grader is None:
                return ScoreRecord(perplexity=answer_tokens, all_token_perplexity=every_token), ()
            found = self.task_scores(evaluation_set)
        record = ScoreRecord(
            perplexity=answer_tokens,
            all_token_perplexity=every_token,
            task_score=found.main,
            scores=dict(found.scores),
            graded=found.graded,
        )
        return record, found.answers

    def task_scores(self, evaluation_set: EvaluationSet) -> TaskScores:
        """Generate an answer to each prompt of ``evaluation_set``, grade the answers, and return the task's scores."""
        task, grader = TASKS[self._task], self._grader
        assert grader is not None
        self._phase(Phase.GENERATING)
        limits = self._config.generation
        asked = len(evaluation_set.examples) if limits.max_examples is None else limits.max_examples
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
        prompts = [list(example.ids[: example.prompt_tokens]) for example in evaluation_set.examples[:asked]]
        for batch in generate_answers(self._engine, self._gang, prompts, decoding):
            for index, answer in batch.items():
                text = answer.strip().split("\n")[0] if evaluation_set.one_line else answer
                row = evaluation_set.examples.rows[index].fields
                grade = grader(text, row)
                grades.append(grade)
                if len(stored) < MOST_STORED_ANSWERS:
                    text = text[:STORED_ANSWER_LENGTH]
                    stored.append(AnswerRecord(answer=text, gold=row, scores=grade.scores, problem=grade.problem))
        own = ScoreSums.of(task, grades)
        total = own.with_vector(self._gang.sum_over_ranks(own.as_vector()))
        means = total.means
        return TaskScores(main=means.get(task.main), scores=means, graded=total.graded, answers=stored)

    @contextmanager
    def _without_tokens(self, ids: Sequence[int]) -> Iterator[None]:
        """Compute without the embedding rows of some tokens inside the block."""
        self._engine.exclude_tokens(ids)
        try:
            yield
        finally:
            self._engine.exclude_tokens(())


def all_tokens(examples: ExampleSet) -> ExampleSet:
    """Return the same texts with every token supervised, prompt and answer, as the script of Anyscale's study did it.

    The study also counted padding tokens. This function has none, because perplexity would depend on the batch size.
    """
    return example_set([Example(example.ids, [(0, len(example.ids))]) for example in examples])

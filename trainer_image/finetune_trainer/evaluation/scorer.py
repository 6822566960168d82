"""How well the model does on a set of rows: perplexity over answer tokens, the study's kind beside it, and the share of
generated answers that the task's grader accepts.

Sums and counts are added up over all ranks before any mean is taken, so nothing depends on batch size or rank count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune_core.contract import EvaluationConfig, Phase, ScoreRecord
from finetune_trainer.data.examples import Example, ExampleSet, example_set
from finetune_trainer.data.micro_batches import MicroBatcher
from finetune_trainer.engine.engine import Engine
from finetune_trainer.evaluation.generation import Decoding, answers
from finetune_trainer.evaluation.graders import TASKS, Grade, Task, summarise
from finetune_trainer.evaluation.perplexity import perplexity
from finetune_trainer.ranks.gang import Gang

MOST_SAMPLES = 20
SAMPLE_LENGTH = 2000


@dataclass(frozen=True)
class Questions:
    """Rows to score a model with, as one of the models reads them."""

    rows: Literal["Validation", "Test"]
    examples: ExampleSet
    tokenizer: Any
    stop_ids: Sequence[int]
    suffix: str
    unknown_ids: Sequence[int] = ()
    """Tokens that the model has only because the job added them: the base model is scored without."""
    one_line: bool = False
    """An answer ends with its line: a base model goes on with the next example where an answer never has two."""


@dataclass(frozen=True)
class Sample:
    """An answer for people to read."""

    answer: str
    gold: Mapping[str, Any]
    scores: Mapping[str, bool]
    problem: str


class Scorer:
    """Scores the model of an engine; every method is a collective and raises StopAgreed at each batch."""

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
        """``batches`` says how examples become tensors, ``batch_size`` how many of them at once."""
        self._engine = engine
        self._gang = gang
        self._batches = batches
        self._config = config
        self._task: Task | None = TASKS.get(task)
        self._batch_size = batch_size
        self._context = context
        self._phase = phase
        self.samples: list[Sample] = []
        """Some answers of the last scoring, on rank 0."""

    @property
    def has_task(self) -> bool:
        """Whether answers are graded."""
        return self._task is not None

    def perplexity(self, examples: ExampleSet) -> float:
        """Return the perplexity over supervised tokens."""
        self._phase(Phase.EVALUATING)
        return perplexity(
            self._engine, self._gang, replace(self._batches, examples=examples), batch_size=self._batch_size
        )

    def score(self, questions: Questions) -> ScoreRecord:
        """Return everything that is known to be asked of a model."""
        with self._without(questions.unknown_ids):
            record = ScoreRecord(
                perplexity=self.perplexity(questions.examples),
                all_token_perplexity=self.perplexity(all_tokens(questions.examples)),
            )
            return record.model_copy(update=self.task_scores(questions)) if self._task is not None else record

    def task_scores(self, questions: Questions) -> dict[str, Any]:
        """Return the fields `task_score`, `scores` and `graded` of a record."""
        task = self._task
        assert task is not None
        self._phase(Phase.GENERATING)
        limits = self._config.generation
        asked = len(questions.examples) if limits.max_examples is None else limits.max_examples
        chosen = questions.examples[:asked]
        decoding = Decoding(
            tokenizer=questions.tokenizer,
            stop_ids=questions.stop_ids,
            suffix=questions.suffix,
            suppressed=questions.unknown_ids,
            batch_size=limits.batch_size,
            max_new_tokens=limits.max_new_tokens,
            context=self._context,
        )
        grades: list[Grade] = []
        samples: list[Sample] = []
        prompts = [list(example.ids[: example.prompt_tokens]) for example in chosen]
        for batch in answers(self._engine, self._gang, prompts, decoding):
            for row, answer in batch.items():
                text = answer.strip().split("\n")[0] if questions.one_line else answer
                gold = questions.examples.rows[row].fields
                grade = task.grade(text, gold)
                grades.append(grade)
                samples.append(Sample(text[:SAMPLE_LENGTH], gold, grade.scores, grade.problem))
        self.samples = samples[:MOST_SAMPLES]
        own = summarise(grades)
        graded, *right = self._gang.sum_over_ranks([own.graded, *(own.right.get(name, 0) for name in task.scores)])
        shares = {name: count / graded for name, count in zip(task.scores, right, strict=True)} if graded else {}
        return {"task_score": shares.get(task.main_score), "scores": shares, "graded": int(graded)}

    @contextmanager
    def _without(self, ids: Sequence[int]) -> Iterator[None]:
        """Compute without the rows of some tokens inside the block."""
        self._engine.exclude_tokens(ids)
        try:
            yield
        finally:
            self._engine.exclude_tokens(())


def all_tokens(examples: ExampleSet) -> ExampleSet:
    """Return the same texts with every token supervised, prompt and answer, as the study's script did it.

    Its padding, which it counted too, is left out: the figure would depend on the batch.
    """
    return example_set([Example(example.ids, [(0, len(example.ids))]) for example in examples])

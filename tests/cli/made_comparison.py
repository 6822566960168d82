"""Comparisons that are made in memory, for the tests of the page: with any texts, and with many long runs."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime

from finetune_cli.compare.answers import AnsweredRow, pairs_of
from finetune_cli.compare.claims.findings import Comparison
from finetune_cli.compare.claims.study import findings_of
from finetune_cli.compare.compared_run import Artifact, ComparedRun, JobFacts, Scores, Tuning
from finetune_cli.compare.page import page
from finetune_cli.compare.stored_files import ModelScores, Step, StoredAnswer, StoredRollback
from finetune_cli.compare.training_history import Training
from finetune_core.tasks import TASKS

MADE = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def page_of(comparison: Comparison, price: float | None = 2.5) -> str:
    """Return the page of ``comparison``."""
    return page(comparison, findings_of(comparison), MADE, price)


def steps_of_a_run(count: int, seed: int) -> tuple[Step, ...]:
    """Return ``count`` steps whose loss falls, evaluated 20 times."""
    source = random.Random(seed)
    found = []
    for step in range(1, count + 1):
        loss = 0.2 + seed / 50 + 2 * math.exp(-5 * step / count) + source.gauss(0, 0.05)
        perplexity = math.exp(loss) if step % max(1, count // 20) == 0 else None
        found.append(
            Step(1, step, loss, 1e-4 / (seed + 1), abs(loss), True, 600, 2400, 1.0, 0.0, 0.4, 10**9, perplexity, None)
        )
    return tuple(found)


def answers_to(sentences: Sequence[str], answers: Sequence[str]) -> tuple[AnsweredRow, ...]:
    """Return rows whose base answer is nothing, and whose tuned answers are ``answers``."""
    return pairs_of(
        [StoredAnswer(answer="", gold={"sentence": text}, scores={"strict": 0}) for text in sentences],
        [
            StoredAnswer(answer=answer, gold={"sentence": text}, scores={"strict": 1})
            for text, answer in zip(sentences, answers, strict=True)
        ],
    )


def made_run(index: int, steps: Sequence[Step] = ()) -> ComparedRun:
    """Return a finished run."""
    task = TASKS["ViGGO"]
    base, tuned = (
        ModelScores(
            perplexity=2.0,
            all_token_perplexity=8.0,
            task_score=share,
            scores=dict.fromkeys(task.score_names, share),
            graded=400,
        )
        for share in (0.2, 0.5 + index / 50)
    )
    lora = index % 2 == 0
    return ComparedRun(
        label=f"run {index}",
        address=f"s3://finetune/runs/team/run-{index}/uid",
        tuning=Tuning.LORA if lora else Tuning.FULL,
        task=task,
        task_name=task.name,
        settings={"method": "LoRA" if lora else "Full", "optimization.learningRate": str(1e-4 / (index + 1))},
        inputs={"model": "m", "dataset.train": "t"},
        training=Training(tuple(steps), (), 0, ()),
        scores=Scores("Test", 400, base, tuned, 100, {}, {}, answers_to(("trail",), ("easy",))),
        artifact=Artifact(40_000 if lora else 900_000, 100, ("adapter_config.json",)),
        checkpoints=2,
        checkpoint_bytes=240_000,
        processes=8,
        on_gpu=True,
        job=None,
        notices=(),
    )


@functools.cache
def large_page() -> str:
    """Return the page of 20 runs of 10,000 steps. It is made once, because that takes seconds."""
    return page_of(Comparison.of(made_run(index, steps_of_a_run(10_000, index)) for index in range(20)))


def run_with_text(text: str, index: int) -> ComparedRun:
    """Return a run that has ``text`` in every place where other people may put a text."""
    run = made_run(index)
    assert run.scores is not None
    scores = ModelScores(perplexity=2.0, scores={text: 0.5}, task_score=0.5, graded=10)
    return ComparedRun(
        label=text,
        address=text,
        tuning=run.tuning,
        task=None,
        task_name=text,
        settings={text: f"{text}{index}", "method": text, "lora.rank": text, "optimization.learningRate": text},
        inputs={"model": text, "dataset.train": text},
        training=Training((), (StoredRollback(step=1, rate_factor=0.3, skip_from=1, skip_to=2, reason=text),), 1, ()),
        scores=Scores(
            text,
            10,
            scores,
            scores,
            1,
            {text: 1.0},
            {text: 0.0},
            pairs_of(
                [StoredAnswer(answer=text, gold={text: text}, problem=text)],
                [StoredAnswer(answer=text, gold={text: text}, scores={text: 1.0})],
            ),
        ),
        artifact=Artifact(1, 1, (text,)),
        checkpoints=1,
        checkpoint_bytes=1,
        processes=1,
        on_gpu=None,
        job=JobFacts(state=text, gpu_seconds=1, incidents=(text,), settings=None),
        notices=(text,),
    )

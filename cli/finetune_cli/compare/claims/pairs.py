"""The claims about two runs: LoRA beside full fine-tuning, and LoRA with one prompt beside another."""

from __future__ import annotations

from itertools import combinations

from finetune_cli.compare.claims.findings import (
    MOST_SENTENCES,
    Comparison,
    FiguredRun,
    Finding,
    Verdict,
    by_pairs,
    percent,
    points,
)
from finetune_cli.compare.compared_run import Tuning
from finetune_cli.compare.figures import difference_between, main_score, perplexity_at
from finetune_cli.compare.settings import changed_paths
from finetune_cli.formatting import size

BOTH_METHODS = (
    "Run two jobs on the same model and rows, one with method LoRA and one with method Full, and compare their folders."
)
METHOD_FIELDS = ("method", "lora", "optimization.learningRate", "storage.artifact")
"""Fields that differ between a LoRA job and a full one that are otherwise the same."""
PROMPT_FIELDS = ("dataset.format", "evaluation.basePrompt", "model.addedTokens")
TEMPLATE = "dataset.format.promptCompletion.template"
SMALL = 10.0
"""A LoRA artifact is tiny where the full model is at least so many times as large."""
FASTER, LIGHTER = 1.1, 0.7
"""LoRA is faster with at least FASTER times the tokens per second, and lighter with at most LIGHTER times the
memory."""
STUDY_HOURS = 1 / 3
"""The study compared the perplexities after 20 minutes."""
COMPARABLE = 0.98
"""LoRA did not converge faster where its perplexity is at least so many times that of full fine-tuning."""
CLOSE = 0.10
"""The largest lead of full fine-tuning, as a share of answers, with which LoRA still is close to it."""


def same_recipe(comparison: Comparison) -> Finding:
    """Claim 2: LoRA and full fine-tuning with the same recipe."""

    def judge(lora: FiguredRun, full: FiguredRun) -> tuple[bool, str] | None:
        if lora.run.settings is None or full.run.settings is None:
            return None
        changed = changed_paths(lora.run.settings, full.run.settings)
        others = sorted(path for path in changed if not _is_below(path, METHOD_FIELDS))
        finished = lora.run.artifact is not None and full.run.artifact is not None
        apart = "differ in nothing but the method and its settings"
        if others:
            apart = f"also differ in {', '.join(others[:5])}{' and more' if len(others) > 5 else ''}"
        ended = "both have an artifact" if finished else "not both have an artifact"
        return not others and finished, f"{lora.label} and {full.label} {apart}; {ended}."

    return by_pairs(comparison, judge, BOTH_METHODS)


def prompts_stabilise(comparison: Comparison) -> Finding:
    """Claim 8: a description of the task in the prompt stabilises LoRA."""
    evidence, held = [], []
    for first, second in combinations(comparison.tuned_by(Tuning.LORA), 2):
        if first.run.settings is None or second.run.settings is None:
            continue
        changed = changed_paths(first.run.settings, second.run.settings)
        if TEMPLATE not in changed or not all(_is_below(path, PROMPT_FIELDS) for path in changed):
            continue
        short, long = sorted((first, second), key=lambda item: len(item.run.setting(TEMPLATE) or ""))
        held.append(short.unstable and not long.unstable)
        evidence.append(
            f"{long.label}, with the longer template, was {long.stability}; {short.label}, with the shorter one, was"
            f" {short.stability}."
        )
    if not held:
        return Finding(
            Verdict.NOT_TESTED,
            to_test="Run the same LoRA job twice: with and without a description of the task in the template.",
        )
    return Finding(Verdict.SEEN if any(held) else Verdict.NOT_SEEN, tuple(evidence[:MOST_SENTENCES]))


def small_artifacts(comparison: Comparison) -> Finding:
    """Claim 10: LoRA's results are tiny."""

    def judge(lora: FiguredRun, full: FiguredRun) -> tuple[bool, str] | None:
        small, large = lora.run.artifact, full.run.artifact
        if small is None or large is None or not small.bytes:
            return None
        ratio = large.bytes / small.bytes
        return ratio >= SMALL, (
            f"{lora.label} has {size(small.bytes)}, {full.label} has {size(large.bytes)}, {ratio:.3g} times as much: 20"
            f" full models take the space of one base model and {19 * ratio:,.0f} adapters."
        )

    return by_pairs(comparison, judge, f"{BOTH_METHODS} Both must end with an artifact.")


def throughput(comparison: Comparison) -> Finding:
    """Claim 11: LoRA trains about 30 % more tokens per second."""

    def judge(lora: FiguredRun, full: FiguredRun) -> tuple[bool, str] | None:
        fast, slow = lora.figures.tokens_per_second, full.figures.tokens_per_second
        if fast is None or not slow or lora.run.processes != full.run.processes:
            return None
        ratio = fast / slow
        return ratio >= FASTER, (
            f"{lora.label}: {fast:,.0f} tokens per second, {full.label}: {slow:,.0f}, which is {ratio - 1:+.0%}; the"
            " study found about +30 %."
        )

    return by_pairs(comparison, judge, f"{BOTH_METHODS} Both need the same number of GPUs.")


def memory(comparison: Comparison) -> Finding:
    """Claim 12: LoRA needs far less memory."""

    def judge(lora: FiguredRun, full: FiguredRun) -> tuple[bool, str] | None:
        small, large = lora.figures.memory_bytes, full.figures.memory_bytes
        if not small or not large:
            return None
        ratio = small / large
        kind = "GPU memory" if lora.run.on_gpu else "memory of the process, in which libraries count too"
        return ratio <= LIGHTER, (
            f"The peak of {lora.label} was {size(small)}, that of {full.label} {size(large)}: {ratio:.0%} ({kind})."
        )

    return by_pairs(comparison, judge, BOTH_METHODS)


def convergence(comparison: Comparison) -> Finding:
    """Claim 13: after the same time both have about the same perplexity, so LoRA converges no faster."""

    def judge(lora: FiguredRun, full: FiguredRun) -> tuple[bool, str] | None:
        ends = [_last_evaluation(item) for item in (lora, full)]
        if None in ends:
            return None
        hours = min(STUDY_HOURS, *(end for end in ends if end is not None))
        first, second = perplexity_at(lora.points, hours), perplexity_at(full.points, hours)
        if first is None or second is None:
            return None
        return first >= second * COMPARABLE, (
            f"After {hours * 60:.3g} minutes {lora.label} had the perplexity {first:.4g}, and {full.label} had"
            f" {second:.4g}."
        )

    return by_pairs(comparison, judge, f"{BOTH_METHODS} Both need validation rows and evaluation.everySteps.")


def _last_evaluation(item: FiguredRun) -> float | None:
    return next((point.hours for point in reversed(item.points) if point.row.perplexity is not None), None)


def close_scores(comparison: Comparison) -> Finding:
    """Claim 14: LoRA comes close to full fine-tuning, which is slightly better, and most so in mathematics."""
    leads: dict[str, float] = {}

    def judge(lora: FiguredRun, full: FiguredRun) -> tuple[bool, str] | None:
        difference = difference_between(lora.run, full.run)
        if difference is None or lora.run.scores is None or full.run.scores is None:
            return None
        first, second = main_score(lora.run, lora.run.scores.tuned), main_score(full.run, full.run.scores.tuned)
        assert first is not None
        assert second is not None
        interval, task = difference.interval, lora.run.task_name or "the task"
        leads[task] = max(leads.get(task, -1.0), interval.value)
        return interval.low <= CLOSE and interval.high >= 0, (
            f"{task}: {lora.label} {percent(first)}, {full.label} {percent(second)}, a lead of full fine-tuning of"
            f" {points(difference)}."
        )

    found = by_pairs(comparison, judge, f"{BOTH_METHODS} Both need dataset.task and test rows.")
    if len(leads) > 1:
        largest = max(leads, key=lambda task: leads[task])
        lead = f"The largest lead of full fine-tuning was in {largest}; in the study it was in mathematics (GSM8K)."
        return Finding(found.verdict, (*found.evidence, lead), found.to_test)
    return found


def _is_below(path: str, fields: tuple[str, ...]) -> bool:
    return any(path == field or path.startswith(f"{field}.") for field in fields)

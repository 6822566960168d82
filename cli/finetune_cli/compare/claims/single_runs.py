"""The claims about runs alone: the tasks, the recipes, memory, the best checkpoint, instability and added tokens."""

from __future__ import annotations

from finetune_cli.compare.claims.findings import (
    MOST_SENTENCES,
    Comparison,
    FiguredRun,
    Finding,
    Verdict,
    has_rate,
    percent,
    points,
)
from finetune_cli.compare.compared_run import ComparedRun, Tuning
from finetune_cli.compare.figures import gain_of, main_score

STUDY_TASKS = ("ViGGO", "GSM8K", "SQL")
LORA_RATE, LOWER_LORA_RATE, FULL_RATE = 1e-4, 3e-5, 5e-6
FULL_RECIPE = {
    "optimization.weightDecay": 0.0,
    "optimization.seed": 42.0,
    "dataset.maxLength": 512.0,
}
"""Settings of the study's full fine-tuning that are numbers, by their paths in the run file."""
FULL_RECIPE_WORDS = {
    "optimization.schedule": "Linear",
    "optimization.precision": "bf16",
    "optimization.gradientCheckpointing": "true",
}
PERPLEXITY_KEPT = 1.05
"""The validation perplexity still looks fine where it is at most so many times as large as before."""
PEAK_RISE = 1.05
"""The memory has a peak at a checkpoint where the step's peak is more than so many times as large as before."""
NEW_ROWS_FILE = "new_embeddings.safetensors"
"""File of an adapter with the rows of the job's added tokens (docs/artifacts.md)."""


def tasks_improve(comparison: Comparison) -> Finding:
    """Claim 1: fine-tuning raises the score of each of the three tasks."""
    evidence, improved, missing = [], [], []
    for task in STUDY_TASKS:
        found = [item for item in comparison.runs if item.run.task_name == task and gain_of(item.run) is not None]
        if not found:
            missing.append(task)
            continue
        gains = [(item, gain) for item in found if (gain := gain_of(item.run)) is not None]
        improved.append(any(gain.interval.low > 0 for _, gain in gains))
        for item, gain in gains:
            evidence.append(f"{task}, {item.label}: {_before_after(item.run)}, {points(gain)}.")
    to_test = f"Run jobs with dataset.task.name {', '.join(missing)} and test rows." if missing else ""
    if not improved:
        return Finding(Verdict.NOT_TESTED, to_test=to_test)
    verdict = Verdict.SEEN if all(improved) else Verdict.NOT_SEEN
    return Finding(verdict, tuple(evidence[:MOST_SENTENCES]), to_test)


def _before_after(run: ComparedRun) -> str:
    assert run.scores is not None
    base, tuned = main_score(run, run.scores.base), main_score(run, run.scores.tuned)
    assert base is not None
    assert tuned is not None
    return f"{percent(base)} before, {percent(tuned)} after"


def lora_recipe(comparison: Comparison) -> Finding:
    """Claim 3: LoRA with rank 8, alpha 16 and rate 1e-4, and 3e-5 where 1e-4 is unstable."""
    to_test = (
        "Run the same LoRA job with lora.rank 8, lora.alpha 16 and training.learningRate 1e-4, and again with 3e-5."
    )
    fitting = [
        item
        for item in comparison.tuned_by(Tuning.LORA)
        if item.run.number("lora.rank") == 8 and item.run.number("lora.alpha") == 16
    ]
    high = [item for item in fitting if has_rate(item, LORA_RATE)]
    low = [item for item in fitting if has_rate(item, LOWER_LORA_RATE)]
    evidence = tuple(f"{item.label} (rate {item.rate:.3g}) was {item.stability}." for item in [*high, *low])
    if not high:
        return Finding(Verdict.NOT_TESTED, evidence, to_test)
    if not any(item.unstable for item in high):
        return Finding(Verdict.NOT_SEEN, (*evidence, "The rate 1e-4 was stable here, so no lower rate was needed."))
    if not low:
        return Finding(Verdict.NOT_TESTED, evidence, "Run the unstable job again with training.learningRate 3e-5.")
    return Finding(Verdict.SEEN if not any(item.unstable for item in low) else Verdict.NOT_SEEN, evidence)


def full_recipe(comparison: Comparison) -> Finding:
    """Claim 4: the recipe of full fine-tuning with rate 5e-6 trains stably and learns."""
    found = [item for item in comparison.tuned_by(Tuning.FULL) if has_rate(item, FULL_RATE)]
    if not found:
        return Finding(Verdict.NOT_TESTED, to_test="Run a job with method Full and training.learningRate 5e-6.")
    evidence, good = [], []
    for item in found:
        first = next((step.loss for step in item.run.training.steps if step.loss is not None), None)
        last = item.figures.last_loss
        learned = first is not None and last is not None and last < first
        good.append(learned and not item.unstable)
        losses = (
            f"loss {first:.4g} at first, {last:.4g} at last" if first is not None and last is not None else "no loss"
        )
        others = _differences_from_recipe(item.run)
        other = f"; other than in the study: {', '.join(others)}" if others else ""
        evidence.append(f"{item.label} was {item.stability}, {losses}{other}.")
    return Finding(Verdict.SEEN if all(good) else Verdict.NOT_SEEN, tuple(evidence[:MOST_SENTENCES]))


def _differences_from_recipe(run: ComparedRun) -> list[str]:
    numbers = [path for path, value in FULL_RECIPE.items() if run.number(path) not in (None, value)]
    words = [path for path, value in FULL_RECIPE_WORDS.items() if run.setting(path) not in (None, value)]
    return [f"{path.rpartition('.')[2]} {run.setting(path)}" for path in [*numbers, *words]]


def memory_at_checkpoints(comparison: Comparison) -> Finding:
    """Claim 5: optimizer state and gradients take about 12 times the model's memory, and memory peaks when a checkpoint
    is saved."""
    evidence, peaks = [], []
    for item in comparison.runs:
        rise = _rise_at_checkpoints(item.run)
        if rise is not None:
            peaks.append(rise > PEAK_RISE)
            evidence.append(
                f"{item.label}: the peak of memory at checkpoints was {rise:.3g} times that of the steps before, which"
                " decides the verdict."
            )
    for item in comparison.tuned_by(Tuning.FULL):
        run = item.run
        if run.checkpoint_bytes and run.artifact is not None and run.artifact.bytes:
            ratio = run.checkpoint_bytes / run.artifact.bytes
            evidence.append(
                f"{item.label}: masters and moments in a checkpoint are {ratio:.1f} times as large as the exported"
                " model; gradients come on top in memory."
            )
    if not peaks:
        return Finding(
            Verdict.NOT_TESTED,
            tuple(evidence[:MOST_SENTENCES]),
            "Run a job with method Full and storage.checkpoint.everySteps below its number of steps.",
        )
    return Finding(Verdict.SEEN if any(peaks) else Verdict.NOT_SEEN, tuple(evidence[:MOST_SENTENCES]))


def _rise_at_checkpoints(run: ComparedRun) -> float | None:
    """Return by which factor the peak of the memory rose, at most, in a step that saved a checkpoint. The log has the
    peak so far, so a step without a new peak has the factor 1. None where no checkpoint was saved after the third step
    of a run, before which the peak rises anyway."""
    found: list[float] = []
    begun = 0
    previous = None
    for step in run.training.steps:
        if previous is None or step.run != previous.run:
            begun = step.step
        elif step.checkpoint_seconds > 0 and step.step >= begun + 3 and previous.memory_peak_bytes > 0:
            found.append(step.memory_peak_bytes / previous.memory_peak_bytes)
        previous = step
    return max(found, default=None)


def best_checkpoint(comparison: Comparison) -> Finding:
    """Claim 6: the best checkpoint is the one with the least validation perplexity."""
    evidence, early = [], []
    for item in comparison.runs:
        figures, scores = item.figures, item.run.scores
        tuned_step = scores.tuned_step if scores is not None else None
        exported = item.run.artifact.step if item.run.artifact is not None else tuned_step
        best, last = figures.best_perplexity, figures.last_perplexity
        if exported is None or best is None or last is None:
            continue
        early.append(best < last)
        evidence.append(
            f"{item.label}: the least perplexity {best:.4g} was at step {figures.best_step}, the last evaluation had"
            f" {last:.4g}, and the model of step {exported} was exported."
        )
    if not early:
        return Finding(Verdict.NOT_TESTED, to_test="Run a job with validation rows and evaluation.everySteps.")
    return Finding(Verdict.SEEN if any(early) else Verdict.NOT_SEEN, tuple(evidence[:MOST_SENTENCES]))


def high_rate_explodes(comparison: Comparison) -> Finding:
    """Claim 7: LoRA at the rate 1e-4 made the training loss explode, while the perplexity still looked fine."""
    found = [
        item
        for item in comparison.tuned_by(Tuning.LORA)
        if item.rate is not None and item.rate >= LORA_RATE * (1 - 1e-9)
    ]
    if not found:
        return Finding(Verdict.NOT_TESTED, to_test="Run a LoRA job with training.learningRate 1e-4 on SQL rows.")
    evidence, held = [], []
    # The unstable runs come first, because they decide.
    for item in sorted(found, key=lambda item: not item.unstable):
        fine = _perplexity_kept(item) if item.unstable else None
        held.append(fine is True)
        looked = {True: "; the perplexity still looked fine", False: "; the perplexity rose too", None: ""}[fine]
        evidence.append(f"{item.label} (rate {item.rate:.3g}) was {item.stability}{looked}.")
    return Finding(Verdict.SEEN if any(held) else Verdict.NOT_SEEN, tuple(evidence[:MOST_SENTENCES]))


def _perplexity_kept(item: FiguredRun) -> bool | None:
    """Return whether the first perplexity after the explosion was about that of the evaluation before it. None where
    the run was not evaluated before and after."""
    explosion = item.figures.explosion
    unfinished = [step.step for step in item.run.training.not_finite]
    step = explosion.step if explosion is not None else min(unfinished, default=None)
    if step is None:
        return None
    scored = [(row.step, row.perplexity) for row in item.run.training.steps if row.perplexity is not None]
    before = [value for at, value in scored if at < step]
    after = [value for at, value in scored if at >= step]
    return after[0] <= before[-1] * PERPLEXITY_KEPT if before and after else None


def added_tokens(comparison: Comparison) -> Finding:
    """Claim 9: the rows of added tokens must be in the checkpoint, and only these."""
    found = [item for item in comparison.runs if item.run.setting("model.addedTokens") not in (None, "[]")]
    finished = [item for item in found if item.run.artifact is not None and item.run.artifact.files]
    if not finished:
        return Finding(
            Verdict.NOT_TESTED,
            to_test="Run a job with model.addedTokens [<START_Q>, <END_Q>, <START_A>, <END_A>] to its end.",
        )
    evidence, held = [], []
    for item in finished:
        artifact = item.run.artifact
        assert artifact is not None
        has_rows = NEW_ROWS_FILE in artifact.files or item.run.tuning is Tuning.FULL
        held.append(has_rows)
        where = f"has the new rows in {NEW_ROWS_FILE}" if NEW_ROWS_FILE in artifact.files else "has no file of new rows"
        if item.run.tuning is Tuning.FULL:
            where = "is a whole model with the new rows"
        evidence.append(f"{item.label}: the artifact of {artifact.bytes / 1e6:.1f} MB {where}.")
    return Finding(Verdict.SEEN if all(held) else Verdict.NOT_SEEN, tuple(evidence[:MOST_SENTENCES]))

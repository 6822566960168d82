"""Parses the files in the folder of a run: run records, step logs, scores, manifests and settings. Pure functions from
bytes to frozen values.

The trainer's `storage/` writes these files. The models here have only the fields that a comparison needs, because a
folder may have been written by another version: unknown fields are ignored, and missing ones are None. Everybody with a
key for the bucket can write any bytes, so no function raises for a malformed file. tests/cli/test_compare_files.py
holds the names of the fields equal to those of the trainer's models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from finetune_core.contract.contract_model import LARGEST_NUMBER

MOST_SETTINGS = 2000
"""Largest number of settings of a run that are compared."""
SETTING_LENGTH = 2000
"""A setting is cut off after this many characters."""


def _finite_or_none(value: Any) -> Any:
    """Return ``value``, or None where it is a number that is not finite or larger than `LARGEST_NUMBER`. Other versions
    write NaN for a missing value."""
    return None if isinstance(value, float) and not abs(value) <= LARGEST_NUMBER else value


Number = Annotated[float, BeforeValidator(_finite_or_none)]
OptionalNumber = Annotated[float | None, BeforeValidator(_finite_or_none)]
Count = Annotated[int, Field(ge=0, le=LARGEST_NUMBER)]


class StoredModel(BaseModel):
    """The base class: keys are camelCase, objects are immutable, unknown fields are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


M = TypeVar("M", bound=StoredModel)


class ParentPoint(StoredModel):
    """The checkpoint that a run resumed from."""

    run: Count
    step: Count


class StoredRollback(StoredModel):
    """A return to an earlier checkpoint after an alarm of the stability monitor."""

    step: Count
    rate_factor: float
    skip_from: Count
    skip_to: Count
    reason: str = ""


class StoredTraining(StoredModel):
    """What identifies the inputs of a run: a sha256 for the base model and for each data source, by the path in the
    spec."""

    inputs: Mapping[str, str] = {}


class StoredRun(StoredModel):
    """The part of `runs/<run>.json` that a comparison needs."""

    attempt: Count = 0
    training: StoredTraining | None = None
    parent: ParentPoint | None = None
    rollbacks: tuple[StoredRollback, ...] = ()


class ModelScores(StoredModel):
    """Scores of the base model or of the tuned model."""

    perplexity: OptionalNumber = None
    all_token_perplexity: OptionalNumber = None
    task_score: OptionalNumber = None
    scores: Mapping[str, Number] = {}
    graded: Count = 0
    not_graded: Count = 0


class StoredEvaluation(StoredModel):
    """The scores of both models on the same rows."""

    rows: str = ""
    examples: Count = 0
    base: ModelScores | None = None
    tuned: ModelScores | None = None
    tuned_step: Count | None = None


class StoredAnswer(StoredModel):
    """A generated answer, the row that it answers, and the grades of the answer."""

    answer: str
    gold: Mapping[str, Any] = {}
    scores: Mapping[str, OptionalNumber] = {}
    problem: str = ""


def _answers(value: Any) -> list[StoredAnswer]:
    """Return the answers in the list ``value``. What is no answer of this version is left out, so that it does not hide
    the scores."""
    found = []
    for item in value if isinstance(value, list) else []:
        with suppress(ValidationError):
            found.append(StoredAnswer.model_validate(item))
    return found


Answers = Annotated[tuple[StoredAnswer, ...], BeforeValidator(_answers)]


class StoredScores(StoredModel):
    """The part of `evaluation/<run>.json` that a comparison needs."""

    evaluation: StoredEvaluation
    base_answers: Answers = ()
    tuned_answers: Answers = ()
    base_grades: Mapping[str, Number] = {}
    """Value of the task's main score for each graded row, by the identity of the row. Empty in files of older
    versions."""
    tuned_grades: Mapping[str, Number] = {}


class StoredFile(StoredModel):
    """A file in a manifest."""

    name: str
    bytes: Count


class StoredManifest(StoredModel):
    """The part of `manifest.json` that a comparison needs."""

    step: Count = 0
    files: tuple[StoredFile, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


class StoredPointer(StoredModel):
    """The part of `ARTIFACT` that a comparison needs."""

    run: Count
    step: Count
    folder: str
    bytes: Count
    outcome: str = ""


class StoredState(StoredModel):
    """The part of a checkpoint's `trainer.json` that a comparison needs."""

    world_size: Count | None = None
    base_sha256: str | None = None


def parse(model: type[M], data: bytes | None) -> M | None:
    """Return ``data`` as a ``model``, or None where it is something else."""
    if data is None:
        return None
    try:
        return model.model_validate_json(data)
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a step log: the figures of one optimizer step. The fields are those of the trainer's `StepRow`."""

    run: int
    """The run that computed the step."""
    step: int
    loss: float | None
    """None where the loss was not finite, and where the step was not trained."""
    learning_rate: float | None
    gradient_norm: float | None
    applied: bool
    tokens: int
    """Supervised tokens; 0 where the step was not trained."""
    real_tokens: int
    seconds: float
    checkpoint_seconds: float
    mfu: float | None
    memory_peak_bytes: int
    perplexity: float | None
    task_score: float | None

    @property
    def is_trained(self) -> bool:
        """Whether the batch was computed. A rollback leaves out batches, whose rows have no tokens."""
        return self.tokens > 0 or self.real_tokens > 0

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient were finite. A step that was not trained counts as finite."""
        return not self.is_trained or (self.loss is not None and self.applied)

    @property
    def all_tokens(self) -> int:
        """Tokens of prompts and answers without padding. Older versions wrote only supervised tokens."""
        return self.real_tokens or self.tokens


STEP_FIELDS = (
    "step",
    "loss",
    "learningRate",
    "gradientNorm",
    "applied",
    "tokens",
    "realTokens",
    "seconds",
    "checkpointSeconds",
    "mfu",
    "memoryPeakBytes",
    "perplexity",
    "taskScore",
)
"""Names of the fields of a line that `steps_of` reads."""


def steps_of(data: bytes, run: int) -> tuple[list[Step], int]:
    """Return the steps in ``data``, a segment of the step log of ``run``, and the number of lines that are no steps,
    for example because the last line was cut off."""
    found, bad = [], 0
    for line in data.splitlines():
        if not line.strip():
            continue
        step = _step(line, run)
        if step is None:
            bad += 1
        else:
            found.append(step)
    return found, bad


def _step(line: bytes, run: int) -> Step | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not 0 < _whole(values.get("step")) <= LARGEST_NUMBER:
        return None
    return Step(
        run=run,
        step=_whole(values.get("step")),
        loss=_number(values.get("loss")),
        learning_rate=_number(values.get("learningRate")),
        gradient_norm=_number(values.get("gradientNorm")),
        applied=values.get("applied") is not False,
        tokens=_whole(values.get("tokens")),
        real_tokens=_whole(values.get("realTokens")),
        seconds=max(0.0, _number(values.get("seconds")) or 0.0),
        checkpoint_seconds=max(0.0, _number(values.get("checkpointSeconds")) or 0.0),
        mfu=_number(values.get("mfu")),
        memory_peak_bytes=_whole(values.get("memoryPeakBytes")),
        perplexity=_number(values.get("perplexity")),
        task_score=_number(values.get("taskScore")),
    )


def _number(value: Any) -> float | None:
    """Return ``value`` as a float, or None where it is no finite number of at most `LARGEST_NUMBER`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -LARGEST_NUMBER <= value <= LARGEST_NUMBER else None


def _whole(value: Any) -> int:
    """Return ``value`` as a whole number from 0 to `LARGEST_NUMBER`, or 0 where it is none."""
    number = _number(value)
    return int(number) if number is not None and number >= 0 else 0


def settings_of(data: bytes | None) -> Mapping[str, str] | None:
    """Return the settings in ``data``, a run file as JSON: the value of each field as text, by the dotted path in
    camelCase. Lists are one text. Return None where ``data`` is no JSON object."""
    if data is None:
        return None
    try:
        values = json.loads(data)
        return dict(_flat("", values)[:MOST_SETTINGS]) if isinstance(values, dict) else None
    except (ValueError, RecursionError):
        return None


def _flat(path: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        below = (_flat(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items())
        return [item for items in below for item in items]
    if value is None:
        return []
    text = value if isinstance(value, str) else json.dumps(value)
    return [(path, _without_password(text)[:SETTING_LENGTH])]


def _without_password(address: str) -> str:
    """Return ``address`` without a user and a password before the host."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*://)[^/@]*@", r"\1", address)

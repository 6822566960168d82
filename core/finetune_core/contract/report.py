"""Reports: the JSON that rank 0 posts to the operator's report server while it trains, and the server's paths and token
audience."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.status import CHECKPOINT_LIMIT, HISTORY_LIMIT, INCIDENT_LIMIT, METRIC_LIMIT, NOTICE_LIMIT
from finetune_core.contract.contract_model import CONTRACT_VERSION, ContractModel
from finetune_core.contract.records import CheckpointName, CheckpointRecord, CurvePoint, EvaluationRecord, Incident
from finetune_core.contract.result import Result

REPORT_LIMIT_BYTES = 65536
"""Largest report in bytes that the report server accepts."""


class Phase(StrEnum):
    """What the trainer is doing."""

    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    GENERATING = "Generating"
    SAVING = "Saving"
    EXPORTING = "Exporting"
    ENDED = "Ended"


class Report(ContractModel):
    """What rank 0 posts every few seconds. A report contains the whole state, so that a lost report loses nothing."""

    version: Literal[1] = CONTRACT_VERSION
    run: Annotated[int, Field(ge=0)]
    """Run number in the bucket. 0 until the trainer has taken a run number."""
    pod_uid: Annotated[str, Field(max_length=64)]
    phase: Phase
    ranks: Annotated[int, Field(ge=1)]
    """Number of ranks that joined. The number is always the world size, because rank 0 reports only after the
    rendezvous."""
    step: Annotated[int, Field(ge=0)]
    total_steps: Annotated[int, Field(ge=0)]
    epoch: Annotated[float, Field(ge=0)]
    eta_seconds: Annotated[int, Field(ge=0)] | None = None
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    """Tokens of prompts and completions (without padding) per second, over all ranks."""
    mfu: Annotated[float, Field(ge=0)] | None = None
    """Model FLOPs utilisation from 0 to 1. None where the device's peak is not known."""
    metrics: Annotated[dict[Annotated[str, Field(max_length=64)], float], Field(max_length=METRIC_LIMIT)]
    """Newest value of each metric: loss, perplexity, learningRate, gradientNorm, and the others that the trainer's
    `reporting/progress.py` adds."""
    resumed_from_step: Annotated[int, Field(ge=0)] = 0
    """Last optimizer step that this run takes over from earlier runs; 0 for a new training. The operator drops the
    earlier runs' points after this step from the curves, because this run computes those steps again."""
    history: Annotated[list[CurvePoint], Field(max_length=HISTORY_LIMIT)]
    checkpoints: Annotated[list[CheckpointRecord], Field(max_length=CHECKPOINT_LIMIT)]
    """All committed checkpoints in the bucket, oldest first."""
    checkpoint_age_seconds: Annotated[int, Field(ge=0)] | None = None
    """Seconds since the newest commit of this run, or since its first step where nothing is committed yet. A lost pod
    would cost this much training."""
    checkpoint_problem: Annotated[str, Field(max_length=512)] = ""
    """Why no checkpoint was committed for longer than the job asks for. Empty when checkpoints are committed in
    time."""
    best: CheckpointName | None = None
    """The best checkpoint by `evaluation.bestBy`, among the checkpoints that this run descends from or has written."""
    notices: Annotated[list[Annotated[str, Field(max_length=512)]], Field(max_length=NOTICE_LIMIT)] = []
    """Sentences for people that are not failures, for example about rows that were skipped."""
    evaluation: EvaluationRecord | None = None
    incidents: Annotated[list[Incident], Field(max_length=INCIDENT_LIMIT)] = []
    """Incidents of the stability monitor, oldest first."""
    result: Result | None = None


def report_audience(job_uid: str) -> str:
    """Return the audience of the projected service-account token. Each job has its own audience, so that a token
    authenticates reports of its own job only."""
    return f"finetune.dev/{job_uid}"


def report_path(namespace: str, name: str, attempt: int) -> str:
    """Return the path of the report server that rank 0 posts to."""
    return f"/v1/namespaces/{namespace}/finetunejobs/{name}/attempts/{attempt}/report"

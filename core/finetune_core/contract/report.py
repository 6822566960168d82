"""Reports: what rank 0 posts to the operator while it trains, and by which address and audience."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.api.status import CHECKPOINT_LIMIT, HISTORY_LIMIT, INCIDENT_LIMIT, METRIC_LIMIT, NOTICE_LIMIT
from finetune_core.contract.contract_model import CONTRACT_VERSION, ContractModel
from finetune_core.contract.records import CheckpointName, CheckpointRecord, CurvePoint, EvaluationRecord, Incident
from finetune_core.contract.result import Result

REPORT_LIMIT_BYTES = 65536


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
    """What rank 0 posts every few seconds: complete in itself, so that a lost report loses nothing."""

    version: Literal[1] = CONTRACT_VERSION
    run: Annotated[int, Field(ge=0)]
    """Run number in the bucket; 0 while it is not taken yet."""
    pod_uid: Annotated[str, Field(max_length=64)]
    phase: Phase
    ranks: Annotated[int, Field(ge=1)]
    """Ranks that joined; all of them, because rank 0 reports only after the rendezvous."""
    step: Annotated[int, Field(ge=0)]
    total_steps: Annotated[int, Field(ge=0)]
    epoch: Annotated[float, Field(ge=0)]
    eta_seconds: Annotated[int, Field(ge=0)] | None = None
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    """Tokens of prompts and answers, no padding, over all ranks."""
    mfu: Annotated[float, Field(ge=0)] | None = None
    """Model FLOPs utilisation; None where the device's peak is not known."""
    metrics: Annotated[dict[Annotated[str, Field(max_length=64)], float], Field(max_length=METRIC_LIMIT)]
    """Newest values: loss, perplexity, learningRate, gradientNorm, and what `training/progress.py` adds."""
    resumed_from_step: Annotated[int, Field(ge=0)] = 0
    """First step of this run minus one: older history beyond it was left behind."""
    history: Annotated[list[CurvePoint], Field(max_length=HISTORY_LIMIT)]
    checkpoints: Annotated[list[CheckpointRecord], Field(max_length=CHECKPOINT_LIMIT)]
    """All committed checkpoints in the bucket, oldest first."""
    checkpoint_age_seconds: Annotated[int, Field(ge=0)] | None = None
    """Age of what would be resumed from now: since the newest commit, or since the run's first step."""
    checkpoint_problem: Annotated[str, Field(max_length=512)] = ""
    """Why that age grows beyond what the job asks for; empty while it does not."""
    best: CheckpointName | None = None
    """The best of them by `evaluation.bestBy`, on the way that led to now."""
    notices: Annotated[list[Annotated[str, Field(max_length=512)]], Field(max_length=NOTICE_LIMIT)] = []
    """Sentences that a person should know: rows skipped, a checkpoint passed over and why."""
    evaluation: EvaluationRecord | None = None
    incidents: Annotated[list[Incident], Field(max_length=INCIDENT_LIMIT)] = []
    """What the stability monitor noticed, oldest first."""
    result: Result | None = None


def report_audience(job_uid: str) -> str:
    """Return the audience of the projected token: one per job, so that a token speaks for its own job only."""
    return f"finetune.dev/{job_uid}"


def report_path(namespace: str, name: str, attempt: int) -> str:
    """Return the path of the report server that rank 0 posts to."""
    return f"/v1/namespaces/{namespace}/finetunejobs/{name}/attempts/{attempt}/report"

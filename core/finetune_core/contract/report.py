"""Reports: the JSON that rank 0 of an attempt posts to the operator's report server every few seconds.

The module also defines the path to which a report is posted, and the audience of the token that authenticates the
report.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Final, Literal

from pydantic import Field

from finetune_core.api.status import CHECKPOINT_LIMIT, HISTORY_LIMIT, INCIDENT_LIMIT, METRIC_LIMIT, NOTICE_LIMIT
from finetune_core.contract.contract_model import CONTRACT_VERSION, ContractModel, Count, PositiveCount
from finetune_core.contract.records import (
    AdapterOrigin,
    CheckpointName,
    CheckpointRecord,
    CurvePoint,
    EvaluationRecord,
    Incident,
)
from finetune_core.contract.result import Phase, Result

REPORT_LIMIT_BYTES = 65536
"""Largest number of bytes of a report that the report server accepts."""


class Report(ContractModel):
    """The message that rank 0 posts to the operator every few seconds. Each report contains the whole state, so that a
    lost report is replaced by the next one."""

    version: Literal[1] = CONTRACT_VERSION
    run: Count
    """Number of the run. 0 until the trainer has taken a run number in the bucket."""
    pod_uid: Annotated[str, Field(max_length=64)]
    phase: Phase
    ranks: PositiveCount
    """Number of ranks that have joined the process group. This number is always the world size, because rank 0 sends
    its first report only after all ranks have joined."""
    step: Count
    total_steps: Count
    epoch: Annotated[float, Field(ge=0)]
    eta_seconds: Count | None = None
    tokens_per_second: Annotated[float, Field(ge=0)] | None = None
    """Recent training speed: tokens of prompts and completions (without padding) per second, summed over all ranks."""
    mfu: Annotated[float, Field(ge=0)] | None = None
    """Model FLOPs utilisation of the newest step that changed the weights, from 0 to 1. None before the first such
    step, and where the FLOPs of the model or the device's peak FLOP/s are not known."""
    attention: Annotated[str, Field(max_length=32)] = ""
    """The kernel that computes attention, for example `SDPA`. Empty until the model is loaded."""
    metrics: Annotated[dict[Annotated[str, Field(max_length=64)], float], Field(max_length=METRIC_LIMIT)]
    """Newest value of each metric: loss, perplexity, learningRate, gradientNorm, and further metrics that the trainer's
    `reporting/progress.py` adds."""
    resumed_from_step: Count = 0
    """Last optimizer step that this run takes over from earlier runs; 0 for a new training. The operator drops the
    earlier runs' points after this step from the curves, because this run computes those steps again."""
    history: Annotated[list[CurvePoint], Field(max_length=HISTORY_LIMIT)]
    checkpoints: Annotated[list[CheckpointRecord], Field(max_length=CHECKPOINT_LIMIT)]
    """The committed checkpoints in the bucket, oldest first. Where there are too many checkpoints for a report, or
    their addresses are too long, only the newest checkpoints are listed."""
    checkpoint_age_seconds: Count | None = None
    """Seconds since the newest commit of a checkpoint of this run. Before the first commit, seconds since the trainer
    prepared to save checkpoints, which it does before the first step. A lost pod would cost the training of this time,
    and also the training that went on while the newest checkpoint was uploaded."""
    checkpoint_problem: Annotated[str, Field(max_length=512)] = ""
    """Why a checkpoint is committed late: its upload fails, or takes longer than the time between two checkpoints.
    Empty where no checkpoint is late. `notices` say that old checkpoints can't be deleted."""
    best: CheckpointName | None = None
    """The best checkpoint by `evaluation.bestBy`, among the checkpoints that led to the current weights. None where no
    checkpoint among them was scored."""
    adapted_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the weights in the model's layers that the LoRA adapters can change. None without adapters, and before
    the trainer has read the model."""
    adapter: AdapterOrigin | None = None
    """The adapter that the run started from. None without one, and before the trainer has read it."""
    notices: Annotated[list[Annotated[str, Field(max_length=512)]], Field(max_length=NOTICE_LIMIT)] = []
    """Sentences for people about things that are not failures, for example that rows were skipped."""
    evaluation: EvaluationRecord | None = None
    incidents: Annotated[list[Incident], Field(max_length=INCIDENT_LIMIT)] = []
    """Incidents of the stability monitor, oldest first."""
    result: Result | None = None

    def to_body(self) -> bytes:
        """Return the report as JSON of at most `REPORT_LIMIT_BYTES`, which the report server accepts.

        As long as the JSON is too long, the oldest items of the longest list are dropped. The newest checkpoints,
        incidents, notices and points of the curve are kept. Where the message of the result is longer than the longest
        list, the end of the message is cut instead.
        """
        report, body = self, self.to_json().encode()
        while len(body) > REPORT_LIMIT_BYTES:
            report = report._shortened(len(body) - REPORT_LIMIT_BYTES)
            body = report.to_json().encode()
        return body

    def _shortened(self, excess: int) -> Report:
        """Return the report without the oldest items of its longest list, or with a shorter message of its result.

        The JSON becomes at least ``excess`` bytes shorter, except in two cases: where the whole list or message has
        fewer bytes, and where the characters of the message take fewer than 6 bytes each. Raises ValueError where
        nothing is left to cut.
        """
        sizes = {name: _sizes(getattr(self, name)) for name in _LISTS}
        longest = max(_LISTS, key=lambda name: sum(sizes[name]))
        if self.result is not None and len(self.result.message.encode()) > sum(sizes[longest]):
            # The number of characters to cut is computed as if each took 6 bytes in JSON, the most that is possible. So
            # hardly more is cut than necessary. Where the characters take fewer bytes, `to_body` calls this again.
            message = self.result.message[: -(excess // 6 + 1)]
            return self.model_copy(update={"result": self.result.model_copy(update={"message": message})})
        dropped = freed = 0
        while freed < excess and dropped < len(sizes[longest]):
            freed += sizes[longest][dropped]
            dropped += 1
        if dropped == 0:
            raise ValueError(f"a report must fit into {REPORT_LIMIT_BYTES} bytes")
        return self.model_copy(update={longest: getattr(self, longest)[dropped:]})


_LISTS: Final = ("checkpoints", "incidents", "notices", "history")
"""The fields of a report that may lose items where the report is too long. Each field is a list with the oldest item
first."""


def _sizes(items: Sequence[ContractModel | str]) -> list[int]:
    """Return, for each item in ``items``, the number of bytes that it takes in JSON."""
    texts = (
        item.to_json() if isinstance(item, ContractModel) else json.dumps(item, ensure_ascii=False) for item in items
    )
    return [len(text.encode()) for text in texts]


def report_audience(job_uid: str) -> str:
    """Return the audience of the service-account token that authenticates reports. Each job has an audience of its own,
    so that the token of one job is not accepted for another job."""
    return f"finetune.dev/{job_uid}"


def report_path(namespace: str, name: str, attempt: int) -> str:
    """Return the URL path to which rank 0 posts its reports on the operator's report server.

    The names are not quoted. Names of jobs and namespaces have no character that needs quoting in a URL, and the server
    accepts no other names.
    """
    return f"/v1/namespaces/{namespace}/finetunejobs/{name}/attempts/{attempt}/report"

"""Reports in the words of Kubeflow Trainer's runtime status, so that code written for it, such as the Trainer class of
transformers, reports into a FineTuneJob without a change.

Its client (KubeflowCallback) tells less than ours, and some of it wrongly: 0 % when it resumes, a remaining time that
counts the steps of earlier runs, no step at its end, and only the metrics of the moment. So its percentage is not
believed where steps are told, its remaining time never; what it does not repeat stays.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_core.contract import CA_FILE, TOKEN_FILE, Phase, Report

ROUTE: Final = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs/{name}/status"
SERVER_URL_VARIABLE: Final = "KUBEFLOW_TRAINER_SERVER_URL"
CA_VARIABLE: Final = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN_VARIABLE: Final = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105  (a variable's name)
METRIC_LIMIT: Final = 32
"""Metrics that a status holds."""
_STEP, _TOTAL, _EPOCH = "current_step", "total_steps", "current_epoch"
_NAMES: Final = {"learning_rate": "learningRate", "grad_norm": "gradientNorm", "eval_loss": "evaluationLoss"}
"""Names of the callback that have one of ours."""


class _Wire(BaseModel):
    """Kubeflow's own API may grow: fields that are unknown here are passed over."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True, allow_inf_nan=False, strict=True)


class Metric(_Wire):
    """A metric as the protocol has it: the value is a text."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    value: Annotated[str, Field(max_length=64)]


class TrainerStatus(_Wire):
    """What the client says."""

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimated_remaining_seconds: Annotated[int, Field(ge=0)] | None = None
    metrics: Annotated[list[Metric], Field(max_length=256)] = []
    last_updated_time: Annotated[datetime, Field(strict=False)]


class RuntimeStatus(_Wire):
    """The body of a report."""

    trainer_status: TrainerStatus


class StockReport(Report):
    """A report that says less than ours: what is None is not known, and what the status has of it stays."""

    reported_step: int | None
    reported_total: int | None
    reported_percentage: int | None


def environment(base_url: str, namespace: str, name: str) -> dict[str, str]:
    """Return the three variables by which Kubeflow's clients find the report server, the CA and the token.

    Our own trainer does not read them, so that nothing is reported twice.
    """
    return {
        SERVER_URL_VARIABLE: base_url + ROUTE.format(namespace=namespace, name=name),
        CA_VARIABLE: CA_FILE,
        TOKEN_VARIABLE: TOKEN_FILE,
    }


def to_report(status: RuntimeStatus, pod_uid: str, ranks: int) -> StockReport:
    """Return the report of an attempt with ``ranks`` training processes.

    Raises ValueError where a number is not finite or a step is no whole number.
    """
    told = status.trainer_status
    numbers = {metric.name: value for metric in told.metrics if (value := _number(metric)) is not None}
    step, total = _count(numbers.pop(_STEP, None)), _count(numbers.pop(_TOTAL, None))
    epoch = numbers.pop(_EPOCH, numbers.pop("epoch", 0.0))
    metrics = {_NAMES.get(name, name): value for name, value in list(numbers.items())[:METRIC_LIMIT]}
    return StockReport(
        run=0,
        pod_uid=pod_uid,
        phase=Phase.TRAINING,
        # Its rank 0 speaks when training begins, which needs every rank.
        ranks=ranks,
        step=step or 0,
        total_steps=total or 0,
        epoch=max(0.0, epoch),
        metrics=metrics,
        history=[],
        checkpoints=[],
        reported_step=step,
        reported_total=total,
        reported_percentage=told.progress_percentage,
    )


def _number(metric: Metric) -> float | None:
    """Return the value as a number; None for a text. A number that is not finite is refused, as in our own reports."""
    try:
        value = float(metric.value)
    except ValueError:
        return None
    if not math.isfinite(value):
        raise ValueError(f"metric {metric.name} must be finite")
    return value


def _count(value: float | None) -> int | None:
    if value is None:
        return None
    if value < 0 or value != int(value):
        raise ValueError("steps must be whole numbers from 0 on")
    return int(value)

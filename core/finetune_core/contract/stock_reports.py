"""Stock reports: reports in the progress protocol that Kubeflow Trainer defines for its TrainJobs. Through this
protocol, training code that knows nothing of this project, such as the Trainer class of transformers, can report the
progress of a FineTuneJob.

The operator sets the environment variables of `client_environment` in every training pod, except those that the user
sets in `podTemplate.env`. `reports/server.py` serves `ROUTE` and parses the body of each request into a `StockReport`.
`status/report_merge.py` merges the `StockReport` into the status.

KubeflowCallback, the client in transformers, reports less than the trainer of this project, and some of its values are
wrong: after a resume it reports 0 % and a remaining time that counts the steps of earlier runs, and at the end it
reports no step. Therefore the operator does not write the client's remaining time into the status, and writes the
client's percentage only where the percentage is 100 or the client has never reported steps. Each report of the client
has only the newest metrics. Values that a report does not contain stay as they are in the status.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_core.api.status import METRIC_LIMIT
from finetune_core.contract import CA_FILE, TOKEN_FILE, Phase, Report

ROUTE: Final = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs/{name}/status"
SERVER_URL_VARIABLE: Final = "KUBEFLOW_TRAINER_SERVER_URL"
CA_VARIABLE: Final = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN_VARIABLE: Final = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105  (a variable's name)
_STEP, _TOTAL, _EPOCH = "current_step", "total_steps", "current_epoch"
_RENAMED_METRICS: Final = {"learning_rate": "learningRate", "grad_norm": "gradientNorm", "eval_loss": "evaluationLoss"}
"""For each metric that KubeflowCallback and this project name differently: the name that KubeflowCallback sends, and
the name in the status of a FineTuneJob."""


class _WireModel(BaseModel):
    """The base class of the protocol's models. Unknown fields are ignored, because later versions of Kubeflow may add
    fields."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True, allow_inf_nan=False, strict=True)


class Metric(_WireModel):
    """A metric as the protocol sends it. ``value`` is a number as text, for example ``"1.25"``."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    value: Annotated[str, Field(max_length=64)]


class TrainerStatus(_WireModel):
    """Progress of the training, as the client sends it."""

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimated_remaining_seconds: Annotated[int, Field(ge=0)] | None = None
    metrics: Annotated[list[Metric], Field(max_length=256)] = []
    last_updated_time: Annotated[datetime, Field(strict=False)]


class RuntimeStatus(_WireModel):
    """The body of a request to `ROUTE`. In Kubeflow the same fields are a part of a TrainJob's status."""

    trainer_status: TrainerStatus


class StockReport(Report):
    """A report in Kubeflow's protocol. A field whose name begins with `reported_` is None where the client did not send
    the value. The value in the status is then not changed."""

    reported_step: int | None
    reported_total: int | None
    """Number of optimizer steps of the whole training."""
    reported_percentage: int | None


def client_environment(base_url: str, namespace: str, name: str) -> dict[str, str]:
    """Return three environment variables for clients of Kubeflow's protocol: the address to which they report, and the
    paths of the files with the CA certificates of the report server and with the token.

    The trainer of this project does not read these variables and posts its own reports, so no progress is reported
    twice.
    """
    return {
        SERVER_URL_VARIABLE: base_url + ROUTE.format(namespace=namespace, name=name),
        CA_VARIABLE: CA_FILE,
        TOKEN_VARIABLE: TOKEN_FILE,
    }


def to_report(status: RuntimeStatus, pod_uid: str, ranks: int) -> StockReport:
    """Return ``status`` as the report of an attempt with ``ranks`` training processes.

    Raises ValueError where a metric is not finite, or a number of steps is negative or not whole.
    """
    trainer = status.trainer_status
    numbers = {metric.name: value for metric in trainer.metrics if (value := _number(metric)) is not None}
    step, total = _count(numbers.pop(_STEP, None)), _count(numbers.pop(_TOTAL, None))
    epoch = numbers.pop(_EPOCH, numbers.pop("epoch", 0.0))
    metrics = {_RENAMED_METRICS.get(name, name): value for name, value in list(numbers.items())[:METRIC_LIMIT]}
    return StockReport(
        run=0,
        pod_uid=pod_uid,
        phase=Phase.TRAINING,
        # The protocol has no field for the number of ranks that have joined. The report counts all ranks as joined,
        # because KubeflowCallback sends its first report when training begins, and training needs all ranks.
        ranks=ranks,
        step=step or 0,
        total_steps=total or 0,
        epoch=max(0.0, epoch),
        metrics=metrics,
        history=[],
        checkpoints=[],
        reported_step=step,
        reported_total=total,
        reported_percentage=trainer.progress_percentage,
    )


def _number(metric: Metric) -> float | None:
    """Return the value of ``metric`` as a number, or None where the value is not a number.

    Raises ValueError where the number is infinite or NaN, because the project's own reports must not contain such
    numbers either.
    """
    try:
        value = float(metric.value)
    except ValueError:
        return None
    if not math.isfinite(value):
        raise ValueError(f"metric {metric.name} must be finite")
    return value


def _count(value: float | None) -> int | None:
    """Return ``value`` as an int, or None where ``value`` is None. Raises ValueError where ``value`` is negative or not
    a whole number."""
    if value is None:
        return None
    if value < 0 or value != int(value):
        raise ValueError("steps must be whole numbers from 0 on")
    return int(value)

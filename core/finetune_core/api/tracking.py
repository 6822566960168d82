"""`tracking`: experiment trackers that get the metrics in addition to the status. This version of the operator refuses
every job with this section (`NOT_YET` in validation/runnable.py)."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_core.api.base import ApiModel, HttpUrl, exactly_one_of
from finetune_core.api.sources import SecretKeyRef


class TensorBoardSpec(ApiModel):
    """TensorBoard event files in the job's folder in the bucket."""


class MLflowSpec(ApiModel):
    """A run on an MLflow tracking server."""

    tracking_uri: HttpUrl
    """Address of the tracking server, for example `https://mlflow.example.com`."""
    experiment: Annotated[str, Field(min_length=1, max_length=250)] | None = None
    """Name of the experiment. Absent: namespace and name of the job."""
    token_secret_ref: SecretKeyRef | None = None
    """Name of a Secret, and the key in it that holds the bearer token for the server."""


class WeightsAndBiasesSpec(ApiModel):
    """A run on Weights & Biases."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    """Name of the project."""
    entity: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """User or team that owns the project. Absent: the default entity of the API key."""
    base_url: HttpUrl | None = None
    """Address of a self-hosted server. Absent: the public service."""
    api_key_secret_ref: SecretKeyRef
    """Name of a Secret, and the key in it that holds the API key."""


class TrackingSpec(ApiModel):
    """Experiment tracker that gets the metrics in addition to the status. Exactly one of the fields must be set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("tensorBoard", "mlflow", "weightsAndBiases"))

    tensor_board: TensorBoardSpec | None = None
    """TensorBoard event files in the job's folder in the bucket."""
    mlflow: MLflowSpec | None = None
    """A run on an MLflow tracking server."""
    weights_and_biases: WeightsAndBiasesSpec | None = None
    """A run on Weights & Biases."""

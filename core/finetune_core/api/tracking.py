"""Where curves go beside the status: `tracking`."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_core.api.base import ApiModel, HttpUrl, exactly_one_of
from finetune_core.api.sources import SecretKeyRef


class TensorBoardSpec(ApiModel):
    """Event files below the run's folder in the bucket."""


class MLflowSpec(ApiModel):
    """A run on an MLflow tracking server."""

    tracking_uri: HttpUrl
    """Address of the server."""
    experiment: Annotated[str, Field(min_length=1, max_length=250)] | None = None
    """Name of the experiment; default: namespace and name of the job."""
    token_secret_ref: SecretKeyRef | None = None
    """Bearer token."""


class WeightsAndBiasesSpec(ApiModel):
    """A run on Weights & Biases."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    """Name of the project."""
    entity: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """User or team; default: that of the key."""
    base_url: HttpUrl | None = None
    """Address of a server of one's own; absent: the public one."""
    api_key_secret_ref: SecretKeyRef
    """API key."""


class TrackingSpec(ApiModel):
    """Where curves go beside the status; its failure never stops training. Exactly one of the members is set."""

    model_config = ConfigDict(json_schema_extra=exactly_one_of("tensorBoard", "mlflow", "weightsAndBiases"))

    tensor_board: TensorBoardSpec | None = None
    """Event files below the run's folder in the bucket."""
    mlflow: MLflowSpec | None = None
    """A run on an MLflow tracking server."""
    weights_and_biases: WeightsAndBiasesSpec | None = None
    """A run on Weights & Biases."""

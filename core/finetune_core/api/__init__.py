"""The `FineTuneJob` resource (`finetune.dev/v1alpha1`) as pydantic models: the CRD is generated from them."""

from finetune_core.api.job import API_VERSION, GROUP, KIND, PLURAL, SHORT_NAME, VERSION, FineTuneJob
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.status import FineTuneJobStatus

__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "PLURAL",
    "SHORT_NAME",
    "VERSION",
    "FineTuneJob",
    "FineTuneJobSpec",
    "FineTuneJobStatus",
]

"""The `FineTuneJob` resource (`finetune.dev/v1alpha1`) as pydantic models.

The CRD (`crds/`) and the API reference (`docs/api.md`) are generated from the models here. Checks that need more than
the schema are in `validation/`, and messages between operator and trainer are in `contract/`.
"""

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

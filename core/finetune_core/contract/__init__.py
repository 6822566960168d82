"""Messages between operator and training pods, and the environment variables and file paths that both use.

The operator writes the run file, and the trainer answers with reports, results and exit codes. The models of the
Kubernetes resource are in `api/`.
"""

from finetune_core.contract.contract_model import CONTRACT_VERSION, RESULT_LIMIT_BYTES, ContractModel
from finetune_core.contract.pod import (
    CA_FILE,
    CREDENTIALS_FOLDER,
    HUB_DATA_TOKENS_FOLDER,
    HUB_TOKEN_FILE,
    IDENTITY_VARIABLES,
    MASTER_ADDR_VARIABLE,
    MASTER_PORT,
    MASTER_PORT_VARIABLE,
    NONCE_FILE,
    RUN_FILE,
    RUN_FOLDER,
    SCRATCH_FOLDER,
    STORAGE_CA_FILE,
    TERMINATION_LOG,
    TOKEN_FILE,
    VOLUMES_FOLDER,
    Identity,
)
from finetune_core.contract.records import (
    ArtifactRecord,
    CheckpointName,
    CheckpointRecord,
    CurvePoint,
    EvaluationRecord,
    Incident,
    ScoreRecord,
)
from finetune_core.contract.report import REPORT_LIMIT_BYTES, Phase, Report, report_audience, report_path
from finetune_core.contract.result import EXIT_CODES, ExitCode, Outcome, Result
from finetune_core.contract.run_file import (
    EvaluationConfig,
    GenerationConfig,
    OptimizationConfig,
    ReportConfig,
    RunConfig,
    StabilityConfig,
    StorageConfig,
    WorldConfig,
)

__all__ = [
    "CA_FILE",
    "CONTRACT_VERSION",
    "CREDENTIALS_FOLDER",
    "EXIT_CODES",
    "HUB_DATA_TOKENS_FOLDER",
    "HUB_TOKEN_FILE",
    "IDENTITY_VARIABLES",
    "MASTER_ADDR_VARIABLE",
    "MASTER_PORT",
    "MASTER_PORT_VARIABLE",
    "NONCE_FILE",
    "REPORT_LIMIT_BYTES",
    "RESULT_LIMIT_BYTES",
    "RUN_FILE",
    "RUN_FOLDER",
    "SCRATCH_FOLDER",
    "STORAGE_CA_FILE",
    "TERMINATION_LOG",
    "TOKEN_FILE",
    "VOLUMES_FOLDER",
    "ArtifactRecord",
    "CheckpointName",
    "CheckpointRecord",
    "ContractModel",
    "CurvePoint",
    "EvaluationConfig",
    "EvaluationRecord",
    "ExitCode",
    "GenerationConfig",
    "Identity",
    "Incident",
    "OptimizationConfig",
    "Outcome",
    "Phase",
    "Report",
    "ReportConfig",
    "Result",
    "RunConfig",
    "ScoreRecord",
    "StabilityConfig",
    "StorageConfig",
    "WorldConfig",
    "report_audience",
    "report_path",
]

"""How an attempt ends: the exit codes of training pods, the outcomes, and the result that each pod writes as its
termination message."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Literal

from finetune_core.contract.contract_model import CONTRACT_VERSION, RESULT_LIMIT_BYTES, Count, TerminationMessage
from finetune_core.contract.records import ArtifactRecord, EvaluationRecord


class ExitCode(IntEnum):
    """Exit codes of PID 1 in a training pod. The operator treats any other exit code as a crash, unless Kubernetes
    names another cause, such as OOMKilled or the deletion of the pod."""

    DONE = 0
    """The training is complete or stopped early, and the artifact is committed, also where the model did not reach a
    score of `evaluation.require`."""
    BAD_INPUT = 64
    DIVERGED = 65
    OUT_OF_MEMORY = 66
    OUTSIDE_FAILURE = 75
    """Something outside of the spec and the data failed or was missing, such as the object store, the Hugging Face Hub,
    the credentials or another rank. The trainer also ends with this code where it made no progress for too long."""
    STOPPED = 143
    """The trainer received SIGTERM and ended. All steps that it had finished are in a committed checkpoint."""


class Outcome(StrEnum):
    """How an attempt ended, as the trainer saw it."""

    COMPLETED = "Completed"
    EARLY_STOPPED = "EarlyStopped"
    GATE_FAILED = "GateFailed"
    """The artifact is committed as after the two outcomes above, but the tuned model did not reach a score of
    `evaluation.require`."""
    BAD_INPUT = "BadInput"
    DIVERGED = "Diverged"
    OUT_OF_MEMORY = "OutOfMemory"
    OUTSIDE_FAILURE = "OutsideFailure"
    STOPPED = "Stopped"
    CRASHED = "Crashed"


EXIT_CODES: Mapping[Outcome, int] = {
    Outcome.COMPLETED: ExitCode.DONE,
    Outcome.EARLY_STOPPED: ExitCode.DONE,
    Outcome.GATE_FAILED: ExitCode.DONE,
    Outcome.BAD_INPUT: ExitCode.BAD_INPUT,
    Outcome.DIVERGED: ExitCode.DIVERGED,
    Outcome.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    Outcome.OUTSIDE_FAILURE: ExitCode.OUTSIDE_FAILURE,
    Outcome.STOPPED: ExitCode.STOPPED,
    Outcome.CRASHED: 1,
}
"""The exit code that belongs to each outcome."""


class Phase(StrEnum):
    """What the trainer is doing."""

    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    GENERATING = "Generating"
    SAVING = "Saving"
    EXPORTING = "Exporting"
    ENDED = "Ended"


class Result(TerminationMessage):
    """How an attempt ended. Each pod writes its result as its termination message, and rank 0 also sends its result in
    the final report."""

    version: Literal[1] = CONTRACT_VERSION
    outcome: Outcome
    message: str = ""
    step: Count = 0
    checkpoint: str | None = None
    artifact: ArtifactRecord | None = None
    evaluation: EvaluationRecord | None = None
    node_fault: bool | None = None
    """True where the trainer ended because a GPU or the driver of its node is broken, so that another node may do the
    same work. None in all other results."""
    phase: Phase | None = None
    """What the trainer did when it ran out of memory. None in all other results, and where nobody knows it. The final
    report does not say it, because its phase is Ended."""

    @property
    def exit_code(self) -> int:
        """Exit code of the pod's PID 1, which follows from the outcome."""
        return int(EXIT_CODES[self.outcome])

    def to_termination_message(self) -> str:
        """Return the result as JSON of at most 1,024 bytes.

        Where the JSON is too long, the message is shortened first. Then the checkpoint's address and the scores are
        left out, because the final report has them too.
        """
        text = self.to_json()
        excess = len(text.encode()) - RESULT_LIMIT_BYTES
        message = self.message
        while excess > 0 and message:
            # A character takes from 1 to 6 bytes in JSON, 6 for example for \u0000. Each round cuts one character for 6
            # bytes of excess, so hardly more than necessary is cut. For a message in ASCII this takes dozens of rounds.
            message = message[: -max(1, excess // 6 + 1)]
            text = self.model_copy(update={"message": message + "…"}).to_json()
            excess = len(text.encode()) - RESULT_LIMIT_BYTES
        for emptied in ({"message": "", "checkpoint": None}, {"message": "", "checkpoint": None, "evaluation": None}):
            if len(text.encode()) > RESULT_LIMIT_BYTES:
                text = self.model_copy(update=emptied).to_json()
        return text

"""How an attempt ends: exit code of every pod, outcome, and the result in its termination message."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_core.contract.contract_model import CONTRACT_VERSION, RESULT_LIMIT_BYTES, TerminationMessage
from finetune_core.contract.records import ArtifactRecord, EvaluationRecord


class ExitCode(IntEnum):
    """Exit codes of the trainer's PID 1; anything else is an unknown crash."""

    DONE = 0
    """Completed or stopped early, artifact committed."""
    BAD_INPUT = 64
    DIVERGED = 65
    OUT_OF_MEMORY = 66
    OUTSIDE_FAILURE = 75
    """Something outside failed for longer than its budget: store, a lost peer, refused credentials, a stall."""
    STOPPED = 143
    """Told to stop, and a checkpoint was committed after the signal."""


class Outcome(StrEnum):
    """What an attempt came to, in the result."""

    COMPLETED = "Completed"
    EARLY_STOPPED = "EarlyStopped"
    BAD_INPUT = "BadInput"
    DIVERGED = "Diverged"
    OUT_OF_MEMORY = "OutOfMemory"
    OUTSIDE_FAILURE = "OutsideFailure"
    STOPPED = "Stopped"
    CRASHED = "Crashed"


EXIT_CODES: Mapping[Outcome, int] = {
    Outcome.COMPLETED: ExitCode.DONE,
    Outcome.EARLY_STOPPED: ExitCode.DONE,
    Outcome.BAD_INPUT: ExitCode.BAD_INPUT,
    Outcome.DIVERGED: ExitCode.DIVERGED,
    Outcome.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    Outcome.OUTSIDE_FAILURE: ExitCode.OUTSIDE_FAILURE,
    Outcome.STOPPED: ExitCode.STOPPED,
    Outcome.CRASHED: 1,
}


class Result(TerminationMessage):
    """How an attempt ended: the termination message of every pod, and part of the final report."""

    version: Literal[1] = CONTRACT_VERSION
    outcome: Outcome
    message: str = ""
    step: Annotated[int, Field(ge=0)] = 0
    checkpoint: str | None = None
    artifact: ArtifactRecord | None = None
    evaluation: EvaluationRecord | None = None

    @property
    def exit_code(self) -> int:
        """The code that PID 1 exits with."""
        return int(EXIT_CODES[self.outcome])

    def to_termination_message(self) -> str:
        """Return the result as JSON of at most 1,024 bytes; the message is shortened first, then the address of the
        checkpoint and the scores are left out: the last report has them.

        Kubelet shares 12 KiB among the termination messages of all containers of a pod.
        """
        text = self.to_json()
        excess = len(text.encode()) - RESULT_LIMIT_BYTES
        message = self.message
        while excess > 0 and message:
            # A character takes at most 6 bytes in JSON (\u0000), at least one: shortening by characters converges.
            message = message[: -max(1, excess // 6 + 1)]
            text = self.model_copy(update={"message": message + "…"}).to_json()
            excess = len(text.encode()) - RESULT_LIMIT_BYTES
        for emptied in ({"message": "", "checkpoint": None}, {"message": "", "checkpoint": None, "evaluation": None}):
            if len(text.encode()) > RESULT_LIMIT_BYTES:
                text = self.model_copy(update=emptied).to_json()
        return text

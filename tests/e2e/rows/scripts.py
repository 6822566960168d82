"""The scripted trainer: an image whose entry point runs the shell script in the environment variable `SCRIPT`. A script
that `says` returns writes a termination message and ends with an exit code as the real trainer does. A job with the
scripted trainer needs no model, and its pods start within seconds."""

from __future__ import annotations

from finetune_core.contract import ArtifactRecord, EvaluationRecord, Outcome, Result
from finetune_core.contract.preflight_result import PREFLIGHT_COMMAND, PreflightResult
from tests.cluster.oci import BUSYBOX, BUSYBOX_COMMANDS, Image
from tests.cluster.until_term import RUNS

COMMANDS = (*BUSYBOX_COMMANDS, "dd")
IMAGE = Image(
    "localhost/scripted-trainer:1",
    {"bin/busybox": BUSYBOX},
    {f"bin/{command}": "busybox" for command in COMMANDS},
    ["/bin/sh", "-c", 'eval "$SCRIPT"'],
    # The command must be the image's entry point, as in the trainer's image, because the operator sets only the
    # arguments of the container.
    is_entry_point=True,
)

NO_PROGRAM = Image(
    "localhost/no-program:1", {"bin/busybox": BUSYBOX}, {}, ["/bin/no-such-program"], is_entry_point=True
)
"""An image whose program does not exist, so that no container runtime can start it."""

FILLS_ITS_MEMORY = "x=x; while :; do x=$x$x; done"


def says(
    outcome: Outcome, message: str = "", *, artifact: bool = False, evaluation: EvaluationRecord | None = None
) -> str:
    """Return a script that writes a result with this outcome as its termination message, and exits with the exit code
    of the outcome. With ``artifact`` the result names a published artifact, and ``evaluation`` holds its scores."""
    record = ArtifactRecord(uri="s3://bucket/artifacts/000001", step=100, bytes=12, manifest_sha256="ab")
    published = record if artifact else None
    result = Result(outcome=outcome, message=message, step=100, artifact=published, evaluation=evaluation)
    return f"echo -n '{result.to_termination_message()}' > /dev/termination-log; exit {result.exit_code}"


DONE = says(Outcome.COMPLETED, artifact=True)
"""Script of a trainer that has completed and published an artifact."""


def at_first(script: str, *, worker: int | None = 1, others: str = RUNS, later: str = DONE) -> str:
    """Return a script that runs ``script`` in attempt 1 and ``later`` in all later attempts.

    In attempt 1 only the pod of ``worker`` runs ``script``, and the other pods run ``others``. If ``worker`` is None,
    every pod runs ``script``.
    """
    mine = "true" if worker is None else f"[ $PET_NODE_RANK = {worker} ]"
    return f"if [ $FTJ_ATTEMPT -gt 1 ]; then {later}; elif {mine}; then {script}; else {others}; fi"


def checked(script: str) -> str:
    """Return a script that reports success in the pod of the preflight check, and runs ``script`` in all other pods."""
    answer = PreflightResult(findings=[])
    passes = f"echo -n '{answer.to_termination_message()}' > /dev/termination-log; exit {answer.exit_code}"
    return f'if [ "$0" = {PREFLIGHT_COMMAND} ]; then {passes}; fi; {script}'

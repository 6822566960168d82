"""The image of a scripted trainer, whose entry point runs the shell script in the environment variable `SCRIPT`. The
scripts end with the trainer's termination messages and exit codes, so that a row needs no model and ends within
seconds."""

from __future__ import annotations

from finetune_core.contract import ArtifactRecord, Outcome, Result
from finetune_core.contract.preflight_result import PREFLIGHT_COMMAND, PreflightResult
from tests.cluster.oci import BUSYBOX, BUSYBOX_COMMANDS, Image

COMMANDS = (*BUSYBOX_COMMANDS, "dd")
IMAGE = Image(
    "localhost/scripted-trainer:1",
    {"bin/busybox": BUSYBOX},
    {f"bin/{command}": "busybox" for command in COMMANDS},
    ["/bin/sh", "-c", 'eval "$SCRIPT"'],
    # The command is the entry point as in the trainer's image, because the operator sets only a container's arguments.
    is_entry_point=True,
)

RUNS = "trap 'exit 143' TERM; while :; do sleep 0.2; done"
"""Run until SIGTERM, then exit with code 143, as a trainer does that has committed its checkpoint."""
FILLS_ITS_MEMORY = "x=x; while :; do x=$x$x; done"


def says(outcome: Outcome, message: str = "", *, artifact: bool = False) -> str:
    """Return the script that writes a result with this outcome as termination message and exits with the outcome's exit
    code."""
    record = ArtifactRecord(uri="s3://bucket/artifacts/000001", step=100, bytes=12, manifest_sha256="ab")
    result = Result(outcome=outcome, message=message, step=100, artifact=record if artifact else None)
    return f"echo -n '{result.to_termination_message()}' > /dev/termination-log; exit {result.exit_code}"


DONE = says(Outcome.COMPLETED, artifact=True)
"""The script of a trainer that completes and has committed an artifact."""


def at_first(script: str, *, worker: int | None = 1, others: str = RUNS, later: str = DONE) -> str:
    """Return a script that runs ``script`` in attempt 1 and ``later`` in later attempts.

    In attempt 1 only the pod of ``worker`` runs ``script``, and the other pods run ``others``. With None every pod runs
    ``script``.
    """
    mine = "true" if worker is None else f"[ $PET_NODE_RANK = {worker} ]"
    return f"if [ $FTJ_ATTEMPT -gt 1 ]; then {later}; elif {mine}; then {script}; else {others}; fi"


def checked(script: str) -> str:
    """Return a script that passes the check before the first attempt, and runs ``script`` in attempts."""
    answer = PreflightResult(findings=[])
    passes = f"echo -n '{answer.to_termination_message()}' > /dev/termination-log; exit {answer.exit_code}"
    return f'if [ "$0" = {PREFLIGHT_COMMAND} ]; then {passes}; fi; {script}'

"""A trainer that does what its job file says: an image whose entry point runs the shell script in the variable
`SCRIPT`. It speaks the contract (termination message, exit codes), so that a row needs no model and no minute.
"""

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
    # As in the trainer's image: the operator sets arguments, never the command.
    is_entry_point=True,
)

RUNS = "trap 'exit 143' TERM; while :; do sleep 0.2; done"
"""Trains until it is told to stop, and says that nothing unsaved is lost."""
FILLS_ITS_MEMORY = "x=x; while :; do x=$x$x; done"


def says(outcome: Outcome, message: str = "", *, artifact: bool = False) -> str:
    """Return the script that ends with this result in the termination message."""
    record = ArtifactRecord(uri="s3://bucket/artifacts/000001", step=100, bytes=12, manifest_sha256="ab")
    result = Result(outcome=outcome, message=message, step=100, artifact=record if artifact else None)
    return f"echo -n '{result.to_termination_message()}' > /dev/termination-log; exit {result.exit_code}"


DONE = says(Outcome.COMPLETED, artifact=True)
"""Completes with a committed artifact."""


def at_first(script: str, *, worker: int | None = 1, others: str = RUNS, later: str = DONE) -> str:
    """Return a script that runs ``script`` in attempt 1 and ``later`` in every other.

    Of the first attempt's pods only ``worker`` runs it (None: every one), the others run ``others``.
    """
    mine = "true" if worker is None else f"[ $PET_NODE_RANK = {worker} ]"
    return f"if [ $FTJ_ATTEMPT -gt 1 ]; then {later}; elif {mine}; then {script}; else {others}; fi"


def checked(script: str) -> str:
    """Return a script that passes the check before the first attempt and runs ``script`` in attempts."""
    answer = PreflightResult(findings=[])
    passes = f"echo -n '{answer.to_termination_message()}' > /dev/termination-log; exit {answer.exit_code}"
    return f'if [ "$0" = {PREFLIGHT_COMMAND} ]; then {passes}; fi; {script}'

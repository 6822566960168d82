"""One training process: `python -m finetune_trainer.worker PLAN LAUNCHER`, started by the process with the id LAUNCHER
with its ranks in the environment. Whatever happens, it leaves `outcome-<rank>.json`.

Signal handlers come before the heavy imports, so that a SIGTERM while torch loads is not lost.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path

from finetune_core.contract import Outcome, Result
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import Diverged, OutOfMemory, OutsideFailure, PeerLost, Stopped
from finetune_trainer.pod.outcomes import Standing, WorkerOutcome, outcome_of, write_outcome
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.pod.settings import PEER_WAIT_SECONDS
from finetune_trainer.pod.signals import StopFlag
from finetune_trainer.ranks.watchdog import Watchdog
from finetune_trainer.reporting.reporter import Reporter

SHARED_BY_ALL = (UserError, OutsideFailure, Diverged, Stopped)
"""What every rank ends with together: rank 0 stays until the others have read why. With anything else the others
wait in a collective, and the sooner this process is gone the sooner they notice."""

PR_SET_PDEATHSIG = 1


def leave_with(launcher: int) -> None:
    """Let the kernel tell this process to stop when its launcher ends, however that happens.

    In a container everything ends with PID 1. Elsewhere a worker whose launcher was killed would train on unseen, and
    hold the devices that the next attempt needs.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != launcher:
        # It ended before it was watched.
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Run the worker and return its exit status."""
    stop = StopFlag()
    leave_with(int(sys.argv[2]))
    plan = WorkerPlan.model_validate_json(Path(sys.argv[1]).read_text())
    standing = Standing()
    try:
        outcome = WorkerOutcome(result=_run(plan, standing, stop))
    except Exception as error:  # noqa: BLE001  (the one place where every error becomes an outcome)
        outcome = outcome_of(error, step=standing.step, checkpoint=standing.checkpoint)
        if outcome.result.outcome is Outcome.CRASHED:
            traceback.print_exc()
    write_outcome(plan.folder, int(os.environ["RANK"]), outcome)
    # Threads of torch and gloo may hang at interpreter exit when a peer is gone: everything is written, so leave.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.result.exit_code)


def _run(plan: WorkerPlan, standing: Standing, stop: StopFlag) -> Result:
    """Join the gang and train; rank 0 also reports, and ends with the final report."""
    from finetune_trainer.ranks import process as environment

    environment.prepare(plan.paths.scratch)
    import torch

    from finetune_trainer.ranks.gang import Gang, first_line, is_peer_failure
    from finetune_trainer.reporting.progress import Progress
    from finetune_trainer.train import train

    device = environment.device(plan.config.world)
    stall_seconds = plan.config.stability.stall_timeout_seconds
    watchdog = Watchdog(plan.folder, int(os.environ["RANK"]), stall_seconds, standing)
    with watchdog.allow(PEER_WAIT_SECONDS):
        # Also when told to stop already: the other ranks wait for this one, and would wait for long.
        gang = Gang(device=device, stop=stop, watchdog=watchdog, stall_seconds=stall_seconds)
    progress = None
    if gang.is_first:
        reporter = Reporter(plan.config.report, plan.paths) if plan.config.report is not None else None
        progress = Progress(pod_uid=plan.identity.pod_uid, ranks=gang.world_size, reporter=reporter)
    try:
        try:
            result = train(plan, gang, progress, standing)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(environment.memory_sentence(error, standing, plan.config)) from error
        except RuntimeError as error:
            if environment.is_host_out_of_memory(error):
                raise OutOfMemory(environment.memory_sentence(error, standing, plan.config)) from error
            if is_peer_failure(error):
                raise PeerLost(f"another rank left: {first_line(error)}") from error
            raise
    except Exception as error:
        if isinstance(error, PeerLost):
            # A stalled rank tells its peers before it ends; their leaving is no cause of its own.
            watchdog.claim_end()
        if progress is not None:
            progress.end(outcome_of(error, step=standing.step, checkpoint=standing.checkpoint).result)
        if isinstance(error, SHARED_BY_ALL) and not isinstance(error, PeerLost):
            gang.farewell()
        raise
    if progress is not None:
        progress.end(result)
    gang.farewell()
    return result


if __name__ == "__main__":
    sys.exit(main())

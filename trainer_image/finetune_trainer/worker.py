"""One training process, which computes one rank: `python -m finetune_trainer.worker PLAN_FILE LAUNCHER_PID`.

`processes.py` starts one worker per GPU or CPU rank, with the rank in the environment. A worker leaves the file
`outcome-<rank>.json` for the launcher, unless it is killed before it can write the file. Signal handlers are
installed before the heavy imports, so that a SIGTERM that arrives while torch is imported is not lost.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from finetune_core.contract import Outcome, Result
from finetune_core.errors import UserError
from finetune_trainer.pod.errors import Diverged, NodeFault, OutOfMemory, OutsideFailure, PeerLost, Stopped
from finetune_trainer.pod.imports import importing
from finetune_trainer.pod.outcomes import WorkerOutcome, WorkerStatus, outcome_of, write_outcome
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.pod.signals import StopFlag, end_with_parent
from finetune_trainer.pod.unused_libraries import leave_out_bitsandbytes
from finetune_trainer.ranks.locked_memory import lock_all_memory
from finetune_trainer.ranks.return_guard import ReturnGuard, least_seconds
from finetune_trainer.ranks.watchdog import Watchdog
from finetune_trainer.reporting.reporter import Reporter

ERRORS_OF_ALL_RANKS = (UserError, OutsideFailure, Diverged, Stopped)
"""Errors that end every rank in the same way. Rank 0 waits until the other ranks have read the error from the
rendezvous store, which lives in rank 0. After any other error, and after PeerLost, the process ends at once, so that
the other ranks, which may wait in a collective, soon notice that this rank is gone."""


def main() -> int:
    """Run the worker and write its outcome. The process ends inside this function, with the outcome's exit code."""
    stop = StopFlag()
    end_with_parent(int(sys.argv[2]))
    lock_all_memory()
    plan = WorkerPlan.model_validate_json(Path(sys.argv[1]).read_text())
    status = WorkerStatus()
    try:
        outcome = WorkerOutcome(result=_run(plan, status, stop))
    except Exception as error:  # noqa: BLE001  (the one place where every error becomes an outcome)
        outcome = _outcome_of(error, status)
        if outcome.result.outcome is Outcome.CRASHED:
            traceback.print_exc()
    try:
        try:
            write_outcome(plan.folder, int(os.environ["RANK"]), outcome)
        except OSError:
            # The exit code still tells the launcher how this worker ended.
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # End the process without the cleanup of a normal exit, in which threads of torch and gloo may hang if another
        # rank is gone.
        os._exit(outcome.result.exit_code)


def _run(plan: WorkerPlan, status: WorkerStatus, stop: StopFlag) -> Result:
    """Join the other ranks, train, and return the job's result. Rank 0 also sends reports to the operator; its last
    report contains the result."""
    from finetune_trainer.ranks import process

    leave_out_bitsandbytes(plan.config)
    process.prepare_environment(plan.paths.scratch)
    with importing():
        from finetune_trainer.ranks.gang import Gang
        from finetune_trainer.reporting.progress import Progress
        from finetune_trainer.train import train

    world = plan.config.world
    with _classified_errors(plan, status):
        device = process.select_device(world, precision=plan.config.optimization.precision)
    stall_seconds = plan.config.stability.stall_timeout_seconds
    watchdog = Watchdog(plan.folder, int(os.environ["RANK"]), stall_seconds, status)
    guard = ReturnGuard(watchdog, least=least_seconds(world.device))
    with watchdog.allow(plan.time_limits.peers), _classified_errors(plan, status):
        # A worker joins even after SIGTERM, because otherwise the other ranks would wait for it until their timeout.
        gang = Gang(
            device=device,
            stop=stop,
            watchdog=watchdog,
            guard=guard,
            stall_seconds=stall_seconds,
            limits=plan.time_limits,
        )
    progress = None
    if gang.is_first:
        reporter = Reporter(plan.config.report, plan.paths) if plan.config.report is not None else None
        progress = Progress(pod_uid=plan.identity.pod_uid, ranks=gang.world_size, reporter=reporter)
    try:
        with _classified_errors(plan, status):
            result = train(plan, gang, progress, status)
    except Exception as error:
        # What is left to do has time limits of its own: the last report, and the wait for the other ranks.
        guard.stand_down()
        if isinstance(error, PeerLost):
            # The other ranks may be gone because this rank stalled: its watchdog announced the stall, and the other
            # ranks left. The outcome must then be the stall and not PeerLost. `claim_end` ensures this: if the watchdog
            # has begun to end the process, the call never returns, and the watchdog writes the outcome.
            watchdog.claim_end()
        if progress is not None:
            progress.end(_outcome_of(error, status).result)
        if isinstance(error, ERRORS_OF_ALL_RANKS) and not isinstance(error, PeerLost):
            gang.final_barrier()
        raise
    guard.stand_down()
    if progress is not None:
        progress.end(result)
    gang.final_barrier()
    return result


def _outcome_of(error: Exception, status: WorkerStatus) -> WorkerOutcome:
    return outcome_of(error, step=status.step, checkpoint=status.checkpoint, phase=status.phase)


@contextlib.contextmanager
def _classified_errors(plan: WorkerPlan, status: WorkerStatus) -> Iterator[None]:
    """Inside the block, turn errors of torch into the exceptions of `pod/errors.py`.

    OutOfMemory replaces every error for lack of memory, on a GPU or on the host. PeerLost replaces the errors that
    torch raises when another rank is gone. On GPUs the text of an error decides what else it is (`device_errors.py`).
    """
    import torch

    from finetune_trainer.ranks import memory
    from finetune_trainer.ranks.peer_errors import is_peer_failure, peer_lost

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(memory.out_of_memory_message(error, status, plan.config)) from error
    except RuntimeError as error:
        if memory.is_host_out_of_memory(error):
            raise OutOfMemory(memory.out_of_memory_message(error, status, plan.config)) from error
        if plan.config.world.device == "GPU" and (failure := _device_failure(error, plan, status)) is not None:
            raise failure from error
        if is_peer_failure(error):
            raise peer_lost(error) from error
        raise


def _device_failure(error: RuntimeError, plan: WorkerPlan, status: WorkerStatus) -> Exception | None:
    """Return the exception of `pod/errors.py` for ``error``, which torch raised in a job on GPUs. Return None where the
    error comes from another rank, or where it is a crash."""
    from finetune_trainer.ranks import memory
    from finetune_trainer.ranks.device_errors import DeviceFault, diagnose

    diagnosis = diagnose(str(error))
    match diagnosis.fault:
        case DeviceFault.NODE_FAULT:
            return NodeFault(f"a GPU of the node or its driver failed {status.where()}: {diagnosis.cause}")
        case DeviceFault.DRIVER_TOO_OLD:
            return UserError("NVIDIA driver", diagnosis.cause)
        case DeviceFault.OUT_OF_MEMORY:
            return OutOfMemory(memory.out_of_memory_message(error, status, plan.config))
        case DeviceFault.WRONG_SETUP:
            return OutsideFailure(f"the pod or its network does not fit its GPUs {status.where()}: {diagnosis.cause}")
    return None


if __name__ == "__main__":
    sys.exit(main())

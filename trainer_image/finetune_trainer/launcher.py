"""PID 1 of a training pod: checks and fetches what the workers need, starts them, and owns the exit code.

Light on purpose: it imports no torch, so that bad input and a refused store are told within a second or two.
"""

from __future__ import annotations

import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from finetune_core.contract import (
    MASTER_ADDR_VARIABLE,
    MASTER_PORT,
    MASTER_PORT_VARIABLE,
    Identity,
    Result,
    RunConfig,
)
from finetune_core.errors import UserError
from finetune_trainer.pod import cgroup
from finetune_trainer.pod.errors import OutsideFailure, Stopped
from finetune_trainer.pod.outcomes import decide, outcome_of
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import FROZEN_SECONDS, PEER_WAIT_SECONDS, STORE_CHECK_SECONDS, Paths
from finetune_trainer.processes import STOP_SIGNALS, Workers, worker_environment
from finetune_trainer.sources.inputs import fetch_inputs
from finetune_trainer.storage.artifact import committed_result
from finetune_trainer.storage.root import RunRoot, open_root

NAME_RETRY_SECONDS = 0.5
LOOK_SECONDS = 0.1
T = TypeVar("T")


class Told:
    """Becomes true at SIGTERM; while there are workers, `Workers` listens in its place and passes it on."""

    def __init__(self) -> None:
        """Listen from now on; what came since the process began has waited (`__main__`)."""
        self._told = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._tell)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _tell(self, *_: object) -> None:
        self._told = True

    def __call__(self) -> bool:
        """Return whether this pod was told to stop."""
        return self._told


def run(paths: Paths, environment: Mapping[str, str]) -> int:
    """Run this pod's part of the attempt; return the exit code, after the termination message is written."""
    told = Told()
    try:
        result = _attempt(paths, environment, told)
    except Exception as error:  # noqa: BLE001  (the one place where every error becomes a result)
        result = outcome_of(error).result
        if result.exit_code == 1:
            traceback.print_exc()
    _write_termination_message(paths.termination_log, result)
    stream = sys.stdout if result.exit_code == 0 else sys.stderr
    print(f"{result.outcome.value}: {result.message}", file=stream, flush=True)
    return result.exit_code


def _attempt(paths: Paths, environment: Mapping[str, str], told: Told) -> Result:
    """The story of a pod: an artifact that is there already, checks, inputs, rendezvous, workers, verdict."""
    identity = Identity.from_environment(environment)
    config = read_config(paths.run_file)
    address = environment.get(MASTER_ADDR_VARIABLE, "")
    port = environment.get(MASTER_PORT_VARIABLE, str(MASTER_PORT))
    if not address:
        raise UserError(f"environment variable {MASTER_ADDR_VARIABLE}", "must be set (the operator sets it)")
    folder = paths.scratch / "attempt"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepared = _unless(told, lambda: _prepare(config, identity, paths, folder, address))
    if isinstance(prepared, Result):
        return prepared
    if prepared is None and config.world.nodes == 1:
        raise Stopped("told to stop before training began: there is nothing to save")
    # The other pods wait for this one's workers. Told to stop, these read no input: they only pass the word on.
    inputs = prepared or Inputs(model=folder, train=folder)
    plan = WorkerPlan(paths=paths, identity=identity, config=config, inputs=inputs, folder=folder)
    threads = cgroup.threads_per_process(
        config.world.processes_per_node, limit=cgroup.cpu_limit(), cores=cgroup.usable_cores()
    )
    kills_before = cgroup.oom_kills()
    environments = worker_environment(environment, plan, address=address, port=port, threads=threads)
    silence = config.stability.stall_timeout_seconds + FROZEN_SECONDS
    ends = Workers(folder, silence_seconds=silence).run(plan, environments, told=prepared is None)
    return decide(ends, out_of_memory=cgroup.oom_kills() > kills_before, memory_limit=cgroup.memory_limit())


def _prepare(config: RunConfig, identity: Identity, paths: Paths, folder: Path, address: str) -> Inputs | Result:
    """Return the inputs once they are here and the first worker has a name, or the result of a run that is done."""
    root = open_root(config, paths)
    done = committed_result(RunRoot(root.store.with_budget(STORE_CHECK_SECONDS), root.location))
    if done is not None:
        return done
    print(f"attempt {identity.attempt} of {identity.namespace}/{identity.name}: fetching model and data", flush=True)
    inputs = fetch_inputs(config, paths, root.store, folder)
    wait_for_name(address, seconds=PEER_WAIT_SECONDS)
    return inputs


def _unless(told: Told, work: Callable[[], T]) -> T | None:
    """Return what ``work`` makes, None once this pod is told to stop: then the work is left where it is."""
    made: list[T] = []
    failed: list[BaseException] = []

    def run_it() -> None:
        try:
            made.append(work())
        except BaseException as error:  # noqa: BLE001  (raised again where it was asked for)
            failed.append(error)

    thread = threading.Thread(target=run_it, name="prepare", daemon=True)
    thread.start()
    while thread.is_alive() and not told():
        thread.join(LOOK_SECONDS)
    if failed:
        raise failed[0]
    return made[0] if made and not told() else None


def read_config(path: Path) -> RunConfig:
    """Read the run file; raises UserError with the field's path where it is missing or not of this version."""
    try:
        return RunConfig.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError(f"run file {path}", f"can't be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"run file {path}", f"{where}: {first['msg']}") from error


def wait_for_name(address: str, *, seconds: float) -> None:
    """Wait until the first worker's name resolves: its record appears when its pod runs."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            if time.monotonic() > deadline:
                raise OutsideFailure(f"the first worker's name {address} did not resolve in {seconds:.0f} s") from error
            # The pause between two questions to DNS, which has no way to wait for a name.
            time.sleep(NAME_RETRY_SECONDS)
        else:
            return


def _write_termination_message(path: Path, result: Result) -> None:
    """Write the result where the kubelet reads it."""
    try:
        path.write_text(result.to_termination_message())
    except OSError as error:
        print(f"the termination message can't be written to {path}: {error}", file=sys.stderr)

"""The launcher, PID 1 of a training pod: checks and downloads what the workers need, starts the workers, and determines
the pod's result, exit code and termination message. `__main__.py` calls `run`.

The launcher does not import torch, so that bad input and a store that refuses access are reported without the seconds
that this import takes.
"""

from __future__ import annotations

import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from finetune_core.contract import (
    MASTER_ADDR_VARIABLE,
    MASTER_PORT,
    MASTER_PORT_VARIABLE,
    Identity,
    Phase,
    Result,
    RunConfig,
)
from finetune_core.contract.same_training import TrainingRecord, settings_digest
from finetune_core.errors import UserError
from finetune_core.requirements import judged
from finetune_trainer.kernels.parts import parts_left_plain
from finetune_trainer.pod import cgroup
from finetune_trainer.pod.errors import OutsideFailure, Stopped
from finetune_trainer.pod.outcomes import outcome_of, result_of_pod
from finetune_trainer.pod.plan import Inputs, WorkerPlan, read_run_file, rendezvous_key
from finetune_trainer.pod.settings import FROZEN_SECONDS, STORE_CHECK_SECONDS, Paths
from finetune_trainer.pod.signals import StopFlag
from finetune_trainer.pod.time_limits import SHORTEST, time_limits
from finetune_trainer.processes import WorkerProcesses, worker_environments
from finetune_trainer.ranks.gate import open_rendezvous
from finetune_trainer.sources.identities import input_identities
from finetune_trainer.sources.inputs import fetch_inputs, job_size
from finetune_trainer.storage.artifact import committed_result
from finetune_trainer.storage.root import RunRoot, open_root, source_store

DNS_RETRY_SECONDS = 0.5
POLL_SECONDS = 0.1
T = TypeVar("T")


def run(paths: Paths, environment: Mapping[str, str]) -> int:
    """Run this pod's part of the attempt, write the termination message, and return the exit code.

    ``environment`` is the pod's environment, which holds the identity of the attempt and the address of rank 0.
    """
    stop = StopFlag()
    try:
        result = _attempt(paths, environment, stop)
    except Exception as error:  # noqa: BLE001  (the one place where every error becomes a result)
        result = outcome_of(error, phase=Phase.LOADING).result
        if result.exit_code == 1:
            traceback.print_exc()
    _write_termination_message(paths.termination_log, result)
    stream = sys.stdout if result.exit_code == 0 else sys.stderr
    print(f"{result.outcome.value}: {result.message}", file=stream, flush=True)
    return result.exit_code


def _attempt(paths: Paths, environment: Mapping[str, str], stop: StopFlag) -> Result:
    """Read the run file, fetch model and data, run the workers, and return the pod's result. If an earlier attempt has
    committed the artifact already, return the result of that artifact at once."""
    identity = Identity.from_environment(environment)
    config = read_run_file(paths.run_file)
    # A wrong name is told before anything is downloaded.
    parts_left_plain(environment)
    address = environment.get(MASTER_ADDR_VARIABLE, "")
    port = int(environment.get(MASTER_PORT_VARIABLE, MASTER_PORT))
    key = partial(rendezvous_key, identity, paths)
    if not address:
        raise UserError(f"environment variable {MASTER_ADDR_VARIABLE}", "must be set (the operator sets it)")
    folder = paths.scratch / "attempt"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepared = _run_unless_stopped(stop, lambda: _prepare(config, identity, paths, folder, address))
    if isinstance(prepared, Result):
        return prepared
    if prepared is None and config.world.nodes == 1:
        raise Stopped("told to stop before training began: there is nothing to save")
    # The workers of the other pods wait for the workers of this pod. So this pod's workers are started even after
    # SIGTERM. Then the workers read no inputs and only report the stop to the other ranks, so the paths in `inputs` are
    # placeholders.
    inputs = prepared or Inputs(model=folder, train=folder)
    limits = time_limits(job_size(config, prepared)) if prepared is not None else SHORTEST
    plan = WorkerPlan(paths=paths, identity=identity, config=config, inputs=inputs, folder=folder, time_limits=limits)
    threads = cgroup.threads_per_process(
        config.world.processes_per_node,
        limit=cgroup.cpu_limit(),
        request=cgroup.cpu_request(environment),
        cores=cgroup.usable_cores(),
    )
    kills_before = cgroup.oom_kills()
    heartbeat_timeout = config.stability.stall_timeout_seconds + FROZEN_SECONDS
    gpu_ranks = config.world.size if config.world.device == "GPU" else 0
    workers = WorkerProcesses(folder, heartbeat_timeout=heartbeat_timeout, gpu_ranks=gpu_ranks)
    first, nodes = identity.node_rank == 0, config.world.nodes
    with open_rendezvous(
        first=first, nodes=nodes, address=address, port=port, key=key, seconds=limits.peers
    ) as rendezvous:
        environments = worker_environments(environment, plan, rendezvous=rendezvous, threads=threads)
        exits = workers.run(plan, environments, stop=stop)
    return result_of_pod(exits, out_of_memory=cgroup.oom_kills() > kills_before, memory_limit=cgroup.memory_limit())


def _prepare(config: RunConfig, identity: Identity, paths: Paths, folder: Path, address: str) -> Inputs | Result:
    """Download model and data, wait until the DNS name of rank 0 resolves, and return the local inputs. If the artifact
    is committed already, return the committed result instead, without a download."""
    root = open_root(config, paths)
    done = committed_result(RunRoot(root.store.with_budget(STORE_CHECK_SECONDS), root.location))
    if done is not None:
        return judged(done, config.evaluation.require)
    print(f"attempt {identity.attempt} of {identity.namespace}/{identity.name}: fetching model and data", flush=True)
    # The identities of the input files are read before the files are fetched. If a file changes in between, the run
    # record then names its older content, so that a later job with the new content does not take this run over by
    # mistake.
    training = None
    if identity.node_rank == 0:
        identities = input_identities(config, paths, source_store(root, config, paths), folder / "identities")
        training = TrainingRecord(
            settings_sha256=settings_digest(config), inputs=identities, template_date=config.template_date
        )
    inputs = fetch_inputs(config, paths, root, folder).model_copy(update={"training": training})
    wait_for_dns(address, seconds=time_limits(job_size(config, inputs)).peers)
    return inputs


def _run_unless_stopped(stop: StopFlag, work: Callable[[], T]) -> T | None:
    """Run ``work`` in a thread and return its result. Once ``stop`` is set, return None and leave the thread
    running."""
    made: list[T] = []
    failed: list[BaseException] = []

    def run_it() -> None:
        try:
            made.append(work())
        except BaseException as error:  # noqa: BLE001  (raised again in the main thread)
            failed.append(error)

    thread = threading.Thread(target=run_it, name="prepare", daemon=True)
    thread.start()
    while thread.is_alive() and not stop():
        thread.join(POLL_SECONDS)
    if failed:
        raise failed[0]
    return made[0] if made and not stop() else None


def wait_for_dns(address: str, *, seconds: float) -> None:
    """Wait until ``address``, the DNS name of rank 0's pod, resolves. The name resolves once the pod runs. Raises
    OutsideFailure after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            if time.monotonic() > deadline:
                raise OutsideFailure(f"the first worker's name {address} did not resolve in {seconds:.0f} s") from error
            # DNS has no request that waits for a record, so the launcher asks again after a pause.
            time.sleep(DNS_RETRY_SECONDS)
        else:
            return


def _write_termination_message(path: Path, result: Result) -> None:
    """Write the result to the file from which the kubelet reads the container's termination message."""
    try:
        path.write_text(result.to_termination_message())
    except OSError as error:
        print(f"the termination message can't be written to {path}: {error}", file=sys.stderr)

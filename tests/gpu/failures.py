"""Sections that make the device fail, and look at what the trainer's own code says about the failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from finetune_core.contract import ExitCode, Phase, Result
from finetune_trainer.pod.outcomes import WorkerStatus, outcome_of
from finetune_trainer.worker import _classified_errors
from tests.gpu.models import batch_of, examples_of, joined_gang, prepare, random_model, setup_for, shape_for
from tests.gpu.report import Check
from tests.gpu.settings import SHORT, TWO_LAYERS, free_port, rank_environment, run_config, worker_plan
from tests.gpu.training import train_step

CPU_BYTES = 1 << 50
"""More bytes than an address space of 47 bits has, so that no machine can give them."""
NCCL_CAUSE = "Duplicate GPU"
"""What NCCL says about two ranks on one GPU."""


def out_of_memory(check: Check) -> None:
    """Run out of memory, in a step of a training on a GPU, and in an allocation on the CPU."""
    gang, setup = joined_gang(dry=check.dry), setup_for(check, SHORT)
    shape = shape_for(check, TWO_LAYERS)
    prepared = prepare(check, setup, random_model(shape, torch.float32 if check.dry else torch.bfloat16, gang.device))
    batch = batch_of(examples_of(setup, vocabulary=shape.vocab_size), packed=False)

    def fail() -> None:
        if gang.device.type == "cuda":
            train_step(prepared.engine, gang, [batch] * 2, 0.0)
        torch.empty(CPU_BYTES, dtype=torch.uint8, device=gang.device)

    if gang.device.type == "cuda":
        # The process may use what the model takes already, so a step gets no memory.
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(gang.device).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(gang.device) / total, gang.device)
    try:
        result = _result_of(fail, check, WorkerStatus(step=3, phase=Phase.TRAINING.value))
    finally:
        if gang.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, gang.device)
    check.expect(
        "the trainer ends with the exit code for lack of memory",
        result.exit_code == ExitCode.OUT_OF_MEMORY,
        exit_code=result.exit_code,
        outcome=result.outcome.value,
    )
    check.expect(
        "the message says how much memory was asked for, and which field to change",
        "more were asked for" in result.message and "training.microBatchSize" in result.message,
        message=result.message,
    )
    prepared.engine.discard_gradient()
    loss = train_step(prepared.engine, gang, [batch], 0.0).loss
    check.expect("the device computes on afterwards", loss > 0, loss=loss)
    prepared.engine.close()


def _result_of(work: Callable[[], object], check: Check, status: WorkerStatus) -> Result:
    """Return the result that a worker writes when ``work`` raises an error while it trains."""
    plan = worker_plan(run_config(setup_for(check, SHORT), dry=check.dry))
    try:
        with _classified_errors(plan, status):
            work()
    except Exception as error:  # noqa: BLE001  (as in `worker.py`, every error becomes an outcome)
        return outcome_of(error, step=status.step).result
    raise AssertionError("the device gave more memory than it has")


def lost_rank(check: Check) -> None:
    """Start two ranks on one device. NCCL refuses two ranks on one GPU. On the CPU the ranks join, and rank 1 leaves in
    the middle of the training."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.rank_process", *(["--dry"] if check.dry else [])],
            env=os.environ | rank_environment(dry=check.dry, rank=rank, world_size=2, port=port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        # The bound of the section ends the ranks too.
        output, _ = ranks[0].communicate()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    check.say("rank 0", **found)
    check.expect(
        "rank 0 ends with the exit code for failures outside of the job",
        found["exit_code"] == ExitCode.OUTSIDE_FAILURE,
        exit_code=found["exit_code"],
    )
    if check.dry:
        check.expect(
            "the failure counts as caused by the other rank", found["caused_by_peer"], message=found["message"]
        )
    else:
        check.expect("the message has NCCL's cause", NCCL_CAUSE in found["message"], message=found["message"])

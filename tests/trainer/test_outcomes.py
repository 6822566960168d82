"""The exit code of a pod for several combinations of worker exits.

Where workers report different reasons, the likely cause decides, and not its consequences.
"""

from __future__ import annotations

import ast
import re
import signal
from pathlib import Path

import pytest

import finetune_trainer
from finetune_core.contract import EXIT_CODES, Outcome, Phase, Result
from finetune_core.errors import UserError
from finetune_trainer.pod.cgroup import cpu_limit, oom_kills, parse_cpu_max
from finetune_trainer.pod.errors import Diverged, NewerRun, NodeFault, OutOfMemory, OutsideFailure, PeerLost, Stopped
from finetune_trainer.pod.outcomes import WorkerExit, WorkerOutcome, WorkerStatus, outcome_of, result_of_pod
from finetune_trainer.processes import signal_outcome

KILLED = -9


def said(rank: int, error: Exception) -> WorkerExit:
    """Return the exit of a worker that reported ``error`` in its outcome file."""
    outcome = outcome_of(error)
    return WorkerExit(rank, outcome.result.exit_code, outcome)


def done(rank: int) -> WorkerExit:
    return WorkerExit(rank, 0, WorkerOutcome(result=Result(outcome=Outcome.COMPLETED, message="done")))


BAD, DIVERGED, MEMORY = UserError("dataset.train", "is empty"), Diverged("nan"), OutOfMemory("no memory")
OUTSIDE, PEER, STOP, CRASH = OutsideFailure("store"), PeerLost("rank left"), Stopped("told"), KeyError("bug")


@pytest.mark.parametrize(
    ("ends", "out_of_memory", "code"),
    [
        ([done(0), done(1)], False, 0),
        ([said(0, STOP), said(1, STOP)], False, 143),
        ([done(0), said(1, STOP)], False, 143),
        ([said(0, OUTSIDE), said(1, STOP)], False, 75),
        ([said(0, OUTSIDE), said(1, CRASH)], False, 1),
        ([said(0, MEMORY), said(1, CRASH)], False, 66),
        ([said(0, MEMORY), said(1, DIVERGED)], False, 65),
        ([said(0, DIVERGED), said(1, BAD)], False, 64),
        # A lost peer decides the exit code only if every worker ended because of another worker.
        ([said(0, PEER), said(1, STOP)], False, 143),
        ([said(0, PEER), said(1, PEER)], False, 75),
        ([said(0, PEER), WorkerExit(1, KILLED, None)], False, 1),
        ([said(0, PEER), WorkerExit(1, KILLED, None)], True, 66),
        # A kill at the cgroup's memory limit explains a worker that ended by signal 9, but no other end of a worker.
        ([WorkerExit(0, 3, None)], True, 1),
        # Rank 1 did not end after rank 0, so the launcher killed rank 1. The end of rank 1 is no cause.
        ([said(0, MEMORY), WorkerExit(1, KILLED, None, killed_by_launcher=True)], True, 66),
        ([done(0), WorkerExit(1, KILLED, None, killed_by_launcher=True)], False, 0),
    ],
)
def test_the_cause_decides(ends: list[WorkerExit], out_of_memory: bool, code: int) -> None:
    assert result_of_pod(ends, out_of_memory=out_of_memory).exit_code == code


def test_a_fault_of_the_node_decides_before_everything_that_it_may_cause() -> None:
    fault = NodeFault("a GPU of the node or its driver failed")
    result = result_of_pod([said(0, CRASH), said(1, fault), said(2, PEER)], out_of_memory=False)
    assert (result.exit_code, result.node_fault, result.message) == (75, True, str(fault))
    assert result_of_pod([said(0, OUTSIDE)], out_of_memory=False).node_fault is None
    assert "nodeFault" not in result_of_pod([said(0, OUTSIDE)], out_of_memory=False).to_termination_message()


def test_the_signal_of_a_worker_on_a_gpu_may_tell_the_cause() -> None:
    """NCCL ends the ranks that wait for a lost rank by SIGABRT. Only the rank that crashed is the cause."""

    def ended(number: int, *, ranks: int) -> WorkerExit:
        return WorkerExit(1, -number, signal_outcome(1, -number, gpu_ranks=ranks))

    assert result_of_pod([said(0, CRASH), ended(signal.SIGABRT, ranks=2)], out_of_memory=False).exit_code == 1
    lost = result_of_pod([ended(signal.SIGABRT, ranks=2)], out_of_memory=False)
    assert lost.outcome is Outcome.OUTSIDE_FAILURE
    assert lost.message.startswith("another rank left: ")
    full = result_of_pod([said(0, PEER), ended(signal.SIGBUS, ranks=2)], out_of_memory=False)
    assert (full.outcome, "resources.sharedMemory" in full.message) == (Outcome.OUTSIDE_FAILURE, True)
    for number, ranks in ((signal.SIGSEGV, 2), (signal.SIGABRT, 1), (signal.SIGABRT, 0), (signal.SIGBUS, 0)):
        assert result_of_pod([ended(number, ranks=ranks)], out_of_memory=False).outcome is Outcome.CRASHED
    assert signal_outcome(1, 0, gpu_ranks=2) is None


@pytest.mark.parametrize("outcome", Outcome)
def test_the_exit_code_of_a_worker_without_an_outcome_tells_how_it_ended(outcome: Outcome) -> None:
    """A worker can't write its outcome to a full disk. A worker without an outcome that ends with 0 crashed."""
    found = result_of_pod([WorkerExit(1, EXIT_CODES[outcome], None)], out_of_memory=False)
    assert found.exit_code == (EXIT_CODES[outcome] or 1)
    assert found.message == f"rank 1 exited with {EXIT_CODES[outcome]} and left no reason; its log has the details"


def test_a_newer_run_is_a_failure_from_outside() -> None:
    assert outcome_of(NewerRun("run 2 has started")).result.outcome is Outcome.OUTSIDE_FAILURE


def test_the_result_says_in_which_phase_memory_ran_out() -> None:
    """The operator halves the micro-batch only where the memory of the phase depends on it."""
    for phase in Phase:
        assert outcome_of(MEMORY, phase=phase.value).result.phase is phase
        assert outcome_of(CRASH, phase=phase.value).result.phase is None
        killed = WorkerExit(0, -9, None, last_seen=WorkerStatus(step=3, phase=phase.value).where())
        assert result_of_pod([killed], out_of_memory=True).phase is phase
    assert outcome_of(MEMORY).result.phase is None
    assert result_of_pod([WorkerExit(0, -9, None)], out_of_memory=True).phase is None


def test_a_crash_names_its_class_and_a_cause_is_told_as_it_is() -> None:
    assert outcome_of(CRASH).result.message == "KeyError: 'bug'"
    assert outcome_of(BAD).result.message == "dataset.train: is empty"


def test_cgroup_files_of_both_versions_are_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert parse_cpu_max("max 100000") is None
    assert cpu_limit(tmp_path) is None
    assert oom_kills(tmp_path) == 0
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert (cpu_limit(tmp_path), oom_kills(tmp_path)) == (1.5, 1)
    (tmp_path / "cpu.max").write_text("100000 100000")
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert (cpu_limit(tmp_path), oom_kills(tmp_path)) == (1.0, 2)


def test_lack_of_memory_is_never_taken_for_a_fault_of_what_is_read() -> None:
    """A `try` that turns any exception of a library into a sentence about a file or a row must handle MemoryError in an
    earlier `except`."""
    wide = re.compile(r"\b(Exception|ArrowException)\b")
    checked = 0
    for room in ("data", "model", "preflight", "sources"):
        for path in sorted((Path(finetune_trainer.__file__).parent / room).rglob("*.py")):
            for tried in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Try)):
                caught = [ast.unparse(handler.type) if handler.type else "" for handler in tried.handlers]
                for position, name in enumerate(caught):
                    if wide.search(name):
                        checked += 1
                        handled = re.findall(r"\w+", " ".join(caught[:position]))
                        assert "MemoryError" in handled, f"{path}:{tried.handlers[position].lineno}"
    assert checked

"""Work in several processes: the results come in the order of the work, and a process that is killed or fails is an
error with a sentence, and never a hang. No process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data.prepared import chunk_workers
from finetune_trainer.data.prepared.chunk_workers import IN_FLIGHT, ChunkWorkers, SignOfLife, WorkerProcessError
from finetune_trainer.pod.errors import OutsideFailure, StopAgreed

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 60.0


def is_alive(process: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` returns True, and fail if it does not in time."""
    pause, end = threading.Event(), time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.05)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 3))
def test_results_come_in_the_order_of_the_work(work: list[int], count: int) -> None:
    def done(value: int, alive: SignOfLife) -> tuple[int, int]:
        return value, sum(range(value * 20_000)) * 0 + value**2

    with ChunkWorkers[int, tuple[int, int]](count, done) as workers:
        found = list(workers.results(work, lambda value: value))
    assert found == [(value, (value, value**2)) for value in work]
    assert not any(is_alive(process) for process in workers.process_ids)


def test_a_bounded_number_of_items_is_taken_before_their_results() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(200):
            taken.append(number)
            yield number

    with ChunkWorkers[int, int](2, lambda value, alive: value) as workers:
        for number, _ in workers.results(items(), lambda value: value):
            assert len(taken) <= number + IN_FLIGHT * 2
    assert len(taken) == 200


def test_long_work_and_long_results_do_not_block_each_other() -> None:
    """Both are longer than what a pipe holds."""
    long = b"x" * (1 << 20)
    with ChunkWorkers[int, bytes](2, lambda value, alive: value + value) as workers:
        found = [len(result) for _, result in workers.results(range(8), lambda _: long)]
    assert found == [2 << 20] * 8


def test_a_process_finishes_before_it_ends(tmp_path: Path) -> None:
    def finish() -> None:
        (tmp_path / str(os.getpid())).touch()

    with ChunkWorkers[int, int](3, lambda value, alive: value, finish) as workers:
        assert len(list(workers.results(range(5), lambda value: value))) == 5
    assert {int(file.name) for file in tmp_path.iterdir()} == set(workers.process_ids)


def _raise(error: Exception) -> None:
    raise error


def _kill(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("work", "error", "sentence"),
    [
        (
            lambda _, alive: _kill(signal.SIGKILL),
            MemoryError,
            "process 1 of 1 that tokenises the rows was ended by SIGKILL, as the kernel does where the pod has no"
            " memory left",
        ),
        (
            lambda _, alive: _kill(signal.SIGTERM),
            WorkerProcessError,
            "process 1 of 1 that tokenises the rows was ended by SIGTERM",
        ),
        (lambda _, alive: os._exit(3), WorkerProcessError, "process 1 of 1 that tokenises the rows ended by itself"),
        (
            lambda _, alive: _raise(KeyError("a column")),
            WorkerProcessError,
            "process 1 of 1 that tokenises the rows failed: KeyError: 'a column'",
        ),
        (lambda _, alive: _raise(OutsideFailure("no disk")), OutsideFailure, "no disk"),
        (lambda _, alive: _raise(MemoryError()), MemoryError, ""),
        (
            lambda _, alive: lambda: None,
            WorkerProcessError,
            "process 1 of 1 that tokenises the rows failed: its result can't be sent",
        ),
    ],
    ids=["killed", "terminated", "ended", "failed", "outside", "memory", "unsendable"],
)
def test_a_process_that_ends_or_fails_is_an_error_with_a_sentence(
    work: Callable[[int, SignOfLife], object], error: type[Exception], sentence: str
) -> None:
    with ChunkWorkers[int, object](1, work) as workers, pytest.raises(error) as raised:
        list(workers.results([1, 2, 3], lambda value: value))
    assert str(raised.value) == sentence
    assert not any(is_alive(process) for process in workers.process_ids)


def test_a_process_that_was_killed_while_it_was_idle_is_an_error_too() -> None:
    with ChunkWorkers[int, int](2, lambda value, alive: value) as workers:
        os.kill(workers.process_ids[0], signal.SIGKILL)
        wait_until(lambda: not is_alive(workers.process_ids[0]))
        with pytest.raises(MemoryError, match="process 1 of 2 that tokenises the rows was ended by SIGKILL"):
            list(workers.results([1, 2, 3], lambda value: value))


def test_a_stop_ends_processes_that_stand_still() -> None:
    def stand_still(_: int, alive: SignOfLife) -> None:
        signal.pause()

    with ChunkWorkers[int, None](2, stand_still) as workers, pytest.raises(StopAgreed):
        list(workers.results([1, 2, 3], lambda value: value, stop=lambda: True))
    assert not any(is_alive(process) for process in workers.process_ids)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_workers, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(chunk_workers, "SIGN_SECONDS", 0.05)


STOOD_STILL = "process 1 of 1 that tokenises the rows stood still for 1 s"


@pytest.mark.usefixtures("impatient")
def test_a_process_that_stands_still_is_an_error() -> None:
    def stand_still(_: int, alive: SignOfLife) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    with ChunkWorkers[int, None](1, stand_still) as workers, pytest.raises(OutsideFailure) as raised:
        list(workers.results([1, 2, 3], lambda value: value))
    assert str(raised.value) == STOOD_STILL
    assert not is_alive(workers.process_ids[0])


@pytest.mark.usefixtures("impatient")
def test_a_process_that_does_not_take_long_work_is_an_error() -> None:
    """The work is longer than what a pipe holds."""
    with ChunkWorkers[int, bytes](1, lambda value, alive: value) as workers:
        os.kill(workers.process_ids[0], signal.SIGSTOP)
        with pytest.raises(OutsideFailure) as raised:
            list(workers.results([1], lambda _: bytes(8 << 20)))
    assert str(raised.value) == STOOD_STILL


@pytest.mark.usefixtures("impatient")
def test_work_that_shows_that_it_goes_on_may_take_long() -> None:
    def go_on(seconds: float, alive: SignOfLife) -> float:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive()
        return seconds

    with ChunkWorkers[float, float](1, go_on) as workers:
        assert list(workers.results([2.5, 0.0], lambda value: value)) == [(2.5, 2.5), (0.0, 0.0)]


def test_errors_of_the_items_are_raised_as_they_are() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OutsideFailure("the file can't be read")

    with (
        ChunkWorkers[int, int](1, lambda value, alive: value) as workers,
        pytest.raises(OutsideFailure, match="the file can't be read"),
    ):
        list(workers.results(items(), lambda value: value))


PROGRAM = """
import signal
from finetune_trainer.data.prepared.chunk_workers import ChunkWorkers

with ChunkWorkers(2, lambda _, alive: signal.pause()) as workers:
    print(*workers.process_ids, flush=True)
    list(workers.results(range(9), lambda value: value))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_program_that_is_ended(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        processes = [int(process) for process in program.stdout.readline().split()]
        assert len(processes) == 2
        program.send_signal(number)
        assert program.wait(PATIENCE_SECONDS) == -number
        wait_until(lambda: not any(is_alive(process) for process in processes))

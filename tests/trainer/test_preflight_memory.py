"""A check in a forked child process is ended when the child itself takes too much memory. The memory of its parent does
not count."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.preflight import confinement
from finetune_trainer.preflight.confinement import EXCESS_BYTES, ChildEnd, run_confined

MIB = 1 << 20
Send = Callable[[Any], None]


def new_memory(mebibytes: int) -> mmap.mmap:
    """Return ``mebibytes`` MiB of written memory that the kernel gives now. The memory of a bytearray may be what this
    process has freed and not returned to the kernel, as after tests with large models. A child of this process has such
    memory already, so its use adds nothing."""
    memory = mmap.mmap(-1, mebibytes * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"x" * len(memory))
    return memory


def takes(mebibytes: int) -> Callable[[Send], None]:
    """Return a function for `run_confined` that takes ``mebibytes`` MiB of memory in the child, sends a value, and then
    waits until the parent kills the child."""

    def work(send: Send) -> None:
        taken = new_memory(mebibytes)
        send(len(taken))
        os.read(blocked, 1)

    blocked, _ = os.pipe()
    return work


def test_the_memory_of_the_parent_does_not_count() -> None:
    held = bytearray(os.urandom(1) * (200 * MIB))
    told: list[Any] = []
    assert run_confined(lambda send: send("done"), told.append, memory_bytes=64 * MIB) is ChildEnd.DONE
    assert told == ["done"]
    assert len(held) == 200 * MIB


def test_a_child_that_takes_too_much_is_ended() -> None:
    assert run_confined(takes(200), lambda _: None, memory_bytes=64 * MIB) is ChildEnd.TOO_LARGE


def test_memory_that_is_asked_for_at_once_is_refused_by_the_kernel() -> None:
    def work(_send: Send) -> None:
        bytearray(1 << 40)

    assert run_confined(work, lambda _: None, memory_bytes=64 * MIB) is ChildEnd.TOO_LARGE


def test_a_child_whose_parent_looks_late_can_not_take_more_than_the_excess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "LOOK_SECONDS", 3600)
    took: list[int] = []

    def work(send: Send) -> None:
        held = []
        while True:
            try:
                held.append(new_memory(1))
            except OSError as error:
                raise MemoryError from error
            send(len(held))

    assert run_confined(work, took.append, memory_bytes=64 * MIB) is ChildEnd.TOO_LARGE
    assert 64 < took[-1] <= 64 + (EXCESS_BYTES // MIB)


def test_a_library_that_aborts_for_lack_of_memory_was_too_large() -> None:
    def work(_send: Send) -> None:
        held = new_memory(100)
        os.kill(os.getpid(), signal.SIGABRT if held else 0)

    assert run_confined(work, lambda _: None, memory_bytes=64 * MIB) is ChildEnd.TOO_LARGE


def test_an_exception_of_the_parent_ends_the_child() -> None:
    started: list[int] = []

    def receive(process: int) -> None:
        started.append(process)
        raise TimeoutError

    def work(send: Send) -> None:
        send(os.getpid())
        signal.pause()

    with pytest.raises(TimeoutError):
        run_confined(work, receive)
    assert not Path(f"/proc/{started[0]}").exists()


@pytest.mark.parametrize(
    ("work", "end"),
    [
        (lambda _send: os.kill(os.getpid(), signal.SIGKILL), ChildEnd.KILLED),
        (lambda _send: 1 / 0, ChildEnd.FAILED),
        (lambda _send: os._exit(0), ChildEnd.FAILED),
        (lambda _send: None, ChildEnd.DONE),
    ],
    ids=["killed", "failed", "left without a word", "done"],
)
def test_the_end_of_the_child_is_told(work: Callable[[Send], None], end: ChildEnd) -> None:
    assert run_confined(work, lambda _: None) is end

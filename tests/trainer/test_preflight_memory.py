"""A check in a forked child process is ended when the child itself takes too much memory, whatever its parent has."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from finetune_trainer.preflight.confinement import ChildEnd, run_confined

MIB = 1 << 20
Send = Callable[[Any], None]


def takes(mebibytes: int) -> Callable[[Send], None]:
    """Return work that takes so much memory, sends a value, and waits until the parent has had time to look."""

    def work(send: Send) -> None:
        taken = bytearray(os.urandom(1) * (mebibytes * MIB))
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


@pytest.mark.parametrize(
    ("work", "end"),
    [
        (lambda _send: os.kill(os.getpid(), signal.SIGKILL), ChildEnd.KILLED),
        (lambda _send: 1 / 0, ChildEnd.FAILED),
        (lambda _send: None, ChildEnd.DONE),
    ],
    ids=["killed", "failed", "done"],
)
def test_the_end_of_the_child_is_told(work: Callable[[Send], None], end: ChildEnd) -> None:
    assert run_confined(work, lambda _: None) is end

"""A forked process answers questions, and neither its end nor its standing still holds this process up."""

from __future__ import annotations

import os
import resource
import signal
from multiprocessing.connection import Connection

import pytest

from finetune_trainer.pod.forked_process import ForkedProcess


def echo(asked: Connection) -> None:
    while (question := asked.recv()) is not None:
        asked.send(question)


def half_an_answer(asked: Connection) -> None:
    os.write(asked.fileno(), b"\0\0\1\0 an answer of 256 bytes, of which the rest never comes")
    signal.pause()


def test_a_process_answers_and_ends_by_itself() -> None:
    forked = ForkedProcess(echo, patience=60)
    for question in ("a", b"b" * (1 << 20), {"c": [1, 2]}):
        forked.connection.send(question)
        assert forked.connection.recv() == question
    forked.connection.send(None)
    assert forked.end(60) == 0
    assert forked.end() == 0


def test_a_process_that_is_ending_ends_by_itself_although_an_answer_was_not_read() -> None:
    def answer_twice(asked: Connection) -> None:
        asked.send("read")
        asked.send("not read")
        asked.recv()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        signal.setitimer(signal.ITIMER_REAL, 0.3)  # what it still has to do
        signal.sigwait([signal.SIGALRM])

    forked = ForkedProcess(answer_twice, patience=60)
    assert forked.connection.recv() == "read"
    forked.connection.send("end")
    assert forked.end(60) == 0


def test_a_process_that_has_ended_is_not_waited_for_although_another_one_holds_its_connection() -> None:
    def fork_another(asked: Connection) -> None:
        other = os.fork()
        if other == 0:
            signal.alarm(60)
            signal.pause()
        asked.send(other)

    forked = ForkedProcess(fork_another, patience=60)
    other = forked.connection.recv()
    try:
        assert forked.end(3600) == 0
    finally:
        os.kill(other, signal.SIGKILL)


@pytest.mark.parametrize("seconds", [0.1, 60.0])
def test_without_a_file_descriptor_a_process_ends_all_the_same(seconds: float) -> None:
    forked = ForkedProcess(echo, patience=60)
    if seconds == 60:
        forked.connection.send(None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.dup(forked.connection.fileno())
    os.close(next_one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one, hard))
    try:
        status = forked.end(seconds)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.WIFSIGNALED(status) is (seconds < 60)


def test_a_process_that_waits_is_killed_and_its_status_says_so() -> None:
    forked = ForkedProcess(echo, patience=60)
    assert os.WTERMSIG(forked.end()) == signal.SIGKILL
    with pytest.raises(ChildProcessError):
        os.waitpid(forked.id, 0)


def test_a_process_that_fails_ends() -> None:
    def fail(asked: Connection) -> None:
        raise ValueError

    forked = ForkedProcess(fail, patience=60)
    with pytest.raises(EOFError):
        forked.connection.recv()
    assert forked.end() == 0


@pytest.mark.parametrize("answer", [half_an_answer, lambda _: signal.pause()], ids=["half an answer", "no answer"])
def test_an_answer_that_stops_is_an_error(answer: object) -> None:
    assert callable(answer)
    forked = ForkedProcess(answer, patience=0.5)
    with pytest.raises(BlockingIOError):
        forked.connection.recv()
    forked.end()


def test_a_question_that_nobody_takes_is_an_error() -> None:
    forked = ForkedProcess(lambda _: signal.pause(), patience=0.5)
    with pytest.raises(BlockingIOError):
        forked.connection.send(bytes(8 << 20))
    forked.end()


def test_a_process_that_was_forked_later_does_not_end_it() -> None:
    first = ForkedProcess(echo, patience=60)

    def end_first(asked: Connection) -> None:
        asked.send((first.is_of_this_process, first.end()))

    second = ForkedProcess(end_first, patience=60)
    assert second.connection.recv() == (False, 0)
    second.end(60)
    first.connection.send("still there")
    assert first.connection.recv() == "still there"
    first.end()


def test_a_connection_that_is_not_for_the_process_is_closed_in_it() -> None:
    first = ForkedProcess(echo, patience=60)

    def is_open(asked: Connection) -> None:
        asked.send(not first.connection.closed)

    second = ForkedProcess(is_open, patience=60, not_for_it=[first.connection])
    assert second.connection.recv() is False
    second.end(60)
    first.end()

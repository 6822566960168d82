"""Which pod `finetune logs` reads, how it breaks lines, and what it says where no pod is left."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_cli.apiserver import pod_logs
from finetune_cli.apiserver.pod_logs import LINE_BYTES, JobPod, _lines, job_pod, newest_pods
from finetune_cli.commands.logs_command import why_none
from finetune_cli.terminal import printable, without_sequences
from finetune_operator.objects import labels
from tests.cli.stored import job


def pod(name: str, *, attempt: int = 0, preflight: int = 0, index: int = 0) -> JobPod:
    return JobPod(name, name, attempt, preflight, index, "Running", "", ("pytorch",), datetime(2026, 1, 1, tzinfo=UTC))


def test_the_labels_are_those_that_the_operator_sets() -> None:
    assert (pod_logs.JOB_NAME_LABEL, pod_logs.JOB_UID_LABEL) == (labels.JOB_NAME, labels.JOB_UID)
    assert (pod_logs.ATTEMPT_LABEL, pod_logs.PREFLIGHT_LABEL) == (labels.ATTEMPT, labels.PREFLIGHT)
    assert (pod_logs.INDEX_LABEL, pod_logs.TRAINING_CONTAINER) == (labels.REPLICA_INDEX, labels.TRAINING_CONTAINER)


def test_the_newest_attempt_is_read_and_the_check_where_there_is_none() -> None:
    check = [pod("check-1", preflight=1), pod("check-2", preflight=2)]
    workers = [pod("w1", attempt=2, index=1), pod("w0", attempt=2), pod("old", attempt=1)]
    assert [found.name for found in newest_pods([*check, *workers])] == ["w0", "w1"]
    assert [found.name for found in newest_pods([*check, *workers], attempt=1)] == ["old"]
    assert newest_pods(workers, attempt=3) == []
    assert [found.name for found in newest_pods([*check, *workers], preflight=True)] == ["check-2"]
    assert [found.name for found in newest_pods(check)] == ["check-2"]
    assert newest_pods([]) == newest_pods(workers, preflight=True) == []


@pytest.mark.parametrize("value", ["-1", "1e9", "٣", "9" * 40, "", "\x1b[2J"])
def test_a_label_that_is_no_number_counts_as_none(value: str) -> None:
    metadata = SimpleNamespace(name="p", uid=None, labels={labels.ATTEMPT: value}, creation_timestamp=None)
    found = job_pod(SimpleNamespace(metadata=metadata, status=None, spec=None))
    assert (found.attempt, found.phase, found.containers) == (0, "Unknown", ())


class Chunks:
    """A streamed answer of the API server."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.closed = False

    def stream(self, _size: int) -> Iterator[bytes]:
        yield from self.chunks

    def close(self) -> None:
        self.closed = True

    def release_conn(self) -> None:
        """Do nothing."""


def test_lines_are_whole_although_chunks_break_them_and_have_a_bound() -> None:
    answer: Any = Chunks(b"one\ntw", b"o\n\nthree \xff", b"!")
    assert list(_lines(answer)) == ["one", "two", "", "three \ufffd!"]
    assert answer.closed
    endless = list(_lines(Chunks(*[b"x" * 10_000] * 100)))
    assert sum(map(len, endless)) == 1_000_000
    assert max(map(len, endless)) == LINE_BYTES


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[31mred\x1b[0m text", "red text"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]52;c;b3duZWQ=\x1b\\x", "x"),
        ("\x9b31mx", "x"),
        ("\x1bPq\x1b\\x", "x"),
        ("\x1b]0;never ends", "]0;never ends"),
        ("50%\r100%", "50% 100%"),
    ],
)
def test_escape_sequences_of_a_log_leave_no_remains(line: str, shown: str) -> None:
    assert printable(without_sequences(line)) == shown


def test_what_is_said_where_no_pod_is_left() -> None:
    options = argparse.Namespace(preflight=False, attempt=None, worker=0)
    assert "has no pod yet, because no attempt was started: its state is Pending" in why_none(job(), [], options)
    running = job("running")
    assert "has no pod of attempt 2 any more" in why_none(running, [], options)
    options.attempt = 1
    assert "has no pod of attempt 1, which ended as PodDeleted any more" in why_none(running, [], options)
    options.attempt = 7
    assert "has no attempt 7; its newest one is 2" in why_none(running, [], options)
    options.attempt, options.worker = None, 5
    assert "has no worker 5 in attempt 2; its workers are 0" in why_none(running, [pod("w", attempt=2)], options)
    options.preflight = True
    assert "has no pod of a check any more" in why_none(running, [], options)

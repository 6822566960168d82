"""`wait_for` keeps waiting while a server does not answer, until its own deadline. `wait_while_it_moves`, which is used
while a cluster is removed, keeps waiting as long as the progress changes. `remove_state` removes the state folder of a
cluster with all its content."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import minio
import pytest
import requests
import urllib3

from tests.cluster import ClusterError, wait_for
from tests.cluster.layout import Layout
from tests.cluster.waiting import NO_ANSWER, NO_WAY, wait_while_it_moves, was_not_answered
from tests.cluster.watcher import remove_state


def free_port() -> int:
    """Return a port of the loopback interface on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def ask_with_urllib(port: int) -> None:
    urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=0.3)


def ask_with_requests(port: int) -> None:
    requests.get(f"http://127.0.0.1:{port}", timeout=0.3)


def ask_with_minio(port: int) -> None:
    pool = urllib3.PoolManager(timeout=0.3, retries=False)
    keys = {"access_key": "a", "secret_key": "b", "region": "us-east-1"}
    minio.Minio(f"127.0.0.1:{port}", secure=False, http_client=pool, **keys).bucket_exists("bucket")


CLIENTS = [ask_with_urllib, ask_with_requests, ask_with_minio]


@pytest.mark.parametrize("ask", CLIENTS)
def test_a_refused_connection_is_asked_again(ask: Callable[[int], None]) -> None:
    port, errors = free_port(), []

    def answered() -> bool:
        try:
            ask(port)
        except Exception as error:
            errors.append(error)
            if len(errors) < 3:
                raise
        return True

    assert wait_for("the server to answer", answered, 60, interval=0)
    assert len(errors) == 3


@pytest.mark.parametrize("ask", CLIENTS)
def test_a_server_that_stays_silent_is_asked_again(ask: Callable[[int], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Exception) as caught:
        ask(silent.getsockname()[1])
    assert was_not_answered(caught.value)


@pytest.mark.parametrize("number", sorted(NO_WAY), ids=errno.errorcode.get)
def test_a_server_to_which_no_packet_gets_is_asked_again(number: int) -> None:
    error = OSError(number, os.strerror(number))
    assert was_not_answered(error)
    assert was_not_answered(urllib.error.URLError(error))


def test_a_wait_ends_at_its_own_deadline_and_names_what_was_not_answered() -> None:
    port = free_port()
    with pytest.raises(ClusterError, match=r"waited 0.2 s for the server; the last question .*refused"):
        wait_for("the server", lambda: ask_with_urllib(port), 0.2)


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("wrong"),
        ClusterError("useless to wait"),
        FileNotFoundError("no file"),
        urllib.error.HTTPError("http://x", 403, "Forbidden", http.client.HTTPMessage(), None),
        ssl.SSLCertVerificationError("certificate verify failed"),
    ],
)
def test_other_errors_end_a_wait_at_once(error: Exception) -> None:
    def fails() -> bool:
        raise error

    with pytest.raises(type(error)):
        wait_for("nothing", fails, 60)


def test_an_assertion_in_the_handler_of_a_broken_connection_is_a_failed_assertion() -> None:
    def fails() -> bool:
        try:
            raise ConnectionResetError
        except ConnectionResetError:
            raise AssertionError("the server must not break the connection")  # noqa: B904 - this is what is tested

    with pytest.raises(AssertionError, match="must not break"):
        wait_for("nothing", fails, 60)


@pytest.mark.parametrize(
    "line",
    [
        "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?",
        "Unable to connect to the server: net/http: TLS handshake timeout",
        "Unable to connect to the server: dial tcp 10.0.0.1:6443: i/o timeout",
        'Get "https://10.0.0.1:6443/api": dial tcp 10.0.0.1:6443: connect: connection refused',
        'Get "https://10.0.0.1:6443/api": net/http: request canceled (Client.Timeout exceeded while awaiting headers)',
        "Unable to connect to the server: EOF",
        "error: http2: client connection lost",
        "Error from server: etcdserver: request timed out",
        "Error from server (Timeout): Timeout: request did not complete within requested timeout",
        "Error from server (ServiceUnavailable): the server is currently unable to handle the request",
        "Error from server: error dialing backend: dial tcp 10.0.0.1:10250: connect: connection refused",
    ],
)
def test_what_kubectl_prints_about_a_server_without_answer_is_recognised(line: str) -> None:
    assert NO_ANSWER.search(f"{line}\n")


@pytest.mark.parametrize(
    "line",
    [
        'Error from server (NotFound): pods "x" not found',
        'Error from server (Forbidden): pods is forbidden: User "x" cannot list resource "pods"',
        'The FineTuneJob "x" is invalid: spec.method: Unsupported value: "EOF of file"',
        'error: the server doesn\'t have a resource type "finetunejob"',
    ],
)
def test_an_answer_of_the_server_is_no_missing_answer(line: str) -> None:
    assert not NO_ANSWER.search(f"{line}\n")


def test_a_wait_that_moves_goes_on_and_ends_once_nothing_moves() -> None:
    steps = iter(range(50))
    assert wait_while_it_moves("the end", lambda: next(steps) == 40, lambda: object(), 60, interval=0)
    with pytest.raises(ClusterError, match=r"nothing moved for 0.1 s; the last progress: 7 left"):
        wait_while_it_moves("the end", lambda: False, lambda: "7 left", 0.1, interval=0)


def test_a_state_folder_with_everything_in_it_is_removed(tmp_path: Path) -> None:
    state, outside = tmp_path / "state", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (state / "a/b").mkdir(parents=True)
    (state / "a/file").write_text("x")
    (state / "a/link").symlink_to(outside)
    (state / "a/nowhere").symlink_to("missing")
    subprocess.run(["mkfifo", str(state / "a/fifo")], check=True)
    remove_state(Layout(state))
    assert not state.exists()
    assert (outside / "kept").exists()

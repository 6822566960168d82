"""Clients that don't belong to an attempt can neither stop nor stall its ranks through the rendezvous store."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from finetune_core.contract import Identity
from finetune_trainer.pod.plan import rendezvous_key, rendezvous_nonce
from finetune_trainer.pod.settings import Paths
from finetune_trainer.ranks import forwarding
from finetune_trainer.ranks.gang import FOREIGN_KEYS_BEATS
from finetune_trainer.ranks.gate import (
    CHALLENGE_BYTES,
    GREETING,
    MOST_HANDSHAKES,
    PROOF_BYTES,
    Gate,
    Rendezvous,
    open_rendezvous,
)
from tests.trainer.objectstore import free_port
from tests.trainer.zygote import Forked, zygote

KEYS = ("stop", "stalled", "share", "shared/1", "shared/2", "each/1", "each/1/1", "each/2", "heartbeat/1", "init/")
"""Keys that ranks use in the rendezvous store. A rank must not read such a key if a foreign client has set it."""


class Ranks:
    """Running ranks (`joining.py`), each in a process of its own, as if each had a pod of its own."""

    def __init__(
        self,
        folder: Path,
        world: int,
        *,
        keys: tuple[str, ...] = (),
        join: bool = True,
        foreign_keys_beats: int = FOREIGN_KEYS_BEATS,
    ) -> None:
        """Start ``world`` ranks. ``keys`` has for each rank what it takes for the key of the attempt; without ``keys``
        all ranks have the same key. Without ``join`` the ranks open the rendezvous, but do not join each other before
        the method `join` is called."""
        self.folder, self.port, self.processes = folder, free_port(), list[Forked]()
        if join:
            self.join()
        for rank in range(world):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(world),
                "MASTER_PORT": str(self.port),
                "RENDEZVOUS_NONCE": "known to the ranks",
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "KEY": keys[rank] if keys else "the key",
            }
            arguments = [str(folder), str(foreign_keys_beats)]
            log = folder / f"{rank}.log"
            self.processes.append(zygote().start("tests.trainer.joining", arguments, environment=environment, log=log))

    def join(self) -> None:
        (self.folder / "join").touch()

    def log(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {self.log(0)}"
            # Pause between two checks; the deadline bounds their total time.
            time.sleep(0.05)

    def end(self) -> list[int]:
        (self.folder / "enough").touch()
        return [process.wait(120) for process in self.processes]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def begin(world: int, **options: Any) -> Ranks:
        started.append(Ranks(tmp_path, world, **options))
        return started[-1]

    yield begin
    for ranks in started:
        for process in ranks.processes:
            process.kill()
            process.wait()


def joined(ranks: Ranks) -> bool:
    return all("joined" in ranks.log(rank) for rank in range(len(ranks.processes)))


def foreign_store(port: int, address: str = "127.0.0.1") -> dist.TCPStore:
    """Connect to ``port`` with the client of torch, which needs no credentials."""
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=1))


def assert_undisturbed(ranks: Ranks) -> None:
    assert ranks.end() == [0] * len(ranks.processes), ranks.log(0)
    for rank in range(len(ranks.processes)):
        assert "stop requested: False" in ranks.log(rank)
        assert "Traceback" not in ranks.log(rank), ranks.log(rank)


@pytest.mark.gang
def test_the_gate_refuses_a_client_of_torch_and_logs_it(start: Callable[..., Ranks]) -> None:
    ranks = start(2)
    ranks.wait_for(lambda: joined(ranks), "the ranks to join")
    for _ in range(2):
        with pytest.raises((dist.DistError, RuntimeError)):
            foreign_store(ranks.port)
    ranks.wait_for(lambda: "refused a foreign connection to the rendezvous port from 127.0.0.1" in ranks.log(0), "log")
    assert_undisturbed(ranks)


@pytest.mark.parametrize(
    "error", [MemoryError(), AssertionError(), OSError(), EOFError(), RuntimeError("no key"), TimeoutError()], ids=repr
)
async def test_whatever_goes_wrong_in_a_handshake_lets_nobody_pass(error: Exception) -> None:
    reached = []

    def key() -> bytes:
        raise error

    async def store(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(1)
        writer.close()

    store_server = await asyncio.start_server(store, "127.0.0.1", 0)
    gate = Gate(key, Rendezvous("127.0.0.1", store_server.sockets[0].getsockname()[1]))
    gate_server = await asyncio.start_server(gate.serve, "127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection(*gate_server.sockets[0].getsockname())
        writer.write(b"x" * 64 + b"to the store")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        assert reached == []
    finally:
        gate_server.close()
        store_server.close()


@pytest.mark.gang
@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1_000_000], ids=["silent", "HTTP", "much"])
def test_many_foreign_connections_keep_no_rank_away(sent: bytes, start: Callable[..., Ranks]) -> None:
    """The foreign connections are open before the ranks join, and stay open until the ranks have ended."""
    ranks = start(2, join=False)
    with contextlib.ExitStack() as stack:

        def connect() -> bool:
            try:
                stack.enter_context(socket.create_connection(("127.0.0.1", ranks.port), timeout=5))
            except OSError:
                return False
            return True

        ranks.wait_for(connect, "the gate to open")
        for _ in range(300):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", ranks.port), timeout=5))
            with contextlib.suppress(OSError):
                connection.sendall(sent)
        ranks.join()
        ranks.wait_for(lambda: joined(ranks), "the ranks to join")
        assert_undisturbed(ranks)


def test_a_flood_of_connections_ends_no_handshake_of_another_address() -> None:
    """The handshake of the attempt's pod is the oldest one. All addresses of 127.0.0.0/8 belong to this machine."""
    port, key = free_port(), b"the key"

    def connect(source: str) -> tuple[socket.socket, bytes]:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 30, (source, 0)))
        greeting = connection.recv(len(GREETING) + CHALLENGE_BYTES, socket.MSG_WAITALL)
        return connection, greeting.removeprefix(GREETING)

    with contextlib.ExitStack() as stack:
        stack.enter_context(open_rendezvous(first=True, nodes=2, address="", port=port, key=lambda: key))
        own, challenge = connect("127.0.0.3")
        for _ in range(MOST_HANDSHAKES + 20):
            connect("127.0.0.2")
        mine = bytes(CHALLENGE_BYTES)
        own.sendall(mine + hmac.digest(key, GREETING + b"client" + challenge + mine, "sha256"))
        proof = own.recv(PROOF_BYTES, socket.MSG_WAITALL)
        assert proof == hmac.digest(key, GREETING + b"server" + challenge + mine, "sha256")


def test_open_handshakes_of_others_delay_no_end_and_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """If the gate waited for open handshakes at its end, its thread would still run after the block."""
    monkeypatch.setattr(forwarding, "LAST_BYTES_SECONDS", 3600)
    monkeypatch.setattr(forwarding, "JOIN_SECONDS", 60)
    port = free_port()
    with contextlib.ExitStack() as stack:
        with open_rendezvous(first=True, nodes=2, address="", port=port, key=lambda: b"the key"):
            for _ in range(5):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
                assert connection.recv(1), "the handshake has begun"
        assert not rendezvous_threads()
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_waits_for_the_gate_delays_no_end_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forwarding, "LAST_BYTES_SECONDS", 3600)
    monkeypatch.setattr(forwarding, "JOIN_SECONDS", 60)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        open_rendezvous(
            first=False, nodes=2, address="127.0.0.1", port=silent.getsockname()[1], key=lambda: b"the key"
        ) as rendezvous,
        socket.create_connection((rendezvous.address, rendezvous.port), 30),
    ):
        silent.accept()[0].close()
    assert not rendezvous_threads()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("error", [FileNotFoundError("no key"), ValueError("no text")], ids=repr)
def test_a_relay_that_can_not_read_its_key_says_so_and_tries_again(
    error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kubelet replaces the files of the key while the pods run."""
    port, errors, tried_again = free_port(), [error], threading.Event()

    def key() -> bytes:
        if errors:
            raise errors.pop()
        tried_again.set()
        return b"the key"

    with (
        open_rendezvous(first=True, nodes=2, address="", port=port, key=lambda: b"the key"),
        open_rendezvous(first=False, nodes=2, address="127.0.0.1", port=port, key=key) as rendezvous,
        socket.create_connection((rendezvous.address, rendezvous.port), 30),
    ):
        assert tried_again.wait(60)
    printed = capfd.readouterr().err
    assert f"no connection to rank 0 yet: this pod can't read the key of the attempt: {error}" in printed
    assert "Traceback" not in printed


def test_clients_that_use_up_all_file_descriptors_cause_few_lines_and_no_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    print_problem = forwarding.problem_printer()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(print_problem)
    for _ in range(1000):
        loop.call_exception_handler(
            {"message": "no descriptor is left", "exception": OSError(24, "Too many open files")}
        )
    loop.close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1].endswith("no descriptor is left: OSError(24, 'Too many open files') (512 so far)")


@pytest.mark.gang
def test_a_pod_with_another_key_does_not_come_in(start: Callable[..., Ranks]) -> None:
    ranks = start(2, keys=("the key", "another key"))
    ranks.wait_for(lambda: "it does not know the key of the attempt" in ranks.log(0), "the refusal")
    ranks.wait_for(lambda: "no connection to rank 0 yet: " in ranks.log(1), "the refused end's own sentence")
    assert not joined(ranks)


@pytest.mark.gang
def test_one_node_listens_on_the_loopback_interface_only(start: Callable[..., Ranks]) -> None:
    ranks = start(1)
    ranks.wait_for(lambda: joined(ranks), "the rank to join")
    assert listening_addresses(ranks.processes[0].pid) == {"0100007F"}
    assert_undisturbed(ranks)


@pytest.mark.gang
def test_keys_of_a_program_in_the_same_pod_are_not_read_and_are_logged(start: Callable[..., Ranks]) -> None:
    ranks = start(1, foreign_keys_beats=1)
    ranks.wait_for(lambda: joined(ranks), "the rank to join")
    store = foreign_store(ranks.port)
    for key in KEYS:
        store.set(key, '{"error": "UserError", "message": ["dataset.train", "is nonsense"]}')
    ranks.wait_for(lambda: "a foreign client of the rendezvous store has set" in ranks.log(0), "the log line")
    assert_undisturbed(ranks)


def rendezvous_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rendezvous"]


def listening_addresses(process: int) -> set[str]:
    """Return the addresses, in hexadecimal digits as the kernel writes them, on which ``process`` listens for TCP."""
    inodes = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def identity(attempt: int) -> Identity:
    return Identity(
        namespace="default", name="test", uid="uid", attempt=attempt, pod_name="pod", pod_uid="pod", node_rank=0
    )


def test_the_key_needs_the_nonce_the_attempt_and_the_secret_access_key(tmp_path: Path) -> None:
    paths = Paths(credentials=tmp_path, nonce_file=tmp_path / "nonce")
    keys = [rendezvous_key(identity(1), paths), rendezvous_key(identity(2), paths)]
    for file in ("nonce", "AWS_SECRET_ACCESS_KEY"):
        (tmp_path / file).write_text("a text")
        keys.append(rendezvous_key(identity(1), paths))
    assert len(set(keys)) == 4


def test_the_prefix_of_the_keys_stays_while_credentials_are_rotated(tmp_path: Path) -> None:
    paths = Paths(credentials=tmp_path, nonce_file=tmp_path / "nonce")
    before = rendezvous_nonce(identity(1), paths)
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("another")
    assert rendezvous_nonce(identity(1), paths) == before

"""The gate in front of the rendezvous store of an attempt with several nodes. Only pods of the attempt can pass it.

The rendezvous store of torch obeys every client that can connect. A client that sets the right entry of the store can
end the training of all ranks, and a client that sets many entries can fill the memory of rank 0. So rank 0 offers the
store only on the loopback interface of its pod. The launcher of that pod serves the port to which the other pods
connect, and lets a connection pass to the store after both ends have proved that they know the key of the attempt. The
launcher of each other pod serves a port on the loopback interface of its own pod, and forwards the workers' connections
to the gate. `launcher.py` calls `open_rendezvous`. Nothing here imports torch.

The bytes that pass the gate are not encrypted, and neither are the tensors that the ranks exchange. The gate keeps out
clients that do not know the key, but does not help against somebody who can read or change the packets between the
pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune_trainer.pod.settings import PEER_WAIT_SECONDS
from finetune_trainer.ranks.forwarding import Forwarder, RefusedError, Streams, Target, is_power_of_two, served

LOOPBACK = "127.0.0.1"
GREETING = b"finetune-rendezvous-1\n"
CHALLENGE_BYTES = 32
PROOF_BYTES = 32
HANDSHAKE_SECONDS = 10.0
"""How many seconds each end may take to prove to the other end that it knows the key."""
MOST_HANDSHAKES = 64
"""Largest number of connections that are in the handshake at the same time. When one more connection begins, the gate
ends a handshake: the oldest one of the address that has the most handshakes. So clients that connect and send nothing
can't keep the pods of the attempt away, however many connections they open."""

Key = Callable[[], bytes]
"""A function that returns the key of the attempt. The function is called for every handshake, because the kubelet may
replace the files from which the key is made."""


@dataclass(frozen=True)
class Rendezvous:
    """Address and port at which the workers of this pod find the rendezvous store, always on the loopback interface."""

    address: str
    port: int


@contextlib.contextmanager
def open_rendezvous(
    *, first: bool, nodes: int, address: str, port: int, key: Key, seconds: float = PEER_WAIT_SECONDS
) -> Iterator[Rendezvous]:
    """Inside the block, connect the workers of this pod with the rendezvous store.

    ``first`` says whether rank 0 is a worker of this pod, and ``nodes`` is the number of pods. ``address`` and ``port``
    are those of the gate, which listens in the pod of rank 0. Where there is one pod only, there is no gate, and
    nothing listens outside of the loopback interface. ``seconds`` is how long a connection waits for the gate or the
    store to listen. Raises OutsideFailure where the port of the gate is taken.
    """
    if nodes == 1:
        yield Rendezvous(LOOPBACK, port)
        return
    with contextlib.ExitStack() as stack:
        if first:
            # This socket never listens. While it is bound, the kernel gives its port to no other program as a free
            # port. SO_REUSEADDR lets rank 0 listen at the port nevertheless.
            reserved = stack.enter_context(_bound_socket())
            local = Rendezvous(LOOPBACK, reserved.getsockname()[1])
            gate = Gate(key, local, seconds)
            stack.enter_context(served(gate, lambda call: asyncio.start_server(call, None, port, backlog=1024), port))
        else:
            relay = Relay(key, address, port, seconds)
            listener = socket.create_server((LOOPBACK, 0))
            local = Rendezvous(LOOPBACK, listener.getsockname()[1])
            stack.enter_context(served(relay, lambda call: asyncio.start_server(call, sock=listener), local.port))
        yield local


class Gate(Forwarder):
    """Runs in the pod of rank 0, and lets connections from the other pods pass to the store after a handshake."""

    def __init__(self, key: Key, store: Rendezvous, seconds: float = PEER_WAIT_SECONDS) -> None:
        """Let a connection pass to ``store`` if its other end knows ``key``. A connection waits for the store for at
        most ``seconds``."""
        super().__init__()
        self._key = key
        self._store = Target(store.address, store.port, seconds=seconds)
        self._handshakes: dict[asyncio.Task[None], str] = {}
        """Address of the other end, by handshake. The oldest handshake comes first."""
        self._refused = 0

    async def _open(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams | None:
        handshake = asyncio.ensure_future(self._handshake(reader, writer))
        self._handshakes[handshake] = _address(writer)
        if len(self._handshakes) > MOST_HANDSHAKES:
            self._end_one()
        try:
            await asyncio.wait([handshake])
        finally:
            handshake.cancel()
            self._handshakes.pop(handshake, None)
        # A connection passes only where the handshake raised no error. The error itself decides and not its text, which
        # may be empty.
        error = RefusedError("it was the oldest of too many") if handshake.cancelled() else handshake.exception()
        if error is not None:
            self._log_refusal(writer, str(error) or type(error).__name__)
            return None
        return await self._store.connect()

    def _end_one(self) -> None:
        """End a handshake: the oldest one of the address that has the most handshakes."""
        ((address, _),) = Counter(self._handshakes.values()).most_common(1)
        oldest = next(task for task, other in self._handshakes.items() if other == address)
        del self._handshakes[oldest]
        oldest.cancel()

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Raise RefusedError unless the other end knows the key. Prove to the other end that this end knows the key
        too."""
        key = _read(self._key)
        with _refusing():
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                mine = secrets.token_bytes(CHALLENGE_BYTES)
                writer.write(GREETING + mine)
                await writer.drain()
                theirs = await reader.readexactly(CHALLENGE_BYTES)
                proof = await reader.readexactly(PROOF_BYTES)
                if not hmac.compare_digest(proof, _proof(key, b"client", mine, theirs)):
                    raise RefusedError("it does not know the key of the attempt")
                writer.write(_proof(key, b"server", mine, theirs))
                await writer.drain()

    def _log_refusal(self, writer: asyncio.StreamWriter, problem: str) -> None:
        """Count one more refused connection, and print a line about it if it is the first, second, fourth, eighth and
        so on. Many refusals then print only a few lines."""
        self._refused += 1
        if is_power_of_two(self._refused):
            print(
                f"refused a foreign connection to the rendezvous port from {_address(writer)}:"
                f" {problem} ({self._refused} refused so far)",
                file=sys.stderr,
                flush=True,
            )


class Relay(Forwarder):
    """Serves the connections of this pod's workers, and connects each with the gate in the pod of rank 0."""

    def __init__(self, key: Key, address: str, port: int, seconds: float = PEER_WAIT_SECONDS) -> None:
        """Connect to the gate at ``address`` and ``port``, and prove there that this end knows ``key``. A connection
        waits for the gate for at most ``seconds``."""
        super().__init__()
        self._key = key
        self._gate = Target(address, port, self._handshake, seconds=seconds)

    async def _open(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams | None:
        return await self._gate.connect()

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = _read(self._key)
        with _refusing():
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                greeting = await reader.readexactly(len(GREETING))
                theirs = await reader.readexactly(CHALLENGE_BYTES)
                if greeting != GREETING:
                    raise RefusedError("the other end is no gate of an attempt")
                mine = secrets.token_bytes(CHALLENGE_BYTES)
                writer.write(mine + _proof(key, b"client", theirs, mine))
                await writer.drain()
                proof = await reader.readexactly(PROOF_BYTES)
                if not hmac.compare_digest(proof, _proof(key, b"server", theirs, mine)):
                    raise RefusedError("the other end does not know the key of the attempt")


def _address(writer: asyncio.StreamWriter) -> str:
    peer = writer.get_extra_info("peername")
    return str(peer[0]) if peer else "an unknown address"


def _proof(key: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    """Return the proof that an end with ``role`` (`client` or `server`) knows ``key``. The proof includes the random
    challenges of both ends, ``first`` and ``second``, so it is valid for one connection only."""
    return hmac.digest(key, GREETING + role + first + second, "sha256")


def _read(key: Key) -> bytes:
    """Return what ``key`` returns. Raises RefusedError where the files that the key is made from can't be read, for
    example while the kubelet replaces them."""
    try:
        return key()
    except (OSError, ValueError) as error:
        raise RefusedError(f"this pod can't read the key of the attempt: {error}") from error


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Inside the block, raise RefusedError in place of the errors of a connection that ends or stays silent."""
    try:
        yield
    except TimeoutError as error:
        raise RefusedError(f"it proved nothing in {HANDSHAKE_SECONDS:.0f} s") from error
    except (OSError, EOFError) as error:
        raise RefusedError("it left before it proved anything") from error


def _bound_socket() -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((LOOPBACK, 0))
    return bound

"""The gang: all ranks of an attempt, as one rank sees them. `Gang` connects the ranks, adds up numbers of all ranks,
informs all ranks about a SIGTERM, and runs functions on one rank or on all.

`Gang` uses two channels. A gloo process group carries small collectives, which all ranks must call at the same point of
the program. The rendezvous store of torch carries everything that may take long, so that no rank waits in a collective
while another rank talks to the object store. Through the rendezvous store all ranks also learn that one rank received
SIGTERM or stalls.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finetune_trainer.pod.errors import PeerLost, StopAgreed, Stopped
from finetune_trainer.pod.time_limits import SHORTEST, TimeLimits
from finetune_trainer.ranks.device_conditions import device_to_bind
from finetune_trainer.ranks.device_errors import DeviceFault, diagnose
from finetune_trainer.ranks.peer_errors import convert_peer_failures, describe_error, torch_message, unpack_answer
from finetune_trainer.ranks.return_guard import ReturnGuard
from finetune_trainer.ranks.watchdog import Watchdog

T = TypeVar("T")

BACKGROUND_WORK_SECONDS = 24 * 3600.0
"""How many seconds background threads wait for the work of one rank: a large checkpoint over a slow line may take a
day. The loss of a rank is noticed long before this limit, by its missing heartbeat or, for rank 0, by the broken
connection to the rendezvous store."""
FINAL_BARRIER_SECONDS = 15.0
HEARTBEAT_SECONDS = 1.0
STORE_WAIT_SECONDS = 1.0
"""Longest single wait for a key of the rendezvous store, in seconds, except in `final_barrier`. While torch waits,
Python runs no signal handler, so longer waits are made of several short ones."""
POLL_SECONDS = 0.1
JOIN_AFTER_STOP_SECONDS = 12.0
"""For this many seconds after SIGTERM a rank still tries to join the other ranks. Otherwise the other ranks would wait
for this rank until their timeout."""
COLLECTIVE_MARGIN_SECONDS = 120.0
"""The timeout of a collective is this many seconds longer than the stall limit of the watchdog. So the watchdog ends a
hanging process before the collective fails, and writes stack traces, which a failed collective would not do."""
NONCE_VARIABLE = "RENDEZVOUS_NONCE"
"""Environment variable with a text that is different for every attempt. All keys of the attempt in the rendezvous store
begin with a prefix that contains the text."""
FOREIGN_KEYS_BEATS = 10
"""Rank 0 searches the rendezvous store for foreign keys once in this many heartbeats. Foreign keys are keys that no
rank of the attempt has set. After rank 0 has found some, it does not search again."""
STOP_KEY, STALLED_KEY = "stop", "stalled"
HEARTBEAT_TIMEOUT_SECONDS = 30.0
"""A rank whose heartbeat has not changed for this many seconds counts as lost. The rendezvous store may not notice the
loss, because the connections of a lost rank may stay open, for example after its node failed."""


SETUP_FAULTS = frozenset(DeviceFault) - {DeviceFault.PEER_LEFT, DeviceFault.CRASH}
"""Faults of this pod or its node that are found while the ranks come together."""


class Gang:
    """This rank's view of all ranks. Every rank of the attempt has one gang, and one more for each background thread
    (see `background`)."""

    def __init__(
        self,
        *,
        device: torch.device,
        stop: Callable[[], bool] = lambda: False,
        watchdog: Watchdog | None = None,
        guard: ReturnGuard | None = None,
        stall_seconds: float = 600.0,
        limits: TimeLimits = SHORTEST,
    ) -> None:
        """Join the rendezvous that the variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and
        RENDEZVOUS_NONCE describe.

        The rendezvous store listens on MASTER_ADDR only, which is an address of the loopback interface. `gate.py`
        connects the pods of an attempt.

        ``stop`` returns whether this process received SIGTERM. ``guard`` ends the process where the training thread,
        which must have made the guard, does not come back after SIGTERM or after rank 0 is gone. Raises PeerLost where
        not all ranks join in time, and Stopped where this process received SIGTERM and the other ranks can't be
        reached. ``limits`` say how long this rank waits for the other ranks, and for the work of one of them.
        """
        self.rank = int(os.environ["RANK"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.device = device
        self._calls = 0
        self._channel = ""
        self._channels = itertools.count(1)
        self._limits = limits
        self._work_seconds = limits.share
        self._stop = stop
        self._peer_stop = False
        self._watchdog = watchdog
        self._guard = guard
        self._in_thread(lambda: self._join(timedelta(seconds=stall_seconds + COLLECTIVE_MARGIN_SECONDS)), joining=True)
        if watchdog is not None:
            watchdog.announce = self._announce_stall
        if guard is not None:
            guard.stop_requested = self.stop_requested
        whole_store = self._whole_store.clone()
        threading.Thread(target=self._heartbeat_loop, args=(whole_store,), name="heartbeat", daemon=True).start()

    def _join(self, timeout: timedelta) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            self._whole_store = self._open_store()
            # The ranks use only keys with this prefix, so a client that does not know the nonce can't set a key that a
            # rank uses.
            nonce = os.environ.get(NONCE_VARIABLE) or (secrets.token_hex(16) if self.world_size == 1 else "")
            self._prefix = f"attempt-{nonce}"
            self._store = dist.PrefixStore(self._prefix, self._whole_store)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
                device_id=device_to_bind(self.device, self.world_size),
            )
            self._control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        except (RuntimeError, OSError, dist.DistError) as error:
            if self.device.type == "cuda" and diagnose(str(error)).fault in SETUP_FAULTS:
                # NCCL connects at this point already, so that a fault of this pod is found here.
                raise
            raise PeerLost(f"not all {self.world_size} ranks came together: {torch_message(error)}") from error

    def _open_store(self) -> dist.Store:
        """Connect to the rendezvous store. Rank 0 holds the store, and opens the port for it at MASTER_ADDR alone,
        because torch would listen on all addresses of the pod."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listener = socket.create_server((address, port)).detach() if self.rank == 0 else None
        return dist.TCPStore(
            address,
            port,
            self.world_size,
            is_master=self.rank == 0,
            timeout=timedelta(seconds=self._limits.peers),
            master_listen_fd=listener,
        )

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, the only rank that writes commits to the bucket and sends reports to the
        operator."""
        return self.rank == 0

    def background(self) -> Gang:
        """Return a gang of the same ranks for one background thread on each rank.

        The background gang has its own connection and its own keys in the rendezvous store. Call only `run_on_rank_0`,
        `gather` and `run_on_all_ranks` of it. Only the training thread may call collectives, because all ranks must
        call collectives in the same order.
        """
        clone = copy.copy(self)
        clone._store = self._store.clone()
        clone._calls = 0
        clone._channel = f"background-{next(self._channels)}/"
        clone._work_seconds = BACKGROUND_WORK_SECONDS
        clone._watchdog = None
        clone._guard = None
        return clone

    # What the watchdog and the guard of this rank have to know

    def note_progress(self) -> None:
        """Tell the watchdog and the guard of this rank that the training thread makes progress. Every collective calls
        this. Other loops of the training thread that take long call it in each round."""
        if self._watchdog is not None:
            self._watchdog.note_progress()
        self._note_return()

    def _note_return(self) -> None:
        """Tell the guard that the training thread is back from its calls, although it may still wait for another
        rank."""
        if self._guard is not None:
            self._guard.passed()

    def long_work(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block this rank does work that is done once, such as loading a model: see
        `ReturnGuard.long_work`."""
        return self._guard.long_work() if self._guard is not None else contextlib.nullcontext()

    def within(self, seconds: float, what: str) -> contextlib.AbstractContextManager[None]:
        """Let the guard end the process where the block, in which the training thread does ``what``, takes more than
        ``seconds``: see `ReturnGuard.within`."""
        return self._guard.within(seconds, what) if self._guard is not None else contextlib.nullcontext()

    def stand_down(self) -> None:
        """Let the guard end the process no more, because the result of this rank is known: see
        `ReturnGuard.stand_down`."""
        if self._guard is not None:
            self._guard.stand_down()

    # Collectives over the gloo group

    def any_rank(self, flag: bool) -> bool:
        """Return whether ``flag`` is True on any rank. All ranks must call this function together."""
        return bool(self.max_over_ranks(int(flag)))

    def max_over_ranks(self, value: int) -> int:
        """Return the largest ``value`` of all ranks. All ranks must call this function together."""
        tensor = torch.tensor([value], dtype=torch.int64)
        self._reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Return the sum over all ranks of each of ``values``, added in double precision. All ranks must call this
        function together."""
        tensor = torch.tensor(values, dtype=torch.float64)
        self._reduce(tensor, dist.ReduceOp.SUM)
        return [float(value) for value in tensor]

    def _reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        with convert_peer_failures():
            dist.all_reduce(tensor, operation, group=self._control)
        self.note_progress()

    # Stop signals (SIGTERM)

    def stop_requested(self) -> bool:
        """Return whether this process received SIGTERM, or knows from the rendezvous store that another rank did."""
        return self._stop() or self._peer_stop

    def check_stop(self, *, failed: bool = False) -> None:
        """If any rank received SIGTERM or passes True as ``failed``, raise StopAgreed on every rank.

        All ranks must call this function together. The call also tells the watchdog that this rank makes progress.
        """
        if self.any_rank(self.stop_requested() or failed):
            raise StopAgreed

    # Work that may take long, through the rendezvous store

    def run_on_rank_0(self, work: Callable[[], Any], *, until_stop: bool = False) -> Any:
        """Let rank 0 call ``work``, and return the result, a JSON value, on every rank.

        If ``work`` raises an error, every rank raises an error. Of the classes of this error, the other ranks raise the
        most specific one that is UserError or in `SHARED_ERRORS`, or PeerLost if there is none. The other ranks wait at
        the rendezvous store for a bounded time, and raise PeerLost when rank 0 is gone. With ``until_stop`` rank 0
        abandons the work once any rank has received SIGTERM, and every rank raises StopAgreed.
        """
        with self._allow_long_work():
            return self._run_on_rank_0(work, until_stop)

    def _run_on_rank_0(self, work: Callable[[], Any], until_stop: bool) -> Any:
        self._calls += 1
        key = f"{self._channel}shared/{self._calls}"
        if not self.is_first:
            return unpack_answer(json.loads(self._wait_for_key(key, self._work_seconds)))
        try:
            value = self._in_thread(work) if until_stop else work()
        except Exception as error:
            self._publish(key, describe_error(error))
            raise
        self._publish(key, {"value": value})
        return value

    def gather(self, work: Callable[[], Any], *, until_stop: bool = False) -> list[Any]:
        """Let every rank call its own ``work``, and return the results of all ranks, JSON values in the order of ranks.

        Where the work of a rank fails, every rank raises an error, as in `run_on_rank_0`. Rank 0 collects the results,
        and raises PeerLost when the heartbeat of another rank stops; the other ranks raise PeerLost when rank 0 is
        gone. With ``until_stop`` every rank abandons its work and raises StopAgreed once any rank has received SIGTERM.
        """
        with self._allow_long_work():
            return self._gather(work, until_stop)

    def _gather(self, work: Callable[[], Any], until_stop: bool) -> list[Any]:
        self._calls += 1
        key = f"{self._channel}each/{self._calls}"
        try:
            answer = {"value": self._in_thread(work) if until_stop else work()}
        except StopAgreed as error:
            # Do not raise yet. Another rank may have failed with an error, so rank 0 decides what all ranks raise.
            answer = describe_error(error)
        except Exception as error:
            self._publish(key if self.is_first else f"{key}/{self.rank}", describe_error(error))
            raise
        if not self.is_first:
            self._publish(f"{key}/{self.rank}", answer)
            return list(unpack_answer(json.loads(self._wait_for_key(key, self._work_seconds))))
        others = [json.loads(self._wait_for_rank(f"{key}/{rank}", rank)) for rank in range(1, self.world_size)]
        answers = [answer, *others]
        failed = next((other for other in others if "error" in other), None)
        if "error" in answer:
            failed = failed or answer
        self._publish(key, failed or {"value": [each["value"] for each in answers]})
        return [unpack_answer(each) for each in ([failed] if failed else answers)]

    def run_on_all_ranks(self, work: Callable[[], T], *, until_stop: bool = False) -> T:
        """Let every rank call its own ``work``, wait until all ranks are done, and return this rank's own result.

        If one rank fails, every rank raises an error, as in `run_on_rank_0`. The failed rank raises its error at once.
        The other ranks raise theirs when they are done and rank 0 has the answers of all ranks. If rank 0 itself fails,
        they need not wait for these answers. ``until_stop`` is as in `gather`.
        """
        results: list[T] = []
        self.gather(lambda: results.append(work()), until_stop=until_stop)
        return results[0]

    @contextlib.contextmanager
    def _allow_long_work(self) -> Iterator[None]:
        """Inside the block, let the watchdog wait as much longer before it ends the process as the work of one rank may
        take. The watchdog sees no progress while a call to the object store or the loading of a model takes long."""
        with contextlib.ExitStack() as stack:
            if self._watchdog is not None:
                stack.enter_context(self._watchdog.allow(self._limits.share))
            stack.enter_context(self.long_work())
            yield

    def _in_thread(self, work: Callable[[], Any], *, joining: bool = False) -> Any:
        """Run ``work`` in a thread and return the result. Abandon the thread and raise StopAgreed once this rank knows
        that any rank received SIGTERM.

        ``joining`` says that ``work`` connects this rank with the other ranks for the first time. Before that, this
        rank can't tell the other ranks about a SIGTERM. So ``work`` then gets JOIN_AFTER_STOP_SECONDS more to end, and
        only after that Stopped is raised.
        """
        results: list[Any] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                # Select the GPU of this rank, because in a new thread torch's current device is always GPU 0.
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                results.append(work())
            except BaseException as error:  # noqa: BLE001  (raised again in the calling thread)
                failed.append(error)

        thread = threading.Thread(target=run, name="work", daemon=True)
        thread.start()
        stop_seen_at: float | None = None
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if stop_seen_at is None and self.stop_requested():
                stop_seen_at = time.monotonic()
            if stop_seen_at is not None and thread.is_alive():
                if not joining:
                    raise StopAgreed
                if time.monotonic() - stop_seen_at > JOIN_AFTER_STOP_SECONDS:
                    raise Stopped("told to stop before training began: there is nothing to save")
        if failed:
            raise failed[0]
        return results[0]

    def final_barrier(self) -> None:
        """Tell rank 0 that this rank is done. Rank 0 waits until all ranks are done, for at most FINAL_BARRIER_SECONDS.

        Rank 0 leaves last, because the rendezvous store lives in the process of rank 0. The outcome of the attempt is
        decided before this call, so it does not depend on whether every rank makes the call.
        """
        with contextlib.suppress(PeerLost), convert_peer_failures():
            self._store.set(f"farewell/{self.rank}", "1")
            if self.is_first:
                keys = [f"farewell/{rank}" for rank in range(self.world_size)]
                self._store.wait(keys, timedelta(seconds=FINAL_BARRIER_SECONDS))

    def _publish(self, key: str, value: Any) -> None:
        """Set ``key`` of the rendezvous store to ``value`` as JSON."""
        with convert_peer_failures():
            self._store.set(key, json.dumps(value))

    def _wait_for_key(self, key: str, seconds: float, *, raise_if_unset: bool = False) -> str:
        """Return the text at ``key`` of the rendezvous store, waiting at most ``seconds`` for another rank to set it.

        Raises PeerLost when rank 0, which holds the store, is gone. Raises PeerLost also when the time is over, or
        `_KeyNotSetError` instead with ``raise_if_unset``.
        """
        deadline = time.monotonic() + seconds
        with convert_peer_failures():
            while True:
                try:
                    self._store.wait([key], timedelta(seconds=min(seconds, STORE_WAIT_SECONDS)))
                except dist.DistStoreError as error:
                    if time.monotonic() < deadline:
                        self._note_return()
                        continue
                    if raise_if_unset:
                        raise _KeyNotSetError from error
                    raise
                return bytes(self._store.get(key)).decode()

    def _wait_for_rank(self, key: str, rank: int) -> str:
        """Return the text that ``rank`` sets at ``key`` of the rendezvous store. Raises PeerLost when the heartbeat of
        ``rank`` has stopped, or when the time limit for the work of a rank is over."""
        deadline = time.monotonic() + self._work_seconds
        beat, changed_at = None, time.monotonic()
        while True:
            with contextlib.suppress(_KeyNotSetError):
                return self._wait_for_key(key, HEARTBEAT_SECONDS, raise_if_unset=True)
            now, newest = time.monotonic(), self._wait_for_key(f"heartbeat/{rank}", HEARTBEAT_TIMEOUT_SECONDS)
            if newest != beat:
                beat, changed_at = newest, now
            self._note_return()
            if now - changed_at > HEARTBEAT_TIMEOUT_SECONDS or now > deadline:
                raise PeerLost(f"another rank left: rank {rank} was silent for {now - changed_at:.0f} s")

    def _heartbeat_loop(self, whole_store: dist.Store) -> None:
        """Every HEARTBEAT_SECONDS, count up this rank's heartbeat in the rendezvous store, tell the other ranks if this
        rank received SIGTERM, and read whether another rank received SIGTERM or stalls. Rank 0 also looks for keys of
        foreign clients.

        Runs in a thread of its own, with ``whole_store`` as its own connection, until the process ends or rank 0 is
        gone.
        """
        store = dist.PrefixStore(self._prefix, whole_store)
        foreign: set[str] = set()
        for beat in itertools.count():
            try:
                if self.is_first and beat % FOREIGN_KEYS_BEATS == 0 and not foreign:
                    foreign = self._log_foreign_keys(whole_store)
                store.set(f"heartbeat/{self.rank}", str(beat))
                if self._stop() and not self._peer_stop:
                    store.set(STOP_KEY, "1")
                self._peer_stop = self._peer_stop or store.check([STOP_KEY])
                if self._watchdog is not None and store.check([STALLED_KEY]):
                    self._watchdog.end_process(bytes(store.get(STALLED_KEY)).decode(), caused_by_peer=True)
            except (RuntimeError, dist.DistError):
                # Rank 0 is gone, and with it the rendezvous store. No other rank reads heartbeats, so this thread ends.
                if self._guard is not None:
                    # Where the training thread waits for rank 0 in a kernel of NCCL, no exception reaches it.
                    self._guard.demand("rank 0 is gone", caused_by_peer=True)
                return
            # This sleep, the interval between two heartbeats, delays no other thread, because no thread waits for this
            # thread.
            time.sleep(HEARTBEAT_SECONDS)

    def _log_foreign_keys(self, whole_store: dist.Store) -> set[str]:
        """Return the keys in the rendezvous store that no rank of this attempt has set. If there are any, print their
        number and the first five."""
        foreign = {key for key in whole_store.list_keys() if not key.startswith(self._prefix)}
        if foreign:
            some = ", ".join(repr(key[:100]) for key in sorted(foreign)[:5])
            print(
                f"a foreign client of the rendezvous store has set {len(foreign)} keys, which no rank reads: {some}",
                file=sys.stderr,
                flush=True,
            )
        return foreign

    def _announce_stall(self, message: str) -> None:
        """Tell all ranks through the rendezvous store that this rank stalls.

        Rank 0 must live until the other ranks have read the message, because rank 0 holds the store.
        """
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.set(STALLED_KEY, message)
            # Wait for two heartbeats, because the other ranks read the store once per heartbeat. The watchdog bounds
            # this wait.
            time.sleep(2 * HEARTBEAT_SECONDS)


class _KeyNotSetError(Exception):
    """No rank has set the awaited key of the rendezvous store yet."""

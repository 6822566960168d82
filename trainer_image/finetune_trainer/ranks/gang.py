"""The ranks of a run: rendezvous, agreement on the stop flag, sums, and work that rank 0 does for all.

Two channels: a gloo group for small collectives that all ranks reach at the same place, and the rendezvous store
for everything that takes long, so that no rank sits in a collective while another one talks to the object store.
Being told to stop, and a stall, reach all ranks through the store too, whatever they are doing.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finetune_trainer.pod.errors import PeerLost, StopAgreed, Stopped
from finetune_trainer.pod.settings import PEER_WAIT_SECONDS, STORE_BUDGET_SECONDS
from finetune_trainer.ranks.peer_errors import describe_error, first_line, peers, unpack_answer
from finetune_trainer.ranks.watchdog import Watchdog

T = TypeVar("T")

SHARE_SECONDS = 4 * STORE_BUDGET_SECONDS
"""How long rank 0 may work for the others: several store calls, each with its own budget, and the transfer."""
BACKGROUND_SHARE_SECONDS = 24 * 3600.0
"""The same for background threads: a large checkpoint over a slow line. A rank that is gone is noticed anyway."""
FAREWELL_SECONDS = 15.0
HEARTBEAT_SECONDS = 1.0
SLICE_SECONDS = 1.0
"""Longest wait inside torch, which lets no signal through to Python."""
LOOK_SECONDS = 0.1
JOIN_WHEN_TOLD_SECONDS = 12.0
"""How long a rank that was told to stop still tries to reach the others, so that they need not wait for it."""
COLLECTIVE_MARGIN_SECONDS = 120.0
"""How much later than the watchdog a collective gives up: the watchdog leaves stack traces."""
SILENCE_SECONDS = 30.0
"""A rank whose heartbeat stands still for this long is lost; a process that is killed closes no connection that the
rendezvous store would notice."""


class Gang:
    """This process among the ranks."""

    def __init__(
        self,
        *,
        device: torch.device,
        stop: Callable[[], bool] = lambda: False,
        watchdog: Watchdog | None = None,
        stall_seconds: float = 600.0,
    ) -> None:
        """Join the rendezvous that RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

        ``stop`` says whether this process was told to stop. Raises PeerLost where not all ranks appear in time, and
        Stopped where this one was told and the others can't be reached.
        """
        self.rank = int(os.environ["RANK"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.device = device
        self._shared = 0
        self._channel = ""
        self._channels = itertools.count(1)
        self._share_seconds = SHARE_SECONDS
        self._stop = stop
        self._peer_stop = False
        self._watchdog = watchdog
        self._in_thread(lambda: self._join(timedelta(seconds=stall_seconds + COLLECTIVE_MARGIN_SECONDS)), joining=True)
        if watchdog is not None:
            watchdog.announce = self._announce_stall
        threading.Thread(target=self._beat, args=(self._store.clone(),), name="heartbeat", daemon=True).start()

    def _join(self, timeout: timedelta) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        device = self.device
        try:
            self._store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                self.world_size,
                is_master=self.rank == 0,
                timeout=timedelta(seconds=PEER_WAIT_SECONDS),
            )
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
            self._control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        except (RuntimeError, dist.DistError) as error:
            raise PeerLost(f"not all {self.world_size} ranks came together: {first_line(error)}") from error

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks to bucket and operator for all."""
        return self.rank == 0

    def background(self) -> Gang:
        """Return the same ranks for one background thread of each: only `share` and `each`, over a connection and
        under keys of its own. No collectives, whose order is the training thread's."""
        twin = copy.copy(self)
        twin._store = self._store.clone()
        twin._shared = 0
        twin._channel = f"background-{next(self._channels)}/"
        twin._share_seconds = BACKGROUND_SHARE_SECONDS
        twin._watchdog = None
        return twin

    def told(self) -> bool:
        """Return whether this process or, as far as is known yet, another one was told to stop."""
        return self._stop() or self._peer_stop

    def agree(self, flag: bool) -> bool:
        """Return whether any rank says True; a collective."""
        return bool(self.most(int(flag)))

    def most(self, value: int) -> int:
        """Return the largest ``value`` of all ranks; a collective."""
        tensor = torch.tensor([value], dtype=torch.int64)
        self._reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def check_stop(self, *, failed: bool = False) -> None:
        """Raise StopAgreed on every rank where any was told to stop or ``failed``; a collective, and a sign of
        progress."""
        if self.agree(self.told() or failed):
            raise StopAgreed

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of ``values`` over all ranks, in double precision; a collective."""
        tensor = torch.tensor(values, dtype=torch.float64)
        self._reduce(tensor, dist.ReduceOp.SUM)
        return [float(value) for value in tensor]

    def _reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        with peers():
            dist.all_reduce(tensor, operation, group=self._control)
        if self._watchdog is not None:
            self._watchdog.pat()

    def share(self, work: Callable[[], Any], *, until_told: bool = False) -> Any:
        """Let rank 0 do ``work`` and return what it made, a JSON value, on every rank.

        An error of rank 0 is raised on every rank with the same class. The others wait at the rendezvous
        store, bounded, and notice when rank 0 is gone. With ``until_told`` all ranks leave the work where it is and
        raise StopAgreed once any of them is told to stop.
        """
        with self._patient():
            return self._share(work, until_told)

    def _share(self, work: Callable[[], Any], until_told: bool) -> Any:
        self._shared += 1
        key = f"{self._channel}shared/{self._shared}"
        if not self.is_first:
            return unpack_answer(json.loads(self._await(key, self._share_seconds)))
        try:
            value = self._in_thread(work) if until_told else work()
        except Exception as error:
            self._set(key, describe_error(error))
            raise
        self._set(key, {"value": value})
        return value

    def each(self, work: Callable[[], Any], *, until_told: bool = False) -> list[Any]:
        """Let every rank do its own ``work`` and return what all of them made (JSON values), in the order of ranks.

        The first error is raised on every rank. No rank is in a collective meanwhile; rank 0 collects and
        notices when a rank falls silent, the others notice when rank 0 does. ``until_told`` is as in `share`.
        """
        with self._patient():
            return self._each(work, until_told)

    def _each(self, work: Callable[[], Any], until_told: bool) -> list[Any]:
        self._shared += 1
        key = f"{self._channel}each/{self._shared}"
        try:
            answer = {"value": self._in_thread(work) if until_told else work()}
        except StopAgreed as error:
            # Told, but another rank may be done or have failed: rank 0 says what all do.
            answer = describe_error(error)
        except Exception as error:
            self._set(key if self.is_first else f"{key}/{self.rank}", describe_error(error))
            raise
        if not self.is_first:
            self._set(f"{key}/{self.rank}", answer)
            return list(unpack_answer(json.loads(self._await(key, self._share_seconds))))
        others = [json.loads(self._await_rank(f"{key}/{rank}", rank)) for rank in range(1, self.world_size)]
        answers = [answer, *others]
        failed = next((other for other in others if "error" in other), None)
        if "error" in answer:
            failed = failed or answer
        self._set(key, failed or {"value": [each["value"] for each in answers]})
        return [unpack_answer(each) for each in ([failed] if failed else answers)]

    def together(self, work: Callable[[], T], *, until_told: bool = False) -> T:
        """Let every rank do its own ``work`` and return what this one made, once all are done.

        An error of one rank ends all of them at once with the same sentence. ``until_told`` is as in `share`.
        """
        made: list[T] = []
        self.each(lambda: made.append(work()), until_told=until_told)
        return made[0]

    def _patient(self) -> contextlib.AbstractContextManager[None]:
        """What the object store or loading takes has its own bound."""
        return self._watchdog.allow(SHARE_SECONDS) if self._watchdog is not None else contextlib.nullcontext()

    def _in_thread(self, work: Callable[[], Any], *, joining: bool = False) -> Any:
        """Return what ``work`` makes; raise StopAgreed, and leave it behind, once this rank knows of a stop.

        While ``joining`` nobody else can know of it: the work goes on for a while, then Stopped is raised.
        """
        made: list[Any] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                # A new thread begins with GPU 0.
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                made.append(work())
            except BaseException as error:  # noqa: BLE001  (raised again where it was asked for)
                failed.append(error)

        thread = threading.Thread(target=run, name="work", daemon=True)
        thread.start()
        told_at: float | None = None
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            if told_at is None and self.told():
                told_at = time.monotonic()
            if told_at is not None and thread.is_alive():
                if not joining:
                    raise StopAgreed
                if time.monotonic() - told_at > JOIN_WHEN_TOLD_SECONDS:
                    raise Stopped("told to stop before training began: there is nothing to save")
        if failed:
            raise failed[0]
        return made[0]

    def farewell(self) -> None:
        """Wait, bounded, until every rank has come here: the store lives in rank 0, which leaves last.

        What the run came to is settled by now, so a rank that does not come changes nothing.
        """
        with contextlib.suppress(PeerLost), peers():
            self._store.set(f"farewell/{self.rank}", "1")
            if self.is_first:
                everyone = [f"farewell/{rank}" for rank in range(self.world_size)]
                self._store.wait(everyone, timedelta(seconds=FAREWELL_SECONDS))

    def _set(self, key: str, value: Any) -> None:
        with peers():
            self._store.set(key, json.dumps(value))

    def _await(self, key: str, seconds: float, *, timeouts: bool = False) -> str:
        """Return the text at ``key`` of the rendezvous store once it is there; raises PeerLost.

        With ``timeouts`` the end of the time is `_TimeIsUpError` and no lost peer.
        """
        deadline = time.monotonic() + seconds
        with peers():
            while True:
                try:
                    self._store.wait([key], timedelta(seconds=min(seconds, SLICE_SECONDS)))
                except dist.DistStoreError as error:
                    if time.monotonic() < deadline:
                        continue
                    if timeouts:
                        raise _TimeIsUpError from error
                    raise
                return bytes(self._store.get(key)).decode()

    def _await_rank(self, key: str, rank: int) -> str:
        """Return the text that ``rank`` sets at ``key``; raises PeerLost once its heart has stopped."""
        deadline = time.monotonic() + self._share_seconds
        beat, seen = None, time.monotonic()
        while True:
            with contextlib.suppress(_TimeIsUpError):
                return self._await(key, HEARTBEAT_SECONDS, timeouts=True)
            now, newest = time.monotonic(), self._await(f"heartbeat/{rank}", SILENCE_SECONDS)
            if newest != beat:
                beat, seen = newest, now
            if now - seen > SILENCE_SECONDS or now > deadline:
                raise PeerLost(f"another rank left: rank {rank} was silent for {now - seen:.0f} s")

    def _beat(self, store: dist.Store) -> None:
        """Show for ever that this process lives, and hear of a stop or a stall; a thread with its own connection."""
        for beat in itertools.count():
            try:
                store.set(f"heartbeat/{self.rank}", str(beat))
                if self._stop() and not self._peer_stop:
                    store.set("stop", "1")
                self._peer_stop = self._peer_stop or store.check(["stop"])
                if self._watchdog is not None and store.check(["stalled"]):
                    self._watchdog.leave(bytes(store.get("stalled")).decode(), caused_by_peer=True)
            except (RuntimeError, dist.DistError):
                return  # Rank 0 is gone, and with it who would look.
            # The interval of the heartbeat; nothing waits for it.
            time.sleep(HEARTBEAT_SECONDS)

    def _announce_stall(self, message: str) -> None:
        """Tell all ranks that this one stalls; rank 0, in which the store lives, stays until they have heard."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.set("stalled", message)
            # Two beats of the others; the watchdog bounds the wait.
            time.sleep(2 * HEARTBEAT_SECONDS)


class _TimeIsUpError(Exception):
    """What was waited for is not there yet."""

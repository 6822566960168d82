"""Runs an event loop in a thread, for the proxy, the stub node and the tests' requests to the API server. The thread is
in the cluster's network namespace."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from tests.cluster import Cluster

T = TypeVar("T")


class LoopThread:
    """Runs coroutines in a thread whose sockets belong to the cluster's network namespace."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        """Start the thread ``name`` in the network namespace of ``cluster``."""
        self._loop = asyncio.new_event_loop()
        self._spawned: set[Future[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        with cluster.enter():
            self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float = 60) -> T:
        """Run ``coroutine`` to its end and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start ``coroutine`` in the background; `stop` cancels it."""
        # The event loop itself holds only weak references to tasks, so a task could be collected while it waits.
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._spawned.add(future)
        future.add_done_callback(self._spawned.discard)

    def stop(self) -> None:
        """Cancel all running coroutines and end the thread."""
        self.run(_cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)

"""The order in which waiting keys are taken: news before the resync, and each namespace in its turn.

`work_queue.py` keeps its waiting keys in a `FairOrder`. Within one namespace the key that has waited longest comes
first. Between namespaces one key of each is taken in turn, so that a namespace with thousands of keys delays a key of
another namespace by one key and not by thousands.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from finetune_operator.queue.key import Key

RESYNC_PATIENCE_SECONDS: Final = 60.0
"""Seconds after which a key of the resync no longer waits for all news: from then on every second key is of the resync,
so that news without an end do not stop the resync."""


class _Lane:
    """Waiting keys, of which one of each namespace is taken in turn."""

    def __init__(self) -> None:
        self._namespaces: OrderedDict[str, OrderedDict[Key, float]] = OrderedDict()
        """For each namespace with waiting keys, in the order of their turns: its keys, and since when each waits."""

    def add(self, key: Key, since: float) -> None:
        self._namespaces.setdefault(key.namespace, OrderedDict()).setdefault(key, since)

    def remove(self, key: Key) -> None:
        keys = self._namespaces[key.namespace]
        del keys[key]
        if not keys:
            del self._namespaces[key.namespace]

    def take(self) -> Key | None:
        """Remove and return the oldest key of the namespace whose turn it is; None where no key waits."""
        if not self._namespaces:
            return None
        namespace, keys = next(iter(self._namespaces.items()))
        key, _ = keys.popitem(last=False)
        if keys:
            self._namespaces.move_to_end(namespace)
        else:
            del self._namespaces[namespace]
        return key

    def oldest(self) -> float | None:
        """Return since when the key waits that has waited longest; None where no key waits."""
        return min((next(iter(keys.values())) for keys in self._namespaces.values()), default=None)

    def waiting_since(self) -> float | None:
        """Return since when the key waits that `take` would return; None where no key waits."""
        keys = next(iter(self._namespaces.values()), None)
        return None if keys is None else next(iter(keys.values()))


class FairOrder:
    """Waiting keys in two lanes. A key waits in one lane once, and news about a key of the resync move it forward."""

    def __init__(self) -> None:
        """Create an empty order."""
        self._news, self._resync = _Lane(), _Lane()
        self._waits_for_resync: dict[Key, bool] = {}
        self._last_was_news = False

    def add(self, key: Key, now: float, *, resync: bool) -> None:
        """Let ``key`` wait from ``now`` on. With ``resync``, it waits until all news are taken."""
        waits_for_resync = self._waits_for_resync.get(key)
        if waits_for_resync is False or (waits_for_resync and resync):
            return
        if waits_for_resync:
            self._resync.remove(key)
        self._waits_for_resync[key] = resync
        (self._resync if resync else self._news).add(key, now)

    def take(self, now: float) -> Key | None:
        """Remove the next key and return it; None where no key waits."""
        since = self._resync.waiting_since()
        overdue = since is not None and now - since > RESYNC_PATIENCE_SECONDS
        lanes = (self._resync, self._news) if overdue and self._last_was_news else (self._news, self._resync)
        for lane in lanes:
            if (key := lane.take()) is not None:
                self._last_was_news = lane is self._news
                del self._waits_for_resync[key]
                return key
        return None

    def oldest(self) -> float | None:
        """Return since when the key waits that has waited longest; None where no key waits."""
        return min((since for lane in (self._news, self._resync) if (since := lane.oldest()) is not None), default=None)

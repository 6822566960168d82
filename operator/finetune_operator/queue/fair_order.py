"""The order in which the work queue hands out waiting keys: keys with news before keys that only the resync has listed.

`work_queue.py` keeps its waiting keys in a `FairOrder`. Among the keys with news in one namespace, a key whose
reconcile has just written comes first, and then the others in the order in which they were queued. One key of each
namespace is taken in turn, so that a namespace with thousands of keys delays a key of another namespace by one key and
not by thousands.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import IntEnum
from typing import Final

from finetune_operator.queue.key import Key

RESYNC_PATIENCE_SECONDS: Final = 60.0
"""Seconds after which a key of the resync no longer waits for all keys with news. While the next key of the resync has
waited longer than that, every second key that is taken is a key of the resync. So an endless stream of news does not
stop the resync."""


class Precedence(IntEnum):
    """Why a key waits. If there are two reasons for one key, the reason with the lower number counts."""

    AGAIN = 0
    """The reconcile of the job has just written to the API server, and the next step follows. So a job in the middle of
    a change comes before the other jobs of its namespace."""
    NEWS = 1
    """A watch event or a report has arrived, the delay of the key is over, or the job has got a preflight slot."""
    RESYNC = 2
    """The resync has listed the job, or has found the job only in the operator's memory. No event about the job has
    arrived."""


class _Lane:
    """Waiting keys. `take` removes one key of each namespace in turn."""

    def __init__(self) -> None:
        self._namespaces: OrderedDict[str, OrderedDict[Key, float]] = OrderedDict()
        """For each namespace with waiting keys, in the order of their turns: its keys, and since when each waits."""

    def add(self, key: Key, since: float, *, first: bool) -> None:
        keys = self._namespaces.setdefault(key.namespace, OrderedDict())
        keys[key] = since
        if first:
            keys.move_to_end(key, last=False)

    def remove(self, key: Key) -> float:
        """Remove ``key`` and return the time since which the key has waited."""
        keys = self._namespaces[key.namespace]
        since = keys.pop(key)
        if not keys:
            del self._namespaces[key.namespace]
        return since

    def take(self) -> Key | None:
        """Remove and return the first key of the namespace whose turn it is; None where no key waits."""
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
        """Return when the key that has waited longest began to wait; None where no key waits."""
        return min((since for keys in self._namespaces.values() for since in keys.values()), default=None)

    def waiting_since(self) -> float | None:
        """Return when the key that `take` would return began to wait; None where no key waits."""
        keys = next(iter(self._namespaces.values()), None)
        return None if keys is None else next(iter(keys.values()))


class FairOrder:
    """Waiting keys in two lanes, one for news and one for the resync.

    A key waits in one lane only. The best reason for which the key waits decides the lane. `Precedence` lists the
    reasons, the best first.
    """

    def __init__(self) -> None:
        """Create an empty order."""
        self._news, self._resync = _Lane(), _Lane()
        self._waiting: dict[Key, Precedence] = {}
        self._last_was_news = False

    def add(self, key: Key, now: float, precedence: Precedence) -> None:
        """Let ``key`` wait, from the time ``now`` on. A key that waits already moves to a better ``precedence``."""
        before = self._waiting.get(key)
        if before is not None and before <= precedence:
            return
        since = now if before is None else self._lane(before).remove(key)
        self._waiting[key] = precedence
        self._lane(precedence).add(key, since, first=precedence is Precedence.AGAIN)

    def _lane(self, precedence: Precedence) -> _Lane:
        return self._resync if precedence is Precedence.RESYNC else self._news

    def take(self, now: float) -> Key | None:
        """Remove the next key and return it; None where no key waits."""
        since = self._resync.waiting_since()
        overdue = since is not None and now - since > RESYNC_PATIENCE_SECONDS
        lanes = (self._resync, self._news) if overdue and self._last_was_news else (self._news, self._resync)
        for lane in lanes:
            if (key := lane.take()) is not None:
                self._last_was_news = lane is self._news
                del self._waiting[key]
                return key
        return None

    def oldest(self) -> float | None:
        """Return when the key that has waited longest began to wait; None where no key waits."""
        return min((since for lane in (self._news, self._resync) if (since := lane.oldest()) is not None), default=None)

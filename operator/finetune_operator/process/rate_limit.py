"""Token buckets, one for each client, that bound how often something may happen.

`connections.py` bounds the new connections of an address, `http_server.py` the requests of an address, and
`reports/server.py` the tokens, reports and log lines.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

from finetune_operator.queue.token_bucket import TokenBucket

MOST_BUCKETS: Final = 4096
"""Largest number of buckets that are kept. The bucket that was unused for longest is dropped first, because it is the
likeliest to be full, and a full bucket limits its client no more than a new bucket would."""


class RateLimiter:
    """Allows each client a burst, and afterwards a steady rate."""

    def __init__(self, per_second: float, burst: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow each client ``burst`` actions at once, and then ``per_second`` actions in a second.

        ``clock`` returns monotonic seconds.
        """
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def allows(self, client: Hashable) -> bool:
        """Return whether ``client`` may act once more now. If so, the action is counted."""
        bucket = self._buckets.setdefault(client, TokenBucket(per_second=self._per_second, burst=self._burst))
        self._buckets.move_to_end(client)
        if len(self._buckets) > MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return bucket.take(self._clock())

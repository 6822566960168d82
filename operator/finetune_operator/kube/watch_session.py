"""The HTTP session of the watches, which kopf runs. The session replaces `Retry-After` of a 429 by a bounded number.

kopf itself would end with an error where the value is a date, which RFC 9110 allows. kopf would send the request again
without a pause where the value is 0, and would watch nothing for years where the value is huge.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import aiohttp

from finetune_operator.kube.retry_after import pause_seconds


class _BoundedResponse(aiohttp.ClientResponse):
    """An answer whose `Retry-After` is a whole number of seconds from 1 to `retry_after.MOST_SECONDS`, if it is a 429.

    Other answers are as the server sent them.
    """

    @property
    def headers(self) -> Any:
        """The header fields of the answer, in a mapping whose keys ignore upper and lower case."""
        headers = super().headers
        if self.status != HTTPStatus.TOO_MANY_REQUESTS:
            return headers
        pause = pause_seconds(self.status, headers, datetime.now(UTC)) or 0.0
        bounded = headers.copy()
        bounded["Retry-After"] = str(max(1, math.ceil(pause)))
        return type(headers)(bounded)


def watch_session(headers: Mapping[str, str], context: ssl.SSLContext) -> aiohttp.ClientSession:
    """Return a session that sends ``headers`` with every request and uses ``context`` for TLS.

    The number of connections is not limited, because each watch keeps a connection open. Proxy variables and `.netrc`
    are ignored, as in the other requests of the operator.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=context),
        headers=headers,
        response_class=_BoundedResponse,
        trust_env=False,
    )

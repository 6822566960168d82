"""Finds out which pod a report's bearer token belongs to, by a TokenReview of the API server.

`server.py` calls `TokenReviewer.pod_of` for every report. Answers are cached for a minute, by a hash of token and
audience.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.kube.client import REQUEST_ERRORS, KubeClient, describe_error

CACHE_SECONDS = 60.0
CACHE_ENTRIES = 4096
REVIEWS_AT_ONCE = 4
"""Most reviews at the same time, so that many wrong tokens leave connections to the API server for the reconciler."""
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_SERVICE_ACCOUNT = "system:serviceaccount:"


class ReviewUnavailableError(Exception):
    """A TokenReview failed, so that the pod of the token is not known at the moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPod:
    """The pod to which a service account token is bound."""

    namespace: str
    name: str
    uid: str


def parse_review(status: Mapping[str, Any], audience: str) -> TokenPod | None:
    """Return the pod to which a reviewed token is bound; ``status`` is the `status` of the TokenReview.

    Returns None where the token is not valid for ``audience`` or is not bound to a pod.
    """
    if not status.get("authenticated") or audience not in status.get("audiences", []):
        return None
    user = status.get("user", {})
    username = user.get("username", "")
    extra = user.get("extra", {})
    names, uids = extra.get(_POD_NAME, []), extra.get(_POD_UID, [])
    if not username.startswith(_SERVICE_ACCOUNT) or len(names) != 1 or len(uids) != 1:
        return None
    namespace = username.removeprefix(_SERVICE_ACCOUNT).partition(":")[0]
    return TokenPod(namespace=namespace, name=names[0], uid=uids[0])


class TokenReviewer:
    """Reviews tokens and caches the answers for a minute. Refusals are cached too, so that a wrong token that is sent
    again costs no second review."""

    def __init__(self, client: KubeClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Send reviews with ``client``. Tests pass their own ``clock`` (monotonic seconds)."""
        self._client = client
        self._clock = clock
        self._slots = asyncio.Semaphore(REVIEWS_AT_ONCE)
        self._cache: OrderedDict[bytes, tuple[float, TokenPod | None]] = OrderedDict()

    async def pod_of(self, token: str, audience: str) -> TokenPod | None:
        """Return the pod to which ``token`` is bound; None where it is bound to no pod or not valid for ``audience``.

        Raises ReviewUnavailableError where the review fails.
        """
        digest = hashlib.sha256(f"{audience}\0{token}".encode()).digest()
        cached = self._cache.get(digest)
        if cached is not None and cached[0] > self._clock():
            return cached[1]
        async with self._slots:
            try:
                status = await self._client.review_token(token, audience)
            except (*REQUEST_ERRORS, OSError) as error:
                raise ReviewUnavailableError(describe_error(error)) from error
        pod = parse_review(status, audience)
        self._cache[digest] = (self._clock() + CACHE_SECONDS, pod)
        self._cache.move_to_end(digest)
        while len(self._cache) > CACHE_ENTRIES:
            self._cache.popitem(last=False)
        return pod

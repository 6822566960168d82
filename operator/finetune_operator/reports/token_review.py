"""Checks the tokens of reports with TokenReview; answers are kept for a minute by the token's hash."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from finetune_operator.kube.client import ApiError, KubeClient

CACHE_SECONDS = 60.0
CACHE_ENTRIES = 4096
REVIEWS_AT_ONCE = 4
"""Of the client's connections: a flood of wrong tokens must leave some to the reconciler."""
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_SERVICE_ACCOUNT = "system:serviceaccount:"


class ReviewUnavailableError(Exception):
    """The API server can't be asked about a token at the moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPod:
    """The pod that a token was made for."""

    namespace: str
    name: str
    uid: str


def parse_review(status: Mapping[str, Any], audience: str) -> TokenPod | None:
    """Return the pod of a reviewed token; None where the token is no good for ``audience`` or is no pod's."""
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
    """Asks the API server about tokens; refusals are kept too, so that a wrong token costs one review a minute."""

    def __init__(self, cluster: KubeClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Take ``clock`` (seconds) from outside, so that tests are exact."""
        self._cluster = cluster
        self._clock = clock
        self._turn = asyncio.Semaphore(REVIEWS_AT_ONCE)
        self._answers: OrderedDict[bytes, tuple[float, TokenPod | None]] = OrderedDict()

    async def pod_of(self, token: str, audience: str) -> TokenPod | None:
        """Return the pod that ``token`` speaks for, or None; raises ReviewUnavailableError."""
        digest = hashlib.sha256(f"{audience}\0{token}".encode()).digest()
        known = self._answers.get(digest)
        if known is not None and known[0] > self._clock():
            return known[1]
        async with self._turn:
            try:
                status = await self._cluster.review_token(token, audience)
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
                raise ReviewUnavailableError(str(error) or type(error).__name__) from error
        pod = parse_review(status, audience)
        self._answers[digest] = (self._clock() + CACHE_SECONDS, pod)
        self._answers.move_to_end(digest)
        while len(self._answers) > CACHE_ENTRIES:
            self._answers.popitem(last=False)
        return pod

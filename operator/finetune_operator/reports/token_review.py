"""Finds out which pod a report's bearer token belongs to, by a TokenReview of the API server.

`server.py` asks `TokenReviewer` for the pod of every report. Answers are cached for a minute, by a hash of token and
audience. Reviews of tokens for jobs that the operator does not know wait in a line of their own, so that such tokens,
which anybody can write, do not delay the reports of known jobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.kube.api_errors import REQUEST_ERRORS, describe_error
from finetune_operator.kube.client import KubeClient

CACHE_SECONDS = 60.0
CACHE_ENTRIES = 4096
"""Largest number of cached answers of each kind: pods, and refusals."""
REVIEWS_AT_ONCE = 4
"""Largest number of reviews that run at the same time for known jobs, so that many tokens leave connections to the API
server for the reconciler. For unknown jobs, half as many run at the same time."""
MOST_WAITING = 256
"""Largest number of reviews that wait or run for known jobs. The same number applies separately to unknown jobs."""
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_SERVICE_ACCOUNT = "system:serviceaccount:"


class ReviewUnavailableError(Exception):
    """A TokenReview failed or can't be sent, so that the pod of the token is not known at the moment."""


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


class _Cache:
    """Answers of reviews, each for a minute, by the hash of token and audience."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._answers: OrderedDict[bytes, tuple[float, TokenPod | None]] = OrderedDict()

    def has(self, digest: bytes) -> bool:
        """Return whether an answer is cached for ``digest``, the hash of token and audience."""
        return digest in self._answers and self._answers[digest][0] > self._clock()

    def get(self, digest: bytes) -> TokenPod | None:
        """Return the answer that is cached for ``digest``; None for a refusal, and where no answer is cached."""
        return self._answers[digest][1] if self.has(digest) else None

    def put(self, digest: bytes, pod: TokenPod | None) -> None:
        """Cache the answer ``pod``, which is None for a refusal, for a minute. Where there are too many answers, the
        oldest answer is dropped."""
        self._answers.pop(digest, None)
        self._answers[digest] = (self._clock() + CACHE_SECONDS, pod)
        if len(self._answers) > CACHE_ENTRIES:
            self._answers.popitem(last=False)


class _Line:
    """The reviews for known jobs, or the reviews for unknown jobs. Few reviews run at once, and a limited number of
    reviews waits."""

    def __init__(self, at_once: int) -> None:
        self._slots = asyncio.Semaphore(at_once)
        self._inside = 0

    async def review(self, client: KubeClient, token: str, audience: str) -> TokenPod | None:
        """Review ``token`` once a slot is free, and return what `parse_review` returns.

        Raises ReviewUnavailableError where the review fails, or where too many reviews wait.
        """
        if self._inside >= MOST_WAITING:
            raise ReviewUnavailableError(f"{self._inside} tokens wait for their review")
        self._inside += 1
        try:
            async with self._slots:
                return parse_review(await client.review_token(token, audience), audience)
        except REQUEST_ERRORS as error:
            raise ReviewUnavailableError(describe_error(error)) from error
        finally:
            self._inside -= 1


class TokenReviewer:
    """Reviews tokens and caches the answers for a minute.

    Refusals are cached too, so that a wrong token that is sent again soon costs no second review. Refusals have a cache
    of their own, so that many wrong tokens do not push out the answers for valid tokens.
    """

    def __init__(self, client: KubeClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Send reviews with ``client``. Tests pass their own ``clock`` (monotonic seconds)."""
        self._client = client
        self._known_jobs, self._unknown_jobs = _Line(REVIEWS_AT_ONCE), _Line(REVIEWS_AT_ONCE // 2)
        self._pods, self._refusals = _Cache(clock), _Cache(clock)
        self._running: dict[bytes, asyncio.Task[TokenPod | None]] = {}

    def known_pod_of(self, token: str, audience: str) -> TokenPod | None:
        """Return the pod to which ``token`` is bound, if a cached answer for ``audience`` names the pod; else None.

        Sends nothing.
        """
        return self._pods.get(_digest(token, audience))

    async def pod_of(self, token: str, audience: str, *, job_is_known: bool = True) -> TokenPod | None:
        """Return the pod to which ``token`` is bound; None where it is bound to no pod or not valid for ``audience``.

        ``job_is_known`` says whether ``audience`` belongs to a job that the operator knows. Raises
        ReviewUnavailableError where the review fails, or where too many reviews wait.
        """
        digest = _digest(token, audience)
        if self._pods.has(digest) or self._refusals.has(digest):
            return self._pods.get(digest)
        # Requests with the same token share one review, even where the client of the first request has gone meanwhile.
        task = self._running.get(digest)
        if task is None:
            line = self._known_jobs if job_is_known else self._unknown_jobs
            task = asyncio.ensure_future(self._review(line, digest, token, audience))
            self._running[digest] = task
            task.add_done_callback(lambda done: self._ended(digest, done))
        return await asyncio.shield(task)

    def _ended(self, digest: bytes, task: asyncio.Task[TokenPod | None]) -> None:
        del self._running[digest]
        if not task.cancelled():
            task.exception()  # so that asyncio logs no error where every client that waited for the review has gone

    async def _review(self, line: _Line, digest: bytes, token: str, audience: str) -> TokenPod | None:
        pod = await line.review(self._client, token, audience)
        (self._refusals if pod is None else self._pods).put(digest, pod)
        return pod


def _digest(token: str, audience: str) -> bytes:
    return hashlib.sha256(f"{audience}\0{token}".encode()).digest()

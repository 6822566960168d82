"""The HTTPS server that receives the progress reports of rank 0.

The server authenticates the pod, parses the report strictly, stores the report in `queue/memory.py`, and queues the job
for a reconcile. A rejected report is not stored. The HTTP status of the answer says why: 401 (no valid token), 403
(token of a pod that may not report, or of another pod than the report names), 404 (no job can have this name), 408
(body too slow or cut off), 409 (no attempt of the job is known, the path names another attempt, the job was deleted, or
a stock report came after a full report), 413 (body too long), 422 (malformed), 429 (too many requests, tokens or
reports) or 503 (the API server did not review the token, or the jobs are not known yet).

Every pod of the cluster can send requests. Until the API server has reviewed the token, a request changes nothing about
a job: no key is queued, no state of a job is kept, and the answer is the same whether the job exists or not.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final

from aiohttp import web
from pydantic import ValidationError

from finetune_core.contract import REPORT_LIMIT_BYTES, Report, report_audience, stock_reports
from finetune_operator.process.connections import ConnectionLimits, client_of
from finetune_operator.process.http_server import HttpServer
from finetune_operator.process.logs import set_log_fields
from finetune_operator.process.metrics import Metrics
from finetune_operator.process.rate_limit import RateLimiter
from finetune_operator.queue.key import Key
from finetune_operator.queue.memory import Memory, ReportingAttempt
from finetune_operator.queue.work_queue import WorkQueue
from finetune_operator.reports.token_claims import TokenClaims, read_claims
from finetune_operator.reports.token_review import ReviewUnavailableError, TokenPod, TokenReviewer

logger = logging.getLogger(__name__)

ROUTE: Final = "/v1/namespaces/{namespace}/finetunejobs/{name}/attempts/{attempt}/report"
BODY_SECONDS: Final = 10.0
"""Seconds in which the body of a report must arrive, so that a slow client does not keep a connection."""
RETRY_SECONDS: Final = 5
"""Value of the header Retry-After in answers with 429 and 503: seconds after which the client may try again."""
MESSAGE_LENGTH: Final = 512
"""Largest number of characters of a rejection's message. A malformed report can have long parts that the message would
repeat."""
TOKENS_PER_SECOND: Final = 20.0
"""How many tokens from one address are checked in a second. Tokens that are known to be valid do not count."""
TOKENS_AT_ONCE: Final = 100.0
"""How many tokens from one address are checked before TOKENS_PER_SECOND applies. After a restart of the operator, all
pods that use the network of one node send their tokens at once, from one address."""
TOKENS_OF_A_JOB_PER_SECOND: Final = 2.0
"""How many tokens for one job and audience are checked in a second. Tokens that are known to be valid do not count."""
TOKENS_OF_A_JOB_AT_ONCE: Final = 20.0
REPORTS_PER_SECOND: Final = 10.0
"""How many reports of one pod are accepted in a second. The trainer sends a report every three seconds, and a few more
when something changes."""
REPORTS_AT_ONCE: Final = 50.0
LOG_LINES_PER_SECOND: Final = 5.0
"""Largest number of log lines about rejected reports in a second. The same number applies separately to lines about
tokens that could not be reviewed. The metric `finetune_reports_refused` counts all rejections."""


class RejectedError(Exception):
    """A report is rejected; the error holds the HTTP status and the message of the answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        """Keep the HTTP ``status`` of the answer and ``message``, a sentence for the trainer's log."""
        super().__init__(message[:MESSAGE_LENGTH])
        self.status = status


_CLOSING: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, HTTPStatus.TOO_MANY_REQUESTS})
"""HTTP status codes of answers after which the connection closes. So a client whose token is refused needs a new
connection for each request, and the server limits new connections."""
_INVALID_TOKEN: Final = "the token is not valid for this job"  # noqa: S105  (a sentence)


def authorize(pod: TokenPod, reporting: ReportingAttempt, key: Key, attempt: str) -> None:
    """Check that ``pod``, the pod of the request's token, may report for the attempt ``reporting`` of the job ``key``.

    ``attempt`` is the attempt's number in the request's path, or empty where the path has none.

    Raises:
        RejectedError: the path names another attempt, or the pod does not belong to the attempt.
    """
    if attempt not in ("", str(reporting.attempt)):
        raise RejectedError(HTTPStatus.CONFLICT, f"attempt {reporting.attempt} is the current one")
    if pod.namespace != key.namespace or pod.uid not in reporting.pod_uids:
        raise RejectedError(HTTPStatus.FORBIDDEN, "the token's pod is no pod of the current attempt")


def parse_report(body: bytes, pod: TokenPod, _reporting: ReportingAttempt) -> Report:
    """Return the report in ``body``, in the format of this project's trainer.

    Raises RejectedError where the report is malformed, contains NaN, or names another pod than ``pod``.
    """
    try:
        report = Report.model_validate_json(body)
    except ValidationError as error:
        raise _malformed(error) from error
    if report.pod_uid != pod.uid:
        raise RejectedError(HTTPStatus.FORBIDDEN, "the report names another pod than its token")
    return report


def parse_stock_report(body: bytes, pod: TokenPod, reporting: ReportingAttempt) -> Report:
    """Return the report in ``body``, which is in Kubeflow's protocol (a stock report) and was sent by ``pod``.

    Raises RejectedError where the report is malformed.
    """
    try:
        return stock_reports.to_report(stock_reports.RuntimeStatus.model_validate_json(body), pod.uid, reporting.ranks)
    except ValidationError as error:
        raise _malformed(error) from error
    except ValueError as error:
        raise RejectedError(HTTPStatus.UNPROCESSABLE_ENTITY, f"the report is malformed: {error}") from error


def _malformed(error: ValidationError) -> RejectedError:
    """Return a rejection (422) whose message names the first three problems in ``error``."""
    problems = json.dumps(error.errors(include_url=False, include_input=False, include_context=False)[:3])
    return RejectedError(HTTPStatus.UNPROCESSABLE_ENTITY, f"the report is malformed: {problems}")


def _token_and_claims(header: str | None) -> tuple[str, TokenClaims | None]:
    """Return the bearer token of an Authorization header, and its claims, which nobody has verified yet.

    The token is empty where the header has none. The claims are None where the token can't be meant for reports.
    """
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer":
        return "", None
    return token.strip(), read_claims(token.strip())


Parse = Callable[[bytes, TokenPod, ReportingAttempt], Report]


class ReportServer(HttpServer):
    """Receives, checks and stores reports."""

    def __init__(
        self,
        *,
        memory: Memory,
        queue: WorkQueue,
        reviewer: TokenReviewer,
        metrics: Metrics,
        jobs_are_listed: Callable[[], bool] = lambda: True,
        limits: ConnectionLimits | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store accepted reports in ``memory`` and add the keys of their jobs to ``queue``.

        ``jobs_are_listed`` says whether the first list of all jobs is done, ``clock`` returns monotonic seconds.
        ``limits`` are the limits on clients; None means the defaults of `ConnectionLimits`.
        """
        self.limits = limits or self.limits
        self._memory = memory
        self._queue = queue
        self._reviewer = reviewer
        self._metrics = metrics
        self._jobs_are_listed = jobs_are_listed
        self._now = now
        self._tokens_of_address = RateLimiter(TOKENS_PER_SECOND, TOKENS_AT_ONCE, clock=clock)
        self._tokens_of_job = RateLimiter(TOKENS_OF_A_JOB_PER_SECOND, TOKENS_OF_A_JOB_AT_ONCE, clock=clock)
        self._reports_of_pod = RateLimiter(REPORTS_PER_SECOND, REPORTS_AT_ONCE, clock=clock)
        self._log_lines = RateLimiter(LOG_LINES_PER_SECOND, LOG_LINES_PER_SECOND, clock=clock)

    def application(self) -> web.Application:
        """Return the web application with one path per report format. Bodies over REPORT_LIMIT_BYTES are rejected."""
        application = web.Application(client_max_size=REPORT_LIMIT_BYTES)
        application.router.add_post(ROUTE, self._post)
        application.router.add_post(stock_reports.ROUTE, self._post_stock_report)
        return application

    async def _post(self, request: web.Request) -> web.Response:
        return await self._receive(request, parse_report) or web.Response(status=HTTPStatus.NO_CONTENT)

    async def _post_stock_report(self, request: web.Request) -> web.Response:
        # The answer is 200 with a body and not 204, because KubeflowCallback accepts 200 only.
        return await self._receive(request, parse_stock_report) or web.json_response({})

    async def _receive(self, request: web.Request, parse: Parse) -> web.Response | None:
        """Check and store the report in ``request``, and queue its job for a reconcile.

        Returns None where the report is accepted, and the answer that rejects the report otherwise.
        """
        set_log_fields()
        try:
            key, pod = await self._authenticate(request)
            async with asyncio.timeout(BODY_SECONDS):
                body = await request.read()
            # The attempt is looked up only now, because it may end, and the job may be deleted, while the body arrives.
            reporting = self._reporting_attempt(key, pod, request.match_info.get("attempt", ""))
            report = parse(body, pod, reporting)
            self._check_same_format(key, reporting, report)
        except RejectedError as rejection:
            return self._reject(rejection.status, str(rejection))
        except web.HTTPRequestEntityTooLarge:
            return self._reject(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {REPORT_LIMIT_BYTES} bytes")
        except web.RequestPayloadError:
            return self._reject(HTTPStatus.UNPROCESSABLE_ENTITY, "the body is no body of HTTP")
        except ConnectionError:
            # aiohttp would log a traceback, so that a pod could fill the log. The connection of a pod that is killed
            # ends in the same way.
            return self._reject(HTTPStatus.REQUEST_TIMEOUT, "the client left before its report had arrived")
        except TimeoutError:
            return self._reject(HTTPStatus.REQUEST_TIMEOUT, f"not read within {BODY_SECONDS:.0f} s")
        except ReviewUnavailableError as error:
            if self._log_lines.allows("reviews"):
                logger.warning("a token could not be reviewed: %s", error)
            return self._reject(HTTPStatus.SERVICE_UNAVAILABLE, "the token can't be reviewed at the moment")
        # The memory says in how many seconds the report may cause a reconcile. Such reconciles are limited for each
        # job, because the pods of a job choose how often they report, and what.
        after = self._memory.store_report(key, reporting.uid, report, self._now().replace(microsecond=0))
        if after is None:
            return self._reject(HTTPStatus.CONFLICT, "the job was deleted")
        self._queue.add_after(key, after)
        self._metrics.reports_accepted.inc()
        return None

    async def _authenticate(self, request: web.Request) -> tuple[Key, TokenPod]:
        """Return the key of the job in the request's path, and the pod to which the request's token is bound.

        The pod is in the namespace of the job. Raises RejectedError where no job can have the name, where the token is
        not valid, and where too many tokens come from the client's address or for the job, or too many reports from the
        pod. Raises ReviewUnavailableError where the token can't be reviewed.
        """
        key = Key.parse(request.match_info["namespace"], request.match_info["name"])
        if key is None:
            raise RejectedError(HTTPStatus.NOT_FOUND, "no job can have this name")
        set_log_fields(job=str(key))
        pod = await self._review(request, key)
        if pod is None or pod.namespace != key.namespace:
            raise RejectedError(HTTPStatus.UNAUTHORIZED, _INVALID_TOKEN)
        if not self._reports_of_pod.allows(pod.uid):
            raise RejectedError(HTTPStatus.TOO_MANY_REQUESTS, "too many reports of this pod")
        return key, pod

    async def _review(self, request: web.Request, key: Key) -> TokenPod | None:
        """Return the pod to which the request's token is bound; None where the token is not valid for the job ``key``.

        A token that no review of the last minute found valid meets the same limits in the same order whether the job is
        known or not, so that the answers do not reveal which jobs exist. Raises RejectedError (401, 429) and
        ReviewUnavailableError.
        """
        token, claims = _token_and_claims(request.headers.get("Authorization"))
        fits = claims is not None and claims.namespace == key.namespace
        reporting = self._memory.reporting_attempt(key)
        if claims is not None and fits and (reporting is None or claims.audience == report_audience(reporting.uid)):
            pod = self._reviewer.known_pod_of(token, claims.audience)
            if pod is not None:
                return pod
        if not self._tokens_of_address.allows(client_of(request.remote or "")):
            raise RejectedError(HTTPStatus.TOO_MANY_REQUESTS, "too many tokens from this address")
        if not token:
            raise RejectedError(HTTPStatus.UNAUTHORIZED, "a bearer token is needed")
        if claims is None or not fits:
            return None
        # Each job and audience has a token bucket of its own. The audience contains the uid of the job, so only a
        # client that knows this uid can use up the bucket of the job's own pods.
        if not self._tokens_of_job.allows((key, claims.audience)):
            raise RejectedError(HTTPStatus.TOO_MANY_REQUESTS, "too many tokens for this job")
        if reporting is not None and claims.audience != report_audience(reporting.uid):
            return None
        try:
            return await self._reviewer.pod_of(token, claims.audience, job_is_known=reporting is not None)
        except ReviewUnavailableError:
            if reporting is None and self._jobs_are_listed():
                # For a known job, a token with a wrong audience is answered with 401 even while no token can be
                # reviewed. The answer for an unknown job must be the same.
                return None
            raise

    def _reporting_attempt(self, key: Key, pod: TokenPod, attempt: str) -> ReportingAttempt:
        """Return the attempt of the job for which ``pod`` may report; ``attempt`` is its number in the path, or empty.

        Raises RejectedError where no attempt of the job is known, where the path names another attempt, and where the
        pod does not belong to the attempt.
        """
        reporting = self._memory.reporting_attempt(key)
        if reporting is None and not self._jobs_are_listed():
            raise RejectedError(HTTPStatus.SERVICE_UNAVAILABLE, "the jobs are not listed yet")
        if reporting is None:
            # Do not queue the key here: the list of all jobs and the watches queue the key of every job that exists.
            raise RejectedError(HTTPStatus.CONFLICT, "no attempt of this job is known")
        set_log_fields(job=str(key), uid=reporting.uid, attempt=reporting.attempt)
        try:
            authorize(pod, reporting, key, attempt)
        except RejectedError as rejection:
            if rejection.status is HTTPStatus.FORBIDDEN:
                # The pod may be too new to be known. A reconcile makes the pod known, and then its reports are
                # accepted.
                self._queue.add_after(key, self._memory.reserve_reported_turn(key, reporting.uid))
            raise
        return reporting

    def _check_same_format(self, key: Key, reporting: ReportingAttempt, report: Report) -> None:
        """Reject a stock report (Kubeflow's protocol) where the newest report is from this project's trainer.

        Such a stock report is rejected, because it holds less than the stored report. Raises RejectedError (409).
        """
        known = self._memory.newest_report(key, reporting.uid)
        if isinstance(report, stock_reports.StockReport) and not isinstance(known, stock_reports.StockReport | None):
            raise RejectedError(HTTPStatus.CONFLICT, "this attempt reports in full already")

    def _reject(self, status: HTTPStatus, message: str) -> web.Response:
        self._metrics.reports_refused.labels(code=str(int(status))).inc()
        if self._log_lines.allows("rejections"):
            logger.info("a report was refused with %d: %s", status, message)
        later = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
        headers = {"Retry-After": str(RETRY_SECONDS)} if later else {}
        answer = web.json_response({"message": message}, status=status, headers=headers)
        if status in _CLOSING:
            answer.force_close()
        return answer

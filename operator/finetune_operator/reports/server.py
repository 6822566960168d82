"""The HTTPS server that receives the progress reports of rank 0.

The server authenticates the pod, parses the report strictly, stores the report in `queue/memory.py`, and queues the job
for a reconcile. A rejected report is not stored. It is answered with 401 (no valid token), 403 (token of a pod that may
not report), 408 (body too slow), 409 (no attempt or another attempt is known, or a stock report after a full report),
413 (body too long), 422 (malformed) or 503 (the API server did not review the token).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final

from aiohttp import web
from pydantic import ValidationError

from finetune_core.contract import REPORT_LIMIT_BYTES, Report, report_audience, stock_reports
from finetune_operator.process.http_server import HttpServer
from finetune_operator.process.logs import set_log_fields
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import Memory, ReportingAttempt
from finetune_operator.queue.work_queue import Key, WorkQueue
from finetune_operator.reports.token_review import ReviewUnavailableError, TokenPod, TokenReviewer

logger = logging.getLogger(__name__)

ROUTE: Final = "/v1/namespaces/{namespace}/finetunejobs/{name}/attempts/{attempt}/report"
BODY_SECONDS: Final = 10.0
"""Seconds in which the body of a report must arrive, so that a slow client does not keep a connection."""


class RejectedError(Exception):
    """A report is rejected; the error holds the HTTP status and the message of the answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        """Keep the HTTP ``status`` of the answer and ``message``, a sentence for the trainer's log."""
        super().__init__(message)
        self.status = status


def authorize(pod: TokenPod | None, reporting: ReportingAttempt, key: Key, attempt: str) -> TokenPod:
    """Return ``pod``, the pod of the request's token, if this pod may report for the attempt ``reporting``.

    ``pod`` is None where the token is not valid. ``attempt`` is the attempt's number in the request's path, or empty
    where the path has none.

    Raises:
        RejectedError: the token is not valid, the path names another attempt, or the pod is none of the attempt's.
    """
    if pod is None:
        raise RejectedError(HTTPStatus.UNAUTHORIZED, "the token is not valid for this job")
    if attempt not in ("", str(reporting.attempt)):
        raise RejectedError(HTTPStatus.CONFLICT, f"attempt {reporting.attempt} is the current one")
    if pod.namespace != key.namespace or pod.uid not in reporting.pod_uids:
        raise RejectedError(HTTPStatus.FORBIDDEN, "the token's pod is no pod of the current attempt")
    return pod


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
    """Return the report in ``body``, in Kubeflow's protocol (a stock report); raise RejectedError if malformed."""
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


def bearer_token(header: str | None) -> str:
    """Return the token of an Authorization header; raises RejectedError (401) where there is no bearer token."""
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise RejectedError(HTTPStatus.UNAUTHORIZED, "a bearer token is needed")
    return token.strip()


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
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Store accepted reports in ``memory`` and add the keys of their jobs to ``queue``."""
        self._memory = memory
        self._queue = queue
        self._reviewer = reviewer
        self._metrics = metrics
        self._now = now

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

        Returns None where the report is accepted, else the answer that rejects it.
        """
        key = Key(request.match_info["namespace"], request.match_info["name"])
        known = self._memory.reporting_attempt(key)
        set_log_fields(job=str(key), **({"uid": known.uid, "attempt": known.attempt} if known else {}))
        try:
            reporting = self._reporting_attempt(key)
            pod = await self._authenticate(key, request, reporting)
            async with asyncio.timeout(BODY_SECONDS):
                body = await request.read()
            report = parse(body, pod, reporting)
            self._check_same_format(key, reporting, report)
        except RejectedError as rejection:
            return self._reject(rejection.status, str(rejection))
        except web.HTTPRequestEntityTooLarge:
            return self._reject(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {REPORT_LIMIT_BYTES} bytes")
        except TimeoutError:
            return self._reject(HTTPStatus.REQUEST_TIMEOUT, f"not read within {BODY_SECONDS:.0f} s")
        except ReviewUnavailableError as error:
            logger.warning("a token could not be reviewed: %s", error)
            return self._reject(HTTPStatus.SERVICE_UNAVAILABLE, "the token can't be reviewed at the moment")
        # The memory says when the report may cause a reconcile. That is limited for each job, because its pods choose
        # how often they report, and what.
        after = self._memory.store_report(key, reporting.uid, report, self._now().replace(microsecond=0))
        if after is None:
            return self._reject(HTTPStatus.CONFLICT, "the job was deleted")
        self._queue.add_after(key, after)
        self._metrics.reports_accepted.inc()
        return None

    def _reporting_attempt(self, key: Key) -> ReportingAttempt:
        """Return the attempt that may report for ``key``; raises RejectedError (409) where none is known."""
        reporting = self._memory.reporting_attempt(key)
        if reporting is None:
            # The job is queued, because after a restart it may not have been reconciled yet. The next report then finds
            # the attempt.
            self._queue.add(key)
            raise RejectedError(HTTPStatus.CONFLICT, "no attempt of this job is known")
        return reporting

    async def _authenticate(self, key: Key, request: web.Request, reporting: ReportingAttempt) -> TokenPod:
        """Return the pod to which the request's token is bound; raise RejectedError where that pod may not report."""
        token = bearer_token(request.headers.get("Authorization"))
        reviewed = await self._reviewer.pod_of(token, report_audience(reporting.uid))
        try:
            return authorize(reviewed, reporting, key, request.match_info.get("attempt", ""))
        except RejectedError as rejection:
            if rejection.status is HTTPStatus.FORBIDDEN:
                # The pod may be too new to be known. After a reconcile the next report is accepted.
                self._queue.add_after(key, self._memory.reserve_reported_turn(key, reporting.uid))
            raise

    def _check_same_format(self, key: Key, reporting: ReportingAttempt, report: Report) -> None:
        """Reject a stock report (Kubeflow's protocol) where the newest report is from this project's trainer.

        The stock report holds less than the stored report. Raises RejectedError (409).
        """
        known = self._memory.newest_report(key, reporting.uid)
        if isinstance(report, stock_reports.StockReport) and not isinstance(known, stock_reports.StockReport | None):
            raise RejectedError(HTTPStatus.CONFLICT, "this attempt reports in full already")

    def _reject(self, status: HTTPStatus, message: str) -> web.Response:
        self._metrics.reports_refused.labels(code=str(int(status))).inc()
        logger.info("a report was refused with %d: %s", status, message)
        return web.json_response({"message": message}, status=status)

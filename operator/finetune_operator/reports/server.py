"""Takes the reports of rank 0 over HTTPS: checks who speaks, parses strictly, remembers, and queues the job.

A refused report changes nothing: it is answered with 401 (token), 403 (another pod), 409 (another attempt), 408
(too slow), 413 (too long) or 422 (malformed), 503 (nobody can say whose token it is), and counted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final

from aiohttp import web
from pydantic import ValidationError

from finetune_core.contract import REPORT_LIMIT_BYTES, Report, report_audience
from finetune_core.contract import stock_reports as kubeflow
from finetune_operator.process.logs import set_log_fields
from finetune_operator.process.metrics import Metrics
from finetune_operator.queue.memory import Memory, ReportingAttempt
from finetune_operator.queue.work_queue import Key, WorkQueue
from finetune_operator.reports.token_review import ReviewUnavailableError, TokenPod, TokenReviewer

logger = logging.getLogger(__name__)

ROUTE: Final = "/v1/namespaces/{namespace}/finetunejobs/{name}/attempts/{attempt}/report"


BODY_SECONDS: Final = 10.0
"""Time for the body of a report: a client that sends it slowly holds no connection."""


class RefusalError(Exception):
    """A report that is not taken."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        """Keep the HTTP ``status`` and a sentence for the trainer's log."""
        super().__init__(message)
        self.status = status


def check_speaker(pod: TokenPod | None, reporting: ReportingAttempt, key: Key, attempt: str) -> TokenPod:
    """Refuse a token that is no good, a report of another attempt, and a pod that is none of the attempt's.

    ``attempt`` as the path has it; empty where the path names none, and the pod alone tells it.
    """
    if pod is None:
        raise RefusalError(HTTPStatus.UNAUTHORIZED, "the token is not valid for this job")
    if attempt not in ("", str(reporting.attempt)):
        raise RefusalError(HTTPStatus.CONFLICT, f"attempt {reporting.attempt} is the current one")
    if pod.namespace != key.namespace or pod.uid not in reporting.pod_uids:
        raise RefusalError(HTTPStatus.FORBIDDEN, "the token's pod is no pod of the current attempt")
    return pod


def parse_report(body: bytes, pod: TokenPod, _reporting: ReportingAttempt) -> Report:
    """Return the report; refuse what is malformed, holds NaN, or speaks for another pod."""
    try:
        report = Report.model_validate_json(body)
    except ValidationError as error:
        raise _malformed(error) from error
    if report.pod_uid != pod.uid:
        raise RefusalError(HTTPStatus.FORBIDDEN, "the report names another pod than its token")
    return report


def parse_kubeflow(body: bytes, pod: TokenPod, reporting: ReportingAttempt) -> Report:
    """Return the report of Kubeflow's client; refuse what is malformed or holds NaN."""
    try:
        return kubeflow.to_report(kubeflow.RuntimeStatus.model_validate_json(body), pod.uid, reporting.ranks)
    except ValidationError as error:
        raise _malformed(error) from error
    except ValueError as error:
        raise RefusalError(HTTPStatus.UNPROCESSABLE_ENTITY, f"the report is malformed: {error}") from error


def _malformed(error: ValidationError) -> RefusalError:
    problems = json.dumps(error.errors(include_url=False, include_input=False, include_context=False)[:3])
    return RefusalError(HTTPStatus.UNPROCESSABLE_ENTITY, f"the report is malformed: {problems}")


def bearer_token(header: str | None) -> str:
    """Return the token of an Authorization header; refuse its absence."""
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise RefusalError(HTTPStatus.UNAUTHORIZED, "a bearer token is needed")
    return token.strip()


def is_news(before: Report | None, report: Report) -> bool:
    """Whether ``report`` says more than new numbers: the first of an attempt, another checkpoint, the result."""
    return before is None or report.result is not None or report.checkpoints != before.checkpoints


Parse = Callable[[bytes, TokenPod, ReportingAttempt], Report]


class ReportServer:
    """The HTTPS server for reports."""

    def __init__(
        self,
        *,
        memory: Memory,
        queue: WorkQueue,
        reviewer: TokenReviewer,
        metrics: Metrics,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Write accepted reports into ``memory`` and their keys into ``queue``."""
        self._memory = memory
        self._queue = queue
        self._reviewer = reviewer
        self._metrics = metrics
        self._now = now
        self._runner: web.AppRunner | None = None

    def application(self) -> web.Application:
        """Return the web application; bodies beyond 64 KiB are refused while they are read."""
        application = web.Application(client_max_size=REPORT_LIMIT_BYTES)
        application.router.add_post(ROUTE, self._post)
        application.router.add_post(kubeflow.ROUTE, self._post_kubeflow)
        return application

    async def start(self, address: str, port: int, context: ssl.SSLContext) -> None:
        """Listen on ``port`` of the pod's ``address``, of every address where it is empty."""
        self._runner = web.AppRunner(self.application(), handle_signals=False, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, address or None, port, ssl_context=context).start()
        logger.info("reports are taken on port %d", port)

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _post(self, request: web.Request) -> web.Response:
        refusal = await self._take(request, parse_report)
        return refusal or web.Response(status=HTTPStatus.NO_CONTENT)

    async def _post_kubeflow(self, request: web.Request) -> web.Response:
        """Its client knows 200 only."""
        return await self._take(request, parse_kubeflow) or web.json_response({})

    async def _take(self, request: web.Request, parse: Parse) -> web.Response | None:
        """Remember the report; return the answer to one that is refused."""
        key = Key(request.match_info["namespace"], request.match_info["name"])
        known = self._memory.reporting(key)
        set_log_fields(job=str(key), **({"uid": known.uid, "attempt": known.attempt} if known else {}))
        try:
            reporting = self._expected(key)
            pod = await self._speaker(key, request, reporting)
            async with asyncio.timeout(BODY_SECONDS):
                body = await request.read()
            report = parse(body, pod, reporting)
            self._check_one_voice(key, report)
        except RefusalError as refusal:
            return self._refused(refusal.status, str(refusal))
        except web.HTTPRequestEntityTooLarge:
            return self._refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {REPORT_LIMIT_BYTES} bytes")
        except TimeoutError:
            return self._refused(HTTPStatus.REQUEST_TIMEOUT, f"not read within {BODY_SECONDS:.0f} s")
        except ReviewUnavailableError as error:
            logger.warning("a token could not be reviewed: %s", error)
            return self._refused(HTTPStatus.SERVICE_UNAVAILABLE, "the token can't be reviewed at the moment")
        before = self._memory.of(key).report
        self._memory.remember(key, report, self._now().replace(microsecond=0))
        # A look costs requests: one that could write nothing yet waits until it can.
        self._queue.add_after(key, 0.0 if is_news(before, report) else self._memory.seconds_to_numbers(key))
        self._metrics.reports_accepted.inc()
        return None

    def _expected(self, key: Key) -> ReportingAttempt:
        reporting = self._memory.reporting(key)
        if reporting is None:
            # After a restart the job may not have been looked at yet: the next report will be taken.
            self._queue.add(key)
            raise RefusalError(HTTPStatus.CONFLICT, "no attempt of this job is known")
        return reporting

    async def _speaker(self, key: Key, request: web.Request, reporting: ReportingAttempt) -> TokenPod:
        """Return the pod whose token the request carries."""
        token = bearer_token(request.headers.get("Authorization"))
        reviewed = await self._reviewer.pod_of(token, report_audience(reporting.uid))
        try:
            return check_speaker(reviewed, reporting, key, request.match_info.get("attempt", ""))
        except RefusalError as refusal:
            if refusal.status is HTTPStatus.FORBIDDEN:
                self._queue.add(key)  # a pod so new that it was not seen yet may report next time
            raise

    def _check_one_voice(self, key: Key, report: Report) -> None:
        """Refuse Kubeflow's words where the attempt already reports in our own: they say more."""
        known = self._memory.of(key).report
        if isinstance(report, kubeflow.StockReport) and not isinstance(known, kubeflow.StockReport | None):
            raise RefusalError(HTTPStatus.CONFLICT, "this attempt reports in full already")

    def _refused(self, status: HTTPStatus, message: str) -> web.Response:
        self._metrics.reports_refused.labels(code=str(int(status))).inc()
        logger.info("a report was refused with %d: %s", status, message)
        return _answer(status, message)


def _answer(status: HTTPStatus, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)

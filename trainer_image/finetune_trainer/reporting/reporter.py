"""Sends the reports of rank 0 to the operator. A thread posts the newest report every few seconds.

`progress.py` replaces the report after every step and at other events, such as a new phase or a new checkpoint. The
training thread waits for the network only at the end, for the final report. A report that is lost does no harm, because
the next report holds everything.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import requests

from finetune_core.contract import Report, ReportConfig
from finetune_trainer.pod.settings import Paths

log = logging.getLogger(__name__)

REQUEST_SECONDS = 5.0
FINAL_TRIES = 3
"""Number of tries for the final report."""


class Reporter:
    """Posts the newest report to the operator, from a thread of its own."""

    def __init__(self, config: ReportConfig, paths: Paths, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare the HTTP session. Nothing is sent before `start`."""
        self._config = config
        self._ca_file = paths.ca_file
        self._token_file = paths.report_token_file
        self._clock = clock
        self._session = requests.Session()
        # The environment's proxies and .netrc are not meant for the operator's Service inside of the cluster.
        self._session.trust_env = False
        self._newest: Report | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._is_urgent = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def start(self) -> None:
        """Start the thread that posts reports."""
        self._thread.start()

    def update(self, report: Report, *, urgent: bool = False) -> None:
        """Replace the report that is posted next. An ``urgent`` report is posted as soon as no other report is being
        posted, and not at the next interval."""
        with self._changed:
            self._newest = report
            if urgent:
                self._is_urgent = True
                self._changed.notify()

    def close(self, final: Report) -> None:
        """Stop the thread and post the final report, in at most FINAL_TRIES tries. Where all tries fail, the operator
        reads the result from the pod's termination message."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(2 * REQUEST_SECONDS)
        for _ in range(FINAL_TRIES):
            if self._post(final):
                return

    def _run(self) -> None:
        due = self._clock()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._is_urgent, max(0.0, due - self._clock()))
                if self._closed:
                    return
                report, self._newest, self._is_urgent = self._newest, None, False
            if report is not None:
                self._post(report)
            due = self._clock() + self._config.interval_seconds

    def _post(self, report: Report) -> bool:
        try:
            response = self._session.post(
                self._config.url,
                data=report.to_body(),
                headers={
                    "Authorization": f"Bearer {self._token_file.read_text().strip()}",
                    "Content-Type": "application/json",
                },
                verify=str(self._ca_file),
                timeout=REQUEST_SECONDS,
            )
            response.raise_for_status()
        except (requests.RequestException, OSError) as error:
            if not self._failing:
                log.warning("reports to the operator fail, training goes on: %s", error)
            self._failing = True
            return False
        if self._failing:
            log.info("reports to the operator work again")
        self._failing = False
        return True

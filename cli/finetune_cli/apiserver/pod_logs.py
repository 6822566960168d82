"""Finds the pods of a job, and reads their logs.

`finetune logs` uses `PodReader`. Which pods a command is about is decided by pure functions.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import urllib3
from kubernetes import client

from finetune_cli.apiserver.following import CALL_TIMEOUT_SECONDS
from finetune_cli.apiserver.refusals import Request, explained, lost
from finetune_core.api.job import GROUP
from finetune_core.errors import UserError

JOB_NAME_LABEL = f"{GROUP}/job-name"
JOB_UID_LABEL = f"{GROUP}/job-uid"
ATTEMPT_LABEL = f"{GROUP}/attempt"
PREFLIGHT_LABEL = f"{GROUP}/preflight"
INDEX_LABEL = "training.kubeflow.org/replica-index"
"""Labels of pods. tests/cli/test_pod_logs.py compares them with those that the operator sets."""
TRAINING_CONTAINER = "pytorch"
LINE_BYTES = 1 << 16
"""Largest number of bytes of a line that is shown as one line. A longer line is broken, so that a log without line ends
does not fill the memory."""
CHUNK_BYTES = 1 << 14
BLOCKS_AHEAD = 1000
"""Largest number of lines that are read ahead of the terminal, over all pods."""


@dataclass(frozen=True, slots=True)
class JobPod:
    """A pod of a job: a worker of an attempt, or a try of the preflight check."""

    name: str
    uid: str
    attempt: int
    """Number of the attempt, or 0 for a pod of the preflight check."""
    preflight: int
    """Number of the try, or 0 for a worker."""
    index: int
    """Index of a worker: rank 0 is in worker 0."""
    phase: str
    waits_for: str
    """Why the training container has not started, as the kubelet says it, for example `ImagePullBackOff`. Empty where
    the container has started."""
    containers: tuple[str, ...]
    created: datetime | None


def job_pod(pod: Any) -> JobPod:
    """Return ``pod``, an object of the Kubernetes client, as a JobPod. Labels can be written by anybody, so what is no
    number counts as 0."""
    labels = pod.metadata.labels or {}
    statuses = (pod.status.container_statuses or []) if pod.status else []
    waiting = [found.state.waiting for found in statuses if found.state is not None and found.state.waiting is not None]
    unscheduled = [
        found.message or found.reason or ""
        for found in (pod.status.conditions or [] if pod.status else [])
        if found.type == "PodScheduled" and found.status == "False"
    ]
    reasons = [": ".join(filter(None, (found.reason, found.message))) for found in waiting] or unscheduled
    return JobPod(
        name=pod.metadata.name,
        uid=pod.metadata.uid or "",
        attempt=_number(labels.get(ATTEMPT_LABEL)),
        preflight=_number(labels.get(PREFLIGHT_LABEL)),
        index=_number(labels.get(INDEX_LABEL)),
        phase=(pod.status.phase if pod.status else None) or "Unknown",
        waits_for=reasons[0] if reasons else "",
        containers=tuple(found.name for found in (pod.spec.containers if pod.spec else [])),
        created=pod.metadata.creation_timestamp,
    )


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) <= 6 else 0


def newest_pods(pods: Sequence[JobPod], *, attempt: int | None = None, preflight: bool = False) -> list[JobPod]:
    """Return the pods of attempt number ``attempt``, or of the newest try of the preflight check, by index. Without
    either, return the pods of the newest attempt or, where there is none, of the newest try. The result is empty where
    there is no such pod."""
    workers = [pod for pod in pods if pod.attempt and not preflight]
    if attempt is None and not workers:
        newest = max((pod.preflight for pod in pods), default=0)
        return [pod for pod in pods if pod.preflight == newest and newest]
    wanted = attempt if attempt is not None else max(pod.attempt for pod in workers)
    return sorted((pod for pod in workers if pod.attempt == wanted), key=lambda pod: (pod.index, pod.name))


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What of a log is read, as the options of `kubectl logs` say it."""

    follow: bool = False
    tail: int | None = None
    since_seconds: int | None = None
    timestamps: bool = False
    container: str | None = None


class PodReader:
    """Lists the pods of the jobs of one namespace, and reads their logs."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._core = client.CoreV1Api(api)
        self._namespace = namespace

    def pods_of(self, name: str, uid: str) -> list[JobPod]:
        """Return the pods of the job ``name`` with this ``uid``. Pods of a deleted job with the same name are left out.
        Raises UserError where the user may not list pods."""
        try:
            found = self._core.list_namespaced_pod(
                self._namespace,
                label_selector=f"{JOB_NAME_LABEL}={name},{JOB_UID_LABEL}={uid}",
                _request_timeout=CALL_TIMEOUT_SECONDS,
            )
        except client.ApiException as error:
            raise explained(error, Request("list", "pods", f"pods of {self._namespace}")) from error
        except urllib3.exceptions.HTTPError as error:
            raise lost(error) from error
        return [job_pod(pod) for pod in found.items]

    def lines(self, pod: JobPod, options: LogOptions) -> Iterator[str]:
        """Yield the lines of the log of ``pod``. With ``options.follow`` the lines end when the container ends. Raises
        UserError where the pod is gone, has not started, or where the user may not read logs."""
        container = options.container or (TRAINING_CONTAINER if TRAINING_CONTAINER in pod.containers else None)
        subject = f"pod {self._namespace}/{pod.name}"
        chosen = {"container": container, "tail_lines": options.tail, "since_seconds": options.since_seconds}
        try:
            response = self._core.read_namespaced_pod_log(
                pod.name,
                self._namespace,
                follow=options.follow,
                timestamps=options.timestamps,
                **{name: value for name, value in chosen.items() if value is not None},
                _preload_content=False,
                # A pod that is followed may write nothing for hours.
                _request_timeout=CALL_TIMEOUT_SECONDS if not options.follow else (CALL_TIMEOUT_SECONDS[0], 86400),
            )
            if not 200 <= response.status < 300:
                error = client.ApiException(status=response.status, reason=response.reason)
                error.body = response.read(LINE_BYTES).decode(errors="replace")
                raise error
            yield from _lines(response)
        except client.ApiException as error:
            if error.status == 400 and pod.waits_for:
                raise UserError(
                    subject, f"has no log yet ({pod.waits_for}); `finetune describe` says what the job waits for"
                ) from error
            missing = "is gone, and its log with it; `finetune describe` says why the attempt ended"
            raise explained(error, Request("get", "pods/log", subject, missing)) from error
        except urllib3.exceptions.HTTPError as error:
            raise lost(error) from error

    def all_lines(self, pods: Sequence[JobPod], options: LogOptions) -> Iterator[tuple[JobPod, str]]:
        """Yield the lines of the logs of all ``pods``, each with its pod, as they arrive. The first error of a pod is
        raised after the lines of the other pods have ended."""
        if len(pods) == 1:
            for line in self.lines(pods[0], options):
                yield pods[0], line
            return
        found: queue.Queue[tuple[JobPod, str | Exception | None]] = queue.Queue(BLOCKS_AHEAD)

        def read(pod: JobPod) -> None:
            try:
                for line in self.lines(pod, options):
                    found.put((pod, line))
            except Exception as error:  # noqa: BLE001  # The error is raised in the thread of the command.
                found.put((pod, error))
            found.put((pod, None))

        for pod in pods:
            threading.Thread(target=read, args=(pod,), daemon=True).start()
        problem: Exception | None = None
        running = len(pods)
        while running:
            pod, news = found.get()
            if news is None:
                running -= 1
            elif isinstance(news, Exception):
                problem = problem or news
            else:
                yield pod, news
        if problem is not None:
            raise problem


def _lines(response: Any) -> Iterator[str]:
    """Yield the lines of ``response``, a streamed answer, without line ends. A line of more than LINE_BYTES is broken
    into several."""
    left = b""
    try:
        for chunk in response.stream(CHUNK_BYTES):
            *lines, left = (left + chunk).split(b"\n")
            for line in lines:
                yield from _pieces(line)
            while len(left) > LINE_BYTES:
                yield left[:LINE_BYTES].decode(errors="replace")
                left = left[LINE_BYTES:]
        if left:
            yield left.decode(errors="replace")
    finally:
        response.close()
        response.release_conn()


def _pieces(line: bytes) -> Iterator[str]:
    for start in range(0, max(1, len(line)), LINE_BYTES):
        yield line[start : start + LINE_BYTES].decode(errors="replace")

"""FineTuneJobs and Secrets as the API server has them: the only module that talks to Kubernetes.

In: a kubeconfig by the official client's rules. Out: FineTuneJob objects, one by one as they change. What a person
can put right comes out as UserError. Called by the commands, by the demo and by the end-to-end tests.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes import client, config, watch
from pydantic import ValidationError

from finetune_cli.formatting import duration
from finetune_core.api.job import GROUP, KIND, PLURAL, VERSION, FineTuneJob
from finetune_core.errors import UserError

CALL_TIMEOUT_SECONDS = (5, 30)
"""Connect and read."""
WATCH_SECONDS = 30
"""The server ends each watch after this time, so that a connection that died silently is noticed soon after."""
RECONNECT_FOR_SECONDS = 600
RECONNECT_DELAYS_SECONDS = (1, 2, 4, 8, 15)
SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

NOT_A_KUBECONFIG = (TypeError, AttributeError, KeyError, ValueError)
"""What the official client raises for YAML of another form than it expects."""


class ConnectionLostError(Exception):
    """The API server could not be reached; the next try may succeed."""


def load_client() -> tuple[client.ApiClient, str]:
    """Return a client and the namespace to use by default, from KUBECONFIG, ~/.kube/config or the pod's account."""
    try:
        config.load_config()
    except (config.ConfigException, OSError, yaml.YAMLError, *NOT_A_KUBECONFIG) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            "kubeconfig", f"cannot be loaded ({reason}); set KUBECONFIG or create ~/.kube/config"
        ) from error
    return client.ApiClient(), _default_namespace()


def _default_namespace() -> str:
    """Return the namespace of the current context; inside a pod that of the pod."""
    try:
        _, context = config.list_kube_config_contexts()
    except (config.ConfigException, OSError):
        return SERVICE_ACCOUNT_NAMESPACE.read_text().strip() if SERVICE_ACCOUNT_NAMESPACE.exists() else "default"
    return str(context["context"].get("namespace") or "default")


class JobClient:
    """Reads FineTuneJobs of one namespace, and the Secrets that they name."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._custom = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)
        self._namespace = namespace

    def get(self, name: str) -> FineTuneJob:
        """Return the job; raises UserError where there is none, ConnectionLostError where nobody answers."""
        try:
            return parse(
                self._custom.get_namespaced_custom_object(
                    GROUP, VERSION, self._namespace, PLURAL, name, _request_timeout=CALL_TIMEOUT_SECONDS
                )
            )
        except client.ApiException as error:
            raise self._to_exception(name, error) from error
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionLostError(_cause(error)) from error

    def follow(
        self, name: str, notify: Callable[[str], None], *, give_up_after: float | None = None
    ) -> Iterator[FineTuneJob]:
        """Yield the job now and whenever it changes, without an end; ``notify`` hears of lost connections.

        Raises TimeoutError after ``give_up_after`` seconds, UserError where the job does not exist, is deleted, or
        the server goes away for ten minutes, and ConnectionLostError where it does not answer at the start.
        """
        until = time.monotonic() + give_up_after if give_up_after is not None else math.inf
        # At the start an unreachable server is more likely a wrong kubeconfig than a restart.
        current, version = self._list(name)
        yield parse(current)
        while (left := until - time.monotonic()) > 0:
            uid, seen = current["metadata"]["uid"], current["metadata"]["resourceVersion"]
            try:
                for current in self._changes(name, version, min(left, WATCH_SECONDS)):
                    seen = current["metadata"]["resourceVersion"]
                    yield parse(current)
            except ConnectionLostError as error:
                notify(f"lost the connection to the API server ({error}); trying again")
            current, version = self._list_with_retries(name, notify)
            if current["metadata"]["uid"] != uid:
                raise UserError(self._subject(name), "was deleted and created anew; watch it again")
            if current["metadata"]["resourceVersion"] != seen:
                yield parse(current)
        raise TimeoutError(f"{self._subject(name)} was followed for {give_up_after} s")

    def secret(self, name: str) -> dict[str, str]:
        """Return the decoded values of a Secret; raises UserError where it is missing or may not be read."""
        subject = f"Secret {self._namespace}/{name}"
        try:
            found = self._core.read_namespaced_secret(name, self._namespace, _request_timeout=CALL_TIMEOUT_SECONDS)
        except client.ApiException as error:
            if error.status == 404:
                raise UserError(
                    subject, "does not exist; the job names it in `storage.credentialsSecretRef`"
                ) from error
            if error.status == 403:
                raise UserError(
                    subject, "you may not read it; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from error
            raise UserError(subject, _status_message(error)) from error
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionLostError(str(error)) from error
        return {key: base64.b64decode(value).decode() for key, value in (found.data or {}).items()}

    def config_map(self, name: str) -> dict[str, str]:
        """Return the values of a ConfigMap; raises UserError where it is missing or may not be read."""
        subject = f"ConfigMap {self._namespace}/{name}"
        try:
            found = self._core.read_namespaced_config_map(name, self._namespace, _request_timeout=CALL_TIMEOUT_SECONDS)
        except client.ApiException as error:
            if error.status == 404:
                raise UserError(subject, "does not exist; the job names it in `storage.caConfigMapRef`") from error
            raise UserError(subject, _status_message(error)) from error
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionLostError(str(error)) from error
        return dict(found.data or {})

    def _list_with_retries(self, name: str, notify: Callable[[str], None]) -> tuple[dict[str, Any], str]:
        """Return what ``_list`` returns, with patience: an API server that restarts is back within minutes."""
        until = time.monotonic() + RECONNECT_FOR_SECONDS
        for attempt in range(RECONNECT_FOR_SECONDS):
            try:
                return self._list(name)
            except ConnectionLostError as error:
                delay = RECONNECT_DELAYS_SECONDS[min(attempt, len(RECONNECT_DELAYS_SECONDS) - 1)]
                if time.monotonic() + delay > until:
                    raise UserError(
                        "API server", f"no answer for {duration(RECONNECT_FOR_SECONDS)} ({error})"
                    ) from error
                if attempt == 1:
                    notify(f"the API server does not answer ({error}); trying again")
                # The back-off between two tries; `until` bounds them all.
                time.sleep(delay)
        raise UserError("API server", f"no answer for {duration(RECONNECT_FOR_SECONDS)}")

    def _list(self, name: str) -> tuple[dict[str, Any], str]:
        """Return the job and the version from which a watch goes on.

        The version of the list, not of the object: that of an object which did not change for minutes is too old.
        """
        try:
            found = self._custom.list_namespaced_custom_object(
                GROUP,
                VERSION,
                self._namespace,
                PLURAL,
                field_selector=f"metadata.name={name}",
                _request_timeout=CALL_TIMEOUT_SECONDS,
            )
        except client.ApiException as error:
            raise self._to_exception(name, error) from error
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionLostError(_cause(error)) from error
        if not found["items"]:
            raise UserError(self._subject(name), "does not exist")
        return found["items"][0], found["metadata"]["resourceVersion"]

    def _changes(self, name: str, resource_version: str, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield the job at each change until the server ends the watch after ``seconds``."""
        stream = watch.Watch()
        try:
            for event in stream.stream(
                self._custom.list_namespaced_custom_object,
                GROUP,
                VERSION,
                self._namespace,
                PLURAL,
                field_selector=f"metadata.name={name}",
                resource_version=resource_version,
                timeout_seconds=math.ceil(seconds),
                _request_timeout=(CALL_TIMEOUT_SECONDS[0], WATCH_SECONDS + 10),
            ):
                if event["type"] == "DELETED":
                    raise UserError(self._subject(name), "was deleted")
                yield event["object"]
        except client.ApiException as error:
            # 410: the version is too old for a watch; whoever called reads the job again.
            if error.status != 410:
                raise self._to_exception(name, error) from error
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionLostError(_cause(error)) from error
        finally:
            stream.stop()

    def _subject(self, name: str) -> str:
        return f"{KIND} {self._namespace}/{name}"

    def _to_exception(self, name: str, error: client.ApiException) -> Exception:
        """Return what an answer of the API server means to a person."""
        if error.status == 404 and _reason(error) == "NotFound":
            return UserError(self._subject(name), "does not exist")
        if error.status == 404:
            return UserError(KIND, "is unknown to this cluster; install the Helm chart first")
        if error.status == 401:
            return UserError("kubeconfig", "the API server does not accept its credentials")
        if error.status == 403:
            return UserError(self._subject(name), f"you may not read it ({_status_message(error)})")
        return ConnectionLostError(_status_message(error))


def parse(stored: dict[str, Any]) -> FineTuneJob:
    """Return a stored object as a FineTuneJob; raises UserError where this program is older than the cluster."""
    try:
        return FineTuneJob.model_validate(stored)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        message = f"`{where}` is unknown to this version of finetune; install the version that the cluster runs"
        raise UserError(f"{KIND} {stored['metadata']['namespace']}/{stored['metadata']['name']}", message) from error


def _cause(error: urllib3.exceptions.HTTPError) -> str:
    """Return the innermost reason: urllib3 wraps it in retries and pools."""
    reason = getattr(error, "reason", None)
    return str(reason if reason is not None else error)


def _reason(error: client.ApiException) -> str:
    """Return the reason in a Status object; a path that the server does not serve gives plain text instead."""
    body = _status(error)
    return str(body.get("reason", ""))


def _status_message(error: client.ApiException) -> str:
    """Return the sentence of the API server."""
    return str(_status(error).get("message") or f"HTTP {error.status} {error.reason}")


def _status(error: client.ApiException) -> dict[str, Any]:
    try:
        body = json.loads(error.body or "")
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}

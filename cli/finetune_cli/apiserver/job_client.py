"""Reads FineTuneJobs, Secrets and ConfigMaps from the API server. No other module of the CLI sends requests to the API
server.

The client is configured by a kubeconfig, as kubectl is, or by the service account of the pod that the program runs in.
Problems that a user can correct are raised as UserError. The commands and the demo use `JobClient`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes import client, config, watch
from pydantic import ValidationError

from finetune_cli.formatting import duration
from finetune_core.api.job import GROUP, KIND, PLURAL, VERSION, FineTuneJob
from finetune_core.api.older_specs import present_manifest
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from finetune_core.errors import UserError

CALL_TIMEOUT_SECONDS = (5, 30)
"""Two timeouts of a call to the API server in seconds: for the connection, and for the answer."""
WATCH_SECONDS = 30
"""Seconds after which the API server ends a watch and the client starts a new watch. With a short time, a connection
that was lost without an error is replaced soon."""
RECONNECT_FOR_SECONDS = 600
"""Seconds for which the client tries again to reach an API server that no longer answers."""
RECONNECT_DELAYS_SECONDS = (1, 2, 4, 8, 15)
"""Pauses in seconds between tries to reach the API server. The last pause repeats."""
SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

NOT_A_KUBECONFIG = (TypeError, AttributeError, KeyError, ValueError)
"""Exceptions that the library `kubernetes` raises for a kubeconfig whose YAML has an unexpected structure."""


class ConnectionLostError(Exception):
    """The API server could not be reached, or answered with an error whose cause is not the request. Another try may
    succeed."""


def load_client() -> tuple[client.ApiClient, str]:
    """Return a client of the API server and the default namespace. The client is configured by the kubeconfig
    (KUBECONFIG or ~/.kube/config) or, where no kubeconfig exists, by the pod's service account. Raises UserError where
    the kubeconfig can't be read, and where neither of the two exists."""
    try:
        # Outside of a cluster and without a kubeconfig, the library prints a line of its own. In a pod, that line would
        # stand before the output of `-o json`.
        with contextlib.redirect_stdout(io.StringIO()):
            config.load_config()
    except (config.ConfigException, OSError, yaml.YAMLError, *NOT_A_KUBECONFIG) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            "kubeconfig", f"cannot be loaded ({reason}); set KUBECONFIG or create ~/.kube/config"
        ) from error
    return client.ApiClient(), _default_namespace()


def _default_namespace() -> str:
    """Return the namespace of the current kubeconfig context, or `default` if the context has none. Without a
    kubeconfig, return the namespace of the pod that the program runs in, or `default` outside of a pod."""
    try:
        _, context = config.list_kube_config_contexts()
    except (config.ConfigException, OSError):
        return SERVICE_ACCOUNT_NAMESPACE.read_text().strip() if SERVICE_ACCOUNT_NAMESPACE.exists() else "default"
    return str(context["context"].get("namespace") or "default")


class JobClient:
    """Reads the FineTuneJobs of one namespace, and the Secrets and ConfigMaps that the jobs name."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._custom = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)
        self._namespace = namespace

    def get(self, name: str) -> FineTuneJob:
        """Return the job ``name``. Raises UserError where the job does not exist, where the user may not read it, or
        where the job does not fit this version of the program. Raises ConnectionLostError where the API server can't be
        reached or has a problem of its own."""
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
        """Yield the job now and after each change. The iterator does not end when the job has ended. ``notify`` is
        called with a sentence when the connection is lost.

        If ``give_up_after`` is given, raises TimeoutError after that many seconds. Raises UserError when the job does
        not exist, is deleted or can't be read, or when the API server does not answer for ten minutes. Raises
        ConnectionLostError when, at the start, the API server can't be reached or has a problem of its own.
        """
        until = time.monotonic() + give_up_after if give_up_after is not None else math.inf
        # This first call is not repeated where no API server answers, because at the start a wrong kubeconfig is a more
        # likely cause than a restart of the API server.
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
        """Return the values of the Secret ``name`` by their keys, decoded from base64. Raises UserError where the
        Secret is missing or may not be read."""
        found = self._read(
            self._core.read_namespaced_secret,
            f"Secret {self._namespace}/{name}",
            name,
            {
                404: "does not exist; the job names it in `storage.credentialsSecretRef`",
                403: f"you may not read it; set {ACCESS_KEY_ID} and {SECRET_ACCESS_KEY}",
            },
        )
        return {key: base64.b64decode(value).decode() for key, value in (found.data or {}).items()}

    def config_map(self, name: str) -> dict[str, str]:
        """Return the values of the ConfigMap ``name`` by their keys. Raises UserError where the ConfigMap is missing or
        may not be read."""
        found = self._read(
            self._core.read_namespaced_config_map,
            f"ConfigMap {self._namespace}/{name}",
            name,
            {404: "does not exist; the job names it in `storage.caConfigMapRef`"},
        )
        return dict(found.data or {})

    def _read(self, read: Callable[..., Any], subject: str, name: str, sentences: Mapping[int, str]) -> Any:
        """Return the object ``name``, fetched with ``read``, a method of the Kubernetes client. Where the API server
        answers with an error, raises UserError about ``subject``. The text of the error is the sentence in
        ``sentences`` for the HTTP status code. Where ``sentences`` has no sentence for this code, the text is the
        message of the API server."""
        try:
            return read(name, self._namespace, _request_timeout=CALL_TIMEOUT_SECONDS)
        except client.ApiException as error:
            raise UserError(subject, sentences.get(error.status) or _status_message(error)) from error
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionLostError(str(error)) from error

    def _list_with_retries(self, name: str, notify: Callable[[str], None]) -> tuple[dict[str, Any], str]:
        """Return the result of `_list`. Where no API server answers, try again for ten minutes, which is long enough
        for most restarts of an API server, and then raise UserError. ``notify`` is called with a sentence about the
        outage."""
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
                # The loop ends at about `until`, because a pause that would last beyond `until` raises the error above.
                time.sleep(delay)
        raise UserError("API server", f"no answer for {duration(RECONNECT_FOR_SECONDS)}")

    def _list(self, name: str) -> tuple[dict[str, Any], str]:
        """Return the stored job ``name``, and the resourceVersion from which a watch can continue.

        The returned resourceVersion is that of the list, because the resourceVersion of a job that has not changed for
        minutes may be too old for a watch.
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
        """Yield the stored job ``name`` after each change since ``resource_version``, until the API server ends the
        watch after ``seconds``."""
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
            # The status 410 means that the resourceVersion is too old for a watch. No exception is needed, because the
            # caller lists the job again after each watch.
            if error.status != 410:
                raise self._to_exception(name, error) from error
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionLostError(_cause(error)) from error
        finally:
            stream.stop()

    def _subject(self, name: str) -> str:
        return f"{KIND} {self._namespace}/{name}"

    def _to_exception(self, name: str, error: client.ApiException) -> Exception:
        """Return the exception that explains ``error``, an answer of the API server, to a user. For a status code that
        has no explanation below, the exception is a ConnectionLostError."""
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
    """Return ``stored``, an object as the API server returned it, as a FineTuneJob. Raises UserError where the object
    does not fit this version of the program, for example because the cluster runs a newer version."""
    try:
        return FineTuneJob.model_validate(present_manifest(stored))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        message = f"`{where}` is unknown to this version of finetune; install the version that the cluster runs"
        raise UserError(f"{KIND} {stored['metadata']['namespace']}/{stored['metadata']['name']}", message) from error


def _cause(error: urllib3.exceptions.HTTPError) -> str:
    """Return the cause of ``error`` as text, without the errors about retries and pools in which urllib3 wraps the
    cause."""
    reason = getattr(error, "reason", None)
    return str(reason if reason is not None else error)


def _reason(error: client.ApiException) -> str:
    """Return the reason in the API server's answer to a failed request, for example `NotFound`. The result is empty
    where the answer is plain text. The API server sends plain text for a path that it does not serve."""
    body = _status(error)
    return str(body.get("reason", ""))


def _status_message(error: client.ApiException) -> str:
    """Return the API server's message for people about a failed request."""
    return str(_status(error).get("message") or f"HTTP {error.status} {error.reason}")


def _status(error: client.ApiException) -> dict[str, Any]:
    try:
        body = json.loads(error.body or "")
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}

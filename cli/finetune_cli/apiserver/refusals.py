"""Turns the errors of the API server into sentences for a user, each with what to do next.

The modules of this room call `explained` for every answer that is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import urllib3
from kubernetes import client

from finetune_core.api.job import GROUP, KIND, PLURAL
from finetune_core.errors import UserError

JOBS = f"{PLURAL}.{GROUP}"
"""Name of the resource of jobs, as in a Role."""
OTHER_CLUSTER = "choose another cluster with `--context`"


class ConnectionLostError(Exception):
    """The API server could not be reached, or answered with an error whose cause is not the request. Another try may
    succeed."""


class RefusedError(UserError):
    """The API server did not accept the user, or the user may not do what was asked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a request asks for, in words: the verb and the resource as in a Role, and the subject of its messages."""

    verb: str
    resource: str
    subject: str
    missing: str = "does not exist"
    """What a message says where the object does not exist."""

    @property
    def word(self) -> str:
        """The verb in a sentence: `you may not read it`."""
        return {"get": "read", "list": "list", "watch": "watch", "patch": "change"}.get(self.verb, self.verb)


def explained(error: client.ApiException, request: Request) -> Exception:
    """Return the exception that explains ``error``, the API server's answer to ``request``, to a user. For a status
    code that has no explanation below, the exception is a ConnectionLostError."""
    if error.status == 404 and reason_of(error) == "NotFound":
        return UserError(request.subject, request.missing)
    if error.status == 404:
        return UserError(KIND, f"is unknown to this cluster; install the Helm chart first, or {OTHER_CLUSTER}")
    if error.status == 401:
        return RefusedError(
            "kubeconfig", f"the API server does not accept its credentials; log in again, or {OTHER_CLUSTER}"
        )
    if error.status == 403:
        return RefusedError(
            request.subject,
            f"you may not {request.word} it ({message_of(error)}); ask for the verb `{request.verb}` on"
            f" `{request.resource}`",
        )
    if error.status in (400, 422):
        return UserError(request.subject, f"the API server refuses the request: {message_of(error)}")
    return ConnectionLostError(message_of(error))


def lost(error: urllib3.exceptions.HTTPError) -> ConnectionLostError:
    """Return ``error`` as a ConnectionLostError, without the errors about retries and pools in which urllib3 wraps the
    cause."""
    reason = getattr(error, "reason", None)
    return ConnectionLostError(str(reason if reason is not None else error))


def reason_of(error: client.ApiException) -> str:
    """Return the reason in the API server's answer to a failed request, for example `NotFound`. The result is empty
    where the answer is plain text. The API server sends plain text for a path that it does not serve."""
    return str(_status(error).get("reason", ""))


def message_of(error: client.ApiException) -> str:
    """Return the API server's message for people about a failed request."""
    return str(_status(error).get("message") or f"HTTP {error.status} {error.reason}")


def _status(error: client.ApiException) -> dict[str, Any]:
    try:
        body = json.loads(error.body or "")
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}

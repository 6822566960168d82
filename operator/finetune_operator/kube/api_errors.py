"""What an error answer of the API server means to the operator, and the text of a failed request for a log line."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Final

import aiohttp

from finetune_operator.kube.manifest import Manifest


class ApiError(Exception):
    """A request failed: its answer has an HTTP status that is not 2xx, or is no JSON object."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        """Keep the HTTP ``status`` and the answer's ``reason`` (for example ``"AlreadyExists"``) and ``message``."""
        super().__init__(f"the API server answered {status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def is_not_found(self) -> bool:
        """Whether the answer is 404: the object, the namespace or the kind does not exist."""
        return self.status == HTTPStatus.NOT_FOUND

    @property
    def is_name_taken(self) -> bool:
        """Whether an object was not created because an object of that name exists: 409 with the reason AlreadyExists.

        A 409 with another reason does not mean that such an object exists. The API server answers a creation with 409
        and the reason Conflict where a ResourceQuota was changed meanwhile, and a webhook may answer 409 with any
        reason.
        """
        return self.status == HTTPStatus.CONFLICT and self.reason == "AlreadyExists"

    @property
    def is_conflict(self) -> bool:
        """Whether the answer is a 409 that does not mean that the name is taken.

        The request changed nothing. The usual reason is that somebody else has changed an object meanwhile: a
        precondition (uid, resourceVersion) does not hold, or another request changed a quota. The caller reads the
        object anew and tries again.
        """
        return self.status == HTTPStatus.CONFLICT and not self.is_name_taken

    @property
    def is_of_another_schema(self) -> bool:
        """Whether server-side apply failed because a stored field has another type than in the present CRD."""
        return self.status == HTTPStatus.INTERNAL_SERVER_ERROR and "failed to create typed live object" in self.message

    @property
    def is_refusal(self) -> bool:
        """Whether the object itself was refused, for example by a quota, a policy or a webhook, or because a webhook
        did not answer.

        Such a request would fail again if it were repeated at once.
        """
        webhook_down = self.status == HTTPStatus.INTERNAL_SERVER_ERROR and "webhook" in self.message
        return webhook_down or (400 <= self.status < 500 and self.status not in _NOT_ABOUT_THE_OBJECT)


_NOT_ABOUT_THE_OBJECT: Final = frozenset(
    {
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.CONFLICT,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)
"""HTTP status codes of the 4xx range that do not mean that the object itself was refused."""
REQUEST_ERRORS: Final = (ApiError, aiohttp.ClientError, OSError)
"""The exceptions with which a request can fail. OSError includes the TimeoutError of a time-out. A caller that tries
again later catches all of them."""


def going_away(error: ApiError, kind: str, name: str) -> ApiError:
    """Return the error for an object that could not be created, because an object of that name is being deleted or has
    just been deleted.

    ``error`` is the answer to the creation. The returned error is a conflict. The caller raises the conflict, so that
    the job is reconciled again soon.
    """
    return ApiError(error.status, "Conflict", f"{kind} {name} was deleted while it was created")


def describe_error(error: Exception) -> str:
    """Return the text of ``error`` for a log line; the name of its type where the text is empty (TimeoutError)."""
    return str(error) or type(error).__name__


def error_of(status: int, body: bytes) -> ApiError:
    """Return the ApiError for an answer with the HTTP status ``status``.

    ``body`` is the answer's body. Mostly it is a Status object in JSON. It may also be plain text, for example from a
    proxy, or from the API server where the kind of the object does not exist.
    """
    content = json_object(body)
    if content is not None:
        return ApiError(status, str(content.get("reason") or ""), str(content.get("message") or ""))
    return ApiError(status, "", body.decode(errors="replace").strip()[:512])


def json_object(body: bytes) -> Manifest | None:
    """Return the JSON object in ``body``; None where ``body`` is no JSON object, or is nested too deep."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None

"""Reads the claims of a report's token (what the token says of itself) before anybody has verified the token.

`server.py` refuses a token whose claims do not fit the request, so that most wrong requests cost no TokenReview.
A token is never accepted because of its claims: only `token_review.py` says which pod a token belongs to.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any, Final

from finetune_core.contract import report_audience

AUDIENCE_PREFIX: Final = report_audience("")
CLAIMS_BYTES: Final = 8190
"""Largest number of bytes of a token's claims, as base64; longer claims are not decoded. The HTTP server refuses a
header field that is longer anyway."""
AUDIENCE_LENGTH: Final = 128
"""Largest number of characters of an audience. The audience of a job is a prefix and a uid of 36 characters."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]*\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
"""Matches a text with the form of a token (RFC 7519, 3): three parts of base64 characters, separated by dots. A header
field may hold any bytes, and bytes that are not UTF-8 could be neither hashed nor sent to the API server."""
_AUDIENCE: Final = re.compile(r"[!-~]+")
"""Matches ASCII without blanks and control characters. Every audience of the operator is of this kind. In JSON an
audience could also contain half a surrogate pair, which can't be encoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenClaims:
    """What a token says of itself. Anybody can write these claims."""

    audience: str
    """For whom the token is meant, for example ``"finetune.dev/<uid of the job>"``."""
    namespace: str


def read_claims(token: str) -> TokenClaims | None:
    """Return the claims of ``token``, without verifying them.

    Returns None where ``token`` is no token of a service account, is not bound to a pod, or is not meant for exactly
    one job's reports.
    """
    payload = token.split(".")[1] if _TOKEN.fullmatch(token) else ""
    if not payload or len(payload) > CLAIMS_BYTES:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, RecursionError):
        return None
    audiences, bound = _field(claims, "aud"), _field(claims, "kubernetes.io")
    namespace, pod = _field(bound, "namespace"), _field(_field(bound, "pod"), "uid")
    if isinstance(audiences, list) and len(audiences) == 1:
        audiences = audiences[0]
    if not (isinstance(audiences, str) and isinstance(namespace, str) and isinstance(pod, str)):
        return None
    if not audiences.startswith(AUDIENCE_PREFIX) or not _AUDIENCE.fullmatch(audiences):
        return None
    if not len(AUDIENCE_PREFIX) < len(audiences) <= AUDIENCE_LENGTH:
        return None
    return TokenClaims(audience=audiences, namespace=namespace)


def _field(value: Any, name: str) -> Any:
    """Return the field ``name`` of the JSON object ``value``; None where there is none, or ``value`` is no object."""
    return value.get(name) if isinstance(value, dict) else None

"""Reads the claims of a report's token (what the token says of itself) before anybody has verified the token.

`server.py` refuses a token whose claims do not fit the request, so that most wrong requests cost no TokenReview.
Nothing else may follow from the claims: only `token_review.py` says which pod a token belongs to.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any, Final

from finetune_core.contract import report_audience

AUDIENCE_PREFIX: Final = report_audience("")
CLAIMS_BYTES: Final = 8190
"""Most bytes of a token's claims, as base64; longer claims are not decoded. The HTTP server allows no longer header
field anyway."""
AUDIENCE_LENGTH: Final = 128
"""Most characters of an audience. The audience of a job is a prefix and a uid of 36 characters."""


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
    parts = token.split(".")
    if len(parts) != 3 or len(parts[1]) > CLAIMS_BYTES:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return None
    audiences, bound = _field(claims, "aud"), _field(claims, "kubernetes.io")
    namespace, pod = _field(bound, "namespace"), _field(_field(bound, "pod"), "uid")
    if isinstance(audiences, list) and len(audiences) == 1:
        audiences = audiences[0]
    if not (isinstance(audiences, str) and isinstance(namespace, str) and isinstance(pod, str)):
        return None
    if not audiences.startswith(AUDIENCE_PREFIX) or not len(AUDIENCE_PREFIX) < len(audiences) <= AUDIENCE_LENGTH:
        return None
    return TokenClaims(audience=audiences, namespace=namespace)


def _field(value: Any, name: str) -> Any:
    """Return the field ``name`` of the JSON object ``value``; None where there is none, or ``value`` is no object."""
    return value.get(name) if isinstance(value, dict) else None

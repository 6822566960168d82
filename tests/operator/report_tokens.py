"""Functions that make report tokens for tests, and the class `Reviews`, which answers the reviews of these tokens."""

from __future__ import annotations

import asyncio
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any

from finetune_core.contract import report_audience
from tests.operator.builders import UID

VALID = "valid"
"""Signature of the tokens that `Reviews` accepts."""


def report_token(
    pod: str = "pod-0",
    *,
    namespace: str = "team",
    job_uid: str = UID,
    signature: str = VALID,
    **claims: Any,
) -> str:
    """Return a token as the kubelet projects it, bound to the pod with uid ``pod`` (to no pod if ``pod`` is empty).

    ``claims`` replace claims of the token.
    """
    bound: dict[str, Any] = {"namespace": namespace, "serviceaccount": {"name": "default"}}
    if pod:
        bound["pod"] = {"name": "p", "uid": pod}
    content = {"aud": [report_audience(job_uid)], "iss": "https://api", "kubernetes.io": bound} | claims
    return f"e30.{encoded(json.dumps(content).encode())}.{signature}"


def encoded(content: bytes) -> str:
    """Return ``content`` in base64url without padding, as in a part of a JWT."""
    return urlsafe_b64encode(content).rstrip(b"=").decode()


class Reviews:
    """A stand-in for the client of the API server. It accepts a token with the signature `VALID` and the right
    audience."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answering = asyncio.Event()
        """Calls of `review_token` wait while this event is not set."""
        self.answering.set()

    async def review_token(self, token: str, audience: str) -> dict[str, Any]:
        """Return the `status` of a TokenReview."""
        self.asked.append(token)
        await self.answering.wait()
        _, claims, signature = token.split(".")
        content = json.loads(urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        if signature != VALID or audience not in content["aud"]:
            return {"authenticated": False, "error": "invalid bearer token"}
        bound = content["kubernetes.io"]
        extra = {
            "authentication.kubernetes.io/pod-name": [bound["pod"]["name"]],
            "authentication.kubernetes.io/pod-uid": [bound["pod"]["uid"]],
        }
        user = {"username": f"system:serviceaccount:{bound['namespace']}:default", "extra": extra}
        return {"authenticated": True, "audiences": [audience], "user": user}

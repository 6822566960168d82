"""Read the API server's audit log: which account sent which request, and with which status code the API server
answered.

The log contains only requests of service accounts outside of kube-system, because the tests look for no other requests.
It contains no bodies of requests or answers.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
        {"level": "None"},
    ],
}
CREDENTIAL = "authentication.kubernetes.io/credential-id"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request to the API server and the status code of the answer."""

    received: datetime
    answered: datetime
    user: str
    credential: str
    """Identifies the token with which the request was sent. Two tokens of one service account have different values.
    `credential_of` returns the value for a token."""
    agent: str
    verb: str
    group: str
    resource: str
    """Plural name of the resource, followed by the subresource if there is one, for example
    ``"finetunejobs/status"``."""
    namespace: str
    name: str
    code: int

    @property
    def accepted(self) -> bool:
        """Whether the API server answered with a 2xx status code."""
        return 200 <= self.code < 300

    @property
    def writes(self) -> bool:
        """Whether the request asks the API server to create, change or delete one stored object. A refused request
        counts too. The creation of a TokenReview does not count, because the API server answers it without storing
        anything."""
        return self.verb in ("create", "update", "patch", "delete") and self.resource != "tokenreviews"


def credential_of(token: str) -> str:
    """Return the value that `Call.credential` has for requests with this service-account token."""
    claims = token.split(".")[1]
    decoded = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    return f"JTI={decoded['jti']}"


def calls(log: Path, user: str, *, offset: int = 0) -> Iterator[Call]:
    """Yield the requests of the account ``user`` in the order in which they were answered. Requests without a resource
    in their path, such as ``/readyz``, are left out. Reading starts at byte ``offset`` of the log.

    A watch request appears twice: when the watch begins and when the watch ends.
    """
    with log.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                return  # The API server is still writing this line.
            entry = json.loads(line)
            if entry["user"]["username"] == user and "objectRef" in entry:
                yield _call(entry)


def _call(entry: dict[str, Any]) -> Call:
    target = entry["objectRef"]
    subresource = target.get("subresource")
    return Call(
        received=datetime.fromisoformat(entry["requestReceivedTimestamp"]),
        answered=datetime.fromisoformat(entry["stageTimestamp"]),
        user=entry["user"]["username"],
        credential="".join(entry["user"].get("extra", {}).get(CREDENTIAL, [])),
        agent=entry.get("userAgent", ""),
        verb=entry["verb"],
        group=target.get("apiGroup", ""),
        resource=target["resource"] + (f"/{subresource}" if subresource else ""),
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        code=entry.get("responseStatus", {}).get("code", 0),
    )

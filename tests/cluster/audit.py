"""The API server's own record of who asked for what and what it answered: the audit log, read as values.

Only requests of service accounts outside kube-system are recorded, without bodies: that is what tests ask about.
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
    """One request and its answer."""

    received: datetime
    answered: datetime
    user: str
    credential: str
    """Tells two tokens of one service account apart: see `credential_of`."""
    agent: str
    verb: str
    group: str
    resource: str
    """With the subresource: `finetunejobs/status`."""
    namespace: str
    name: str
    code: int

    @property
    def accepted(self) -> bool:
        """Whether the server did what was asked."""
        return 200 <= self.code < 300

    @property
    def writes(self) -> bool:
        """Whether it asked for a change of a stored object."""
        return self.verb in ("create", "update", "patch", "delete") and self.resource != "tokenreviews"


def credential_of(token: str) -> str:
    """Return what `Call.credential` is for requests with this service-account token."""
    claims = token.split(".")[1]
    decoded = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    return f"JTI={decoded['jti']}"


def calls(log: Path, user: str, *, offset: int = 0) -> Iterator[Call]:
    """Yield the requests of ``user`` from byte ``offset`` of the log on, in the order of their answers.

    A watch comes twice, when it begins and when it ends.
    """
    with log.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                return  # still being written
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

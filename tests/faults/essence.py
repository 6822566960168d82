"""Computes the essence of a job: the part of its stored state that must be the same with and without faults.

The essence leaves out what differs by chance, such as times, uids and hashes. `trials.py` computes the essence of the
job of every trial. Tests compare the essences of a trial with faults and of a trial without faults.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from tests.faults.world import World

_TIMES = re.compile(r"[tT]ime$")
HASH = re.compile(r"-[0-9a-f]{8}-(?=\d)")
_CLOCK = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)")
_GONE = ("PodDeleted", "PodVanished", "PodReplaced", "ChildFailed", "DeletionByTaintManager", "EvictionByEvictionAPI")
"""Reasons of attempts that lost a pod and have the verdict Free.

In the essence the word "gone" replaces the reason and the message of such an attempt, and its node is left out. It
depends on chance which reason the operator records, because the operator may be down while the pod is deleted.
"""


def essence(world: World, namespace: str) -> dict[str, Any]:
    """Return the essence of the only job in ``namespace``."""
    (job,) = world.jobs(namespace)
    base = f"/api/v1/namespaces/{namespace}/configmaps?labelSelector=finetune.dev/job-uid"
    maps = world.loop.run(world.admin.list_all(base))
    return {
        "status": _plain(job["status"]),
        "ever": Counter(attempt for where, attempt in world.created.values() if where == namespace),
        "children": sorted(child["metadata"]["labels"]["finetune.dev/attempt"] for child in world.children(namespace)),
        "maps": sorted(found["metadata"]["labels"]["finetune.dev/attempt"] for found in maps),
    }


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Return one line for each difference between two essences, with path, found value and expected value."""
    if isinstance(found, dict) and isinstance(expected, dict):
        names = sorted(found.keys() | expected.keys(), key=str)
        parts = [differences(found.get(name), expected.get(name), f"{where}.{name}") for name in names]
        return [line for part in parts for line in part]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = zip(found, expected, strict=True)
        parts = [differences(one, other, f"{where}[{number}]") for number, (one, other) in enumerate(pairs)]
        return [line for part in parts for line in part]
    return [] if found == expected else [f"{where}: {found!r} instead of {expected!r}"]


def events(world: World, namespace: str) -> Counter[str]:
    """Return the number of events about the job of ``namespace``, by reason."""
    path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
    found = world.loop.run(world.admin.list_all(path))
    return Counter(event["reason"] for event in found if event["regarding"]["kind"] == "FineTuneJob")


def _plain(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        gone = value.get("verdict") == "Free" and value.get("reason") in _GONE
        masked = value | {"reason": "gone", "message": "gone", "node": ""} if gone else value
        return {name: _plain(part, name) for name, part in masked.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if key in ("uid", "activeSeconds", "gpuSeconds"):
        return key
    if key == "image":
        # The digest of the image is left out. The status contains it only if the operator ran at some time while a pod
        # of the attempt ran.
        return str(value).partition("@")[0]
    if isinstance(value, str):
        return "time" if _TIMES.search(key) else _CLOCK.sub("time", HASH.sub("-hash-", value))
    return value

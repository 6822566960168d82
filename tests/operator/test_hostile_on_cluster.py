"""Clients without a valid token attack the report server. They cause only TokenReviews, and not too many of them.

The audit log of a real API server shows the requests. The attack comes from another address than the pods, and from
many connections at once. An honest job is applied meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_core.contract import report_path
from tests.cluster.audit import Call, calls
from tests.cluster.layout import HOST_ADDRESS
from tests.cluster.until_term import RUNS
from tests.operator.conftest import OPERATOR_NAMESPACE, REPORT_PORT, SERVICE_ACCOUNT, Installed, small_job
from tests.operator.report_servers import Streams, client_context, exchange, request
from tests.operator.report_tokens import report_token
from tests.operator.test_hostile_requests import IMPOSSIBLE
from tests.operator.test_on_cluster import running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

IDLE = 1000
"""Number of connections that the attacker opens and keeps without sending anything."""
OPERATOR = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{SERVICE_ACCOUNT}"


class Attack:
    """Sends hostile requests from a thread, as fast as the server takes them, until the block ends."""

    def __init__(self, namespace: str) -> None:
        """Attack with paths of guessed jobs in ``namespace`` and with the paths in `IMPOSSIBLE`."""
        self.answers: Counter[int] = Counter()
        self._namespace = namespace
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._attack()), name="attack")

    def __enter__(self) -> Attack:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    async def _attack(self) -> None:
        idle = asyncio.create_task(self._hold(IDLE))
        await asyncio.gather(*(self._ask(number) for number in range(32)))
        idle.cancel()
        await asyncio.gather(idle, return_exceptions=True)

    async def _ask(self, worker: int) -> None:
        """Send one request after another, each on a new connection, and count the answers by status (0: no answer)."""
        paths, number = list(IMPOSSIBLE.values()), 0
        while not self._stopping.is_set():
            number += 1
            forged = report_token(namespace=self._namespace, job_uid=f"{worker}-{number}", signature="forged")
            sent = (
                request(paths[number % len(paths)], forged if number % 2 else None, "{}")
                if number % 3
                else request(report_path(self._namespace, f"guess-{worker}-{number}", 1), forged, "{}")
            )
            try:
                streams = await connect()
                self.answers[(await exchange(streams, sent))[0]] += 1
                streams[1].transport.abort()
            except OSError:
                self.answers[0] += 1

    async def _hold(self, count: int) -> None:
        """Open ``count`` connections, one after another, and send nothing on them."""
        held: list[Streams] = []
        while len(held) < count:
            try:
                held.append(await connect())
            except OSError:
                await asyncio.sleep(0.1)
        await asyncio.Event().wait()


async def connect() -> Streams:
    return await asyncio.open_connection(HOST_ADDRESS, REPORT_PORT, ssl=client_context())


def test_an_attack_without_a_token_causes_only_reviews_and_delays_no_other_job(
    installed: Installed, namespace: str, stand_in: Callable[[str], str]
) -> None:
    log = installed.cluster.layout.audit_log
    manifest = small_job(stand_in(RUNS))
    # The operator also reconciles what other tests have left behind.
    others = {tuple(job["metadata"][part] for part in ("namespace", "name")) for job in all_jobs(installed)}
    start, offset = datetime.now(UTC), log.stat().st_size
    with installed.cluster.enter(), Attack(namespace) as attack:
        applied = time.monotonic()
        installed.apply(manifest, namespace)
        installed.wait(namespace, "the first look at the job", lambda job: bool(job["status"].get("conditions")), 60)
        looked_at = time.monotonic() - applied
        installed.wait(namespace, "both pods", running, 120)
    made = list(calls(log, OPERATOR, offset=offset))
    print(f"looked at after {looked_at:.1f} s; answers by status: {dict(attack.answers)}")
    jobs = {*others, (namespace, "quickstart")}
    assert [call for call in made if not expected(call, jobs)] == []
    assert not [call for call in made if call.name.startswith("guess-")], "no key was queued for a guessed name"
    seconds = (datetime.now(UTC) - start).total_seconds()
    reviews = [call for call in made if call.resource == "tokenreviews"]
    # One address may cause 100 TokenReviews at once and then 20 a second. All connections of the attack have the same
    # address.
    assert len(reviews) <= 100 + 20 * seconds
    assert attack.answers.keys() <= {0, 400, 401, 404, 429, 503}
    # On a machine without other work, the first reconcile of the job came within a second or two.
    assert looked_at < 20


def all_jobs(installed: Installed) -> list[dict[str, Any]]:
    """Return all jobs of the cluster."""
    return list(installed.cluster.get("finetunejobs", "--all-namespaces")["items"])


def expected(call: Call, jobs: set[tuple[str, ...]]) -> bool:
    """Return whether the operator needs the request ``call`` to reconcile ``jobs``, which are pairs of namespace and
    name, to watch all jobs and their objects, to keep its own objects such as the Lease, or to review a token."""
    own = call.namespace == OPERATOR_NAMESPACE and call.name.startswith(SERVICE_ACCOUNT)
    watched = not call.namespace and call.verb in ("list", "watch")
    if call.resource.partition("/")[0] == "finetunejobs" and call.namespace:
        return (call.namespace, call.name) in jobs
    owned = call.resource.partition("/")[0] in {"pytorchjobs", "pods", "configmaps", "events", "networkpolicies"}
    return own or watched or call.resource == "tokenreviews" or (owned and call.namespace in {job[0] for job in jobs})

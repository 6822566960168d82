"""Two replicas of the operator with a real API server: the leader fails, and the other replica takes over.

The leader is killed, frozen or cut off from the API server. The API server's audit log must show that no write of the
former leader was accepted after the takeover.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import TOKEN_FILE, report_path
from tests.cluster import Cluster, ClusterError, wait_for
from tests.cluster.audit import Call, calls
from tests.cluster.layout import BRIDGE
from tests.cluster.until_term import RUNS
from tests.operator.conftest import OPERATOR_NAMESPACE, REPORT_PORT, SERVICE_ACCOUNT, Installed, small_job
from tests.operator.operator_program import OperatorProgram, operator_program
from tests.operator.tcp_proxy import TcpProxy, tcp_proxy
from tests.operator.test_on_cluster import pods_run, report, running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

StandIn = Callable[[str], str]
ADDRESSES = {"one": "10.251.0.1", "two": "10.251.0.2"}
"""IP address of each replica. Two addresses let both replicas serve reports on the same port, as pods do."""
SERVICE = f"{SERVICE_ACCOUNT}.{OPERATOR_NAMESPACE}.svc"
USER = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{SERVICE_ACCOUNT}"
TAKEOVER_SECONDS, REPORT_SECONDS, FROZEN_SECONDS = 20, 40, 30
BUSY = 12
"""Number of jobs that are created right before the leader fails, so that it fails while it creates objects. As many
jobs are created right after the failure."""


@dataclass
class Replicas:
    """Two replicas, each connected to the API server through its own TCP proxy."""

    installed: Installed
    programs: dict[str, OperatorProgram]
    proxies: dict[str, TcpProxy]

    def lease(self) -> dict[str, Any]:
        lease = self.installed.cluster.get("lease", SERVICE_ACCOUNT, "-n", OPERATOR_NAMESPACE)
        return dict(lease.get("spec", {}))

    def leader(self) -> str | None:
        """Return the name of the replica that holds the Lease; None where none holds it."""
        return (self.lease().get("holderIdentity") or "").partition("_")[0] or None

    def evidence(self) -> str:
        return "\n".join(program.evidence() for program in self.programs.values())


@pytest.fixture(scope="module")
def replicas(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    """Stop the installed operator and run two replicas of the same release instead."""
    cluster, folder = installed.cluster, tmp_path_factory.mktemp("replicas")
    for address in ADDRESSES.values():
        cluster.run(["ip", "address", "add", f"{address}/32", "dev", BRIDGE])
    installed.operator.stop(signal.SIGTERM)
    with tcp_proxy(cluster) as first, tcp_proxy(cluster) as second:
        proxies = {"one": first, "two": second}
        programs = {
            name: operator_program(
                cluster,
                folder,
                namespace=OPERATOR_NAMESPACE,
                account=SERVICE_ACCOUNT,
                health_port=18090 + number,
                api_url=proxies[name].url,
                name=name,
                settings={
                    "FINETUNE_POD_IP": address,
                    "FINETUNE_POD_UID": owner_of_the_slice(installed, name),
                    "FINETUNE_REPORT_PORT": str(REPORT_PORT),
                },
            )
            for number, (name, address) in enumerate(ADDRESSES.items())
        }
        for program in programs.values():
            program.start()
        for program in programs.values():
            program.wait_ready()
        yield Replicas(installed, programs, proxies)
        for program in programs.values():
            program.stop(signal.SIGTERM)
    installed.operator.start()
    installed.operator.wait_ready()


def owner_of_the_slice(installed: Installed, name: str, namespace: str = OPERATOR_NAMESPACE) -> str:
    """Create a pod ``name`` that is never scheduled and return its uid.

    The pod serves as owner of the EndpointSlice, because the garbage collector deletes a slice whose owner does not
    exist.
    """
    container = {"name": "operator", "image": "localhost/busybox:1"}
    spec = {"containers": [container], "schedulingGates": [{"name": "tests.finetune.dev/never"}]}
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
    installed.apply(manifest, namespace)
    return str(installed.cluster.get("pod", name, "-n", namespace)["metadata"]["uid"])


@dataclass
class Reporting:
    """Posts reports as a training pod does: to the Service's name, with the pod's token."""

    replicas: Replicas
    namespace: str
    token: str
    body: str

    def accepted(self) -> bool:
        """Post a report and return whether the server has accepted the report."""
        installed = self.replicas.installed
        ca = b64decode(installed.ca_certificate).decode()
        path = report_path(self.namespace, "quickstart", 1)
        try:
            return post_by_name(installed.cluster, f"{SERVICE}:{REPORT_PORT}", path, self.body, self.token, ca) == 204
        except OSError:
            return False


def post_by_name(cluster: Cluster, server: str, path: str, body: str, token: str, ca: str) -> int:
    """Post a report to ``server`` (service name and port) with only ``ca`` (PEM) trusted; return the HTTP status.

    Raises:
        OSError: the service name has no address, no server answers, or the server's certificate is not valid for the
            service name.
    """
    service, _, port = server.partition(":")
    found = cluster.run(["getent", "ahostsv4", service], check=False).stdout.split()
    if not found:
        raise OSError(f"{service} leads nowhere")
    with cluster.enter():
        context = ssl.create_default_context(cadata=ca)
        connection = http.client.HTTPSConnection(service, int(port), timeout=5, context=context)
        # The address comes from the cluster's DNS, because http.client would ask the test machine's resolver.
        connection._create_connection = lambda _, timeout, source: socket.create_connection(  # type: ignore[attr-defined]
            (found[0], int(port)), timeout
        )
        try:
            connection.request("POST", path, body, {"Authorization": f"Bearer {token}"})
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture
def reporting(replicas: Replicas, namespace: str, stand_in: StandIn) -> Reporting:
    """Return a `Reporting` for the first pod of a job whose pods run."""
    installed = replicas.installed
    installed.apply(small_job(stand_in(RUNS)), namespace)
    job = installed.wait(namespace, "both pods", running, 90)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    pod = job["status"]["attempts"]["current"]["pods"][0]
    token = installed.cluster.kubectl("exec", pod["name"], "-n", namespace, "--", "cat", TOKEN_FILE)
    posts = Reporting(replicas, namespace, token, report(pod["uid"]).to_json())
    wait_for("a report to be taken before anything fails", posts.accepted, 60, evidence=replicas.evidence)
    return posts


def apply_new_jobs(installed: Installed, namespace: str, prefix: str) -> list[str]:
    """Create jobs whose pods find no node; return the names of the jobs.

    For such a job the operator creates the same objects and writes the same status as for any other job, but none of
    the job's pods takes resources of the node.
    """
    resources = {"nodes": 1, "gpusPerNode": 16, "cpu": "50m", "memory": "100Mi", "sharedMemory": "8Mi"}
    manifests = []
    for number in range(BUSY):
        manifest = small_job("localhost/busybox:1", resources=resources)
        manifest["metadata"] = {"name": f"{prefix}-{number}"}
        manifests.append(manifest)
    installed.apply({"apiVersion": "v1", "kind": "List", "items": manifests}, namespace)
    return [manifest["metadata"]["name"] for manifest in manifests]


def each_has_one_child(installed: Installed, namespace: str, names: list[str]) -> bool:
    """Return whether each job has exactly one PyTorchJob, and the job's status has the uid of this PyTorchJob."""
    jobs = {item["metadata"]["name"]: item for item in installed.cluster.get("finetunejobs", "-n", namespace)["items"]}
    children: dict[str, list[str]] = {}
    for child in installed.cluster.get("pytorchjobs", "-n", namespace)["items"]:
        owner = child["metadata"]["ownerReferences"][0]["name"]
        children.setdefault(owner, []).append(child["metadata"]["uid"])
    recorded = {name: [jobs[name].get("status", {}).get("child", {}).get("uid")] for name in names}
    return recorded == {name: children.get(name) for name in names}


def kill(replicas: Replicas, leader: str) -> None:
    replicas.programs[leader].stop()


def freeze(replicas: Replicas, leader: str) -> None:
    replicas.programs[leader].freeze()


def cut_off(replicas: Replicas, leader: str) -> None:
    replicas.proxies[leader].cut()


def start_again(replicas: Replicas, leader: str) -> None:
    replicas.programs[leader].start()


def thaw(replicas: Replicas, leader: str) -> None:
    replicas.programs[leader].thaw()


def heal(replicas: Replicas, leader: str) -> None:
    replicas.proxies[leader].heal()


Act = Callable[[Replicas, str], None]


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        pytest.param(kill, start_again, id="killed"),
        pytest.param(freeze, thaw, id="frozen", marks=pytest.mark.long),
        pytest.param(cut_off, heal, id="cut off", marks=pytest.mark.long),
    ],
)
def test_the_other_replica_takes_over_and_no_write_of_the_former_leader_is_accepted(
    replicas: Replicas, namespace: str, reporting: Reporting, fault: Act, cure: Act
) -> None:
    installed = replicas.installed
    log = installed.cluster.layout.audit_log
    offset = log.stat().st_size
    leader = wait_for("a leader", replicas.leader, 60)
    (other,) = set(replicas.programs) - {leader}
    former = replicas.programs[leader]
    restarts = former.restarts

    names = apply_new_jobs(installed, namespace, "before")
    fault(replicas, leader)
    failed_at = time.monotonic()
    names += apply_new_jobs(installed, namespace, "after")
    wait_for("the takeover", lambda: replicas.leader() == other, 3 * TAKEOVER_SECONDS, evidence=replicas.evidence)
    took_over = time.monotonic() - failed_at
    wait_for("a report to be taken", reporting.accepted, 3 * REPORT_SECONDS, evidence=replicas.evidence)
    first_report = time.monotonic() - failed_at
    wait_for(
        f"the leader to have been gone for {FROZEN_SECONDS} s, its successor at work",
        lambda: time.monotonic() - failed_at > FROZEN_SECONDS or fault is kill,
        3 * FROZEN_SECONDS,
    )
    cure(replicas, leader)
    if fault is not kill:
        wait_for("the former leader to end", lambda: former.restarts > restarts, 60, evidence=replicas.evidence)
    wait_for(
        "every job to have its one child",
        lambda: each_has_one_child(installed, namespace, names),
        60,
        evidence=lambda: installed.evidence(namespace) + replicas.evidence(),
    )
    former.wait_ready()
    assert replicas.leader() == other
    assert late_writes(log, offset, former.credential, replicas.programs[other].credential) == []
    load = os.getloadavg()[0]
    print(f"takeover {took_over:.1f} s, first report {first_report:.1f} s, load {load:.1f}")


def late_writes(log: Path, offset: int, former: str, successor: str) -> list[Call]:
    """Return the accepted writes of the former leader after its successor had acquired the Lease. ``former`` and
    ``successor`` identify the tokens of the two replicas (see `Call.credential`)."""
    seen = list(calls(log, USER, offset=offset))
    taken = [
        call.answered
        for call in seen
        if call.credential == successor and call.resource == "leases" and call.verb == "update" and call.accepted
    ]
    assert taken, "the audit log shows no takeover"
    assert [call for call in seen if call.credential == former and call.writes], "the former leader never wrote"
    late = (call for call in seen if call.credential == former and call.answered > min(taken))
    return [call for call in late if call.writes and call.accepted]


def test_both_replicas_are_ready_and_one_leads(replicas: Replicas) -> None:
    for program in replicas.programs.values():
        program.wait_ready()
    assert sorted(value(replicas, name, "finetune_leader") for name in replicas.programs) == [0.0, 1.0]
    leader = replicas.leader()
    assert leader is not None
    found = installed_slice(replicas)
    assert found["endpoints"][0]["addresses"] == [ADDRESSES[leader]]


def installed_slice(replicas: Replicas) -> dict[str, Any]:
    name = f"{SERVICE_ACCOUNT}-leader"
    return dict(replicas.installed.cluster.get("endpointslice", name, "-n", OPERATOR_NAMESPACE))


def value(replicas: Replicas, name: str, metric: str) -> float:
    """Return the value of ``metric``, a metric without labels, of the replica ``name``."""
    port = 18090 + list(ADDRESSES).index(name)
    with replicas.installed.cluster.enter():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{metric} ")))


def test_a_stopped_leader_gives_the_lease_back(replicas: Replicas) -> None:
    leader = wait_for("a leader", replicas.leader, 60)
    (other,) = set(replicas.programs) - {leader}
    stopped_at = time.monotonic()
    replicas.programs[leader].stop(signal.SIGTERM)
    wait_for("the takeover", lambda: replicas.leader() == other, 60, evidence=replicas.evidence)
    renewed = replicas.lease()
    assert renewed["holderIdentity"].startswith(f"{other}_")
    print(f"takeover after SIGTERM {time.monotonic() - stopped_at:.1f} s")
    # The log proves that the leader released the Lease. On a slow machine the Lease could also have expired.
    assert "was given back" in replicas.programs[leader].log.read_text()
    replicas.programs[leader].start()
    replicas.programs[leader].wait_ready()


def test_a_slice_that_somebody_deleted_comes_back(replicas: Replicas) -> None:
    name = f"{SERVICE_ACCOUNT}-leader"
    replicas.installed.cluster.kubectl("delete", "endpointslice", name, "-n", OPERATOR_NAMESPACE)

    def back() -> bool:
        try:
            return bool(installed_slice(replicas))
        except ClusterError:
            return False

    wait_for("the EndpointSlice", back, 90, evidence=replicas.evidence)

"""Compares the roles of the Helm chart with the API server's audit log.

Every call of the operator must be granted and every granted verb must be used, both for an operator that serves all
namespaces and for an operator that serves two.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, wait_for
from tests.cluster.audit import Call, calls
from tests.cluster.layout import BRIDGE
from tests.cluster.until_term import RUNS
from tests.operator.builders import REPOSITORY
from tests.operator.conftest import Installed, condition, small_job
from tests.operator.operator_program import OperatorProgram, operator_program
from tests.operator.test_on_cluster import child_name, post, report, running
from tests.operator.test_preflight_on_cluster import RUN, checks
from tests.operator.test_reports_on_cluster import token_of
from tests.operator.test_two_replicas import owner_of_the_slice

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

StandIn = Callable[[str], str]
ADDRESS = "10.251.0.9"
REPORT_PORT, HEALTH_PORT = 18543, 18580


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A granted verb on a resource. An empty ``namespace`` means all namespaces, an empty ``name`` all objects."""

    namespace: str
    group: str
    resource: str
    verb: str
    name: str = ""

    def covers(self, call: Call) -> bool:
        """Return whether this grant allows ``call``."""
        return (
            (self.group, self.resource, self.verb) == (call.group, call.resource, call.verb)
            and self.namespace in ("", call.namespace)
            and self.name in ("", call.name)
        )


def grants(cluster: Cluster, user: str) -> list[Grant]:
    """Return the grants of all roles that are bound to the service account ``user``, as read from the API server."""
    found: list[Grant] = []
    for kind, binding in (("clusterrole", "clusterrolebindings"), ("role", "rolebindings")):
        for item in cluster.get(binding, "--all-namespaces")["items"]:
            subjects = [
                f"system:serviceaccount:{subject.get('namespace')}:{subject['name']}"
                for subject in item.get("subjects", [])
            ]
            if user not in subjects:
                continue
            namespace = item["metadata"].get("namespace", "")
            place = ["-n", namespace] if namespace else []
            for rule in cluster.get(kind, item["roleRef"]["name"], *place)["rules"]:
                found += [
                    Grant(namespace=namespace, group=group, resource=resource, verb=verb, name=name)
                    for group in rule["apiGroups"]
                    for resource in rule["resources"]
                    for verb in rule["verbs"]
                    for name in rule.get("resourceNames", [""])
                ]
    return found


@dataclass
class Release:
    """A second release of the chart, whose operator runs as a program."""

    installed: Installed
    name: str
    program: OperatorProgram
    served: list[str]

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{self.name}:{self.account}"

    @property
    def account(self) -> str:
        return f"{self.name}-finetune-operator"

    def calls(self) -> list[Call]:
        return list(calls(self.installed.cluster.layout.audit_log, self.user))

    def unused(self, granted: list[Grant]) -> list[Grant]:
        """Return the grants that no call has used so far.

        A call in one served namespace counts for all served namespaces.
        """
        made = self.calls()
        return [grant for grant in granted if not any(_anywhere(grant, self.served).covers(call) for call in made)]


def _anywhere(grant: Grant, served: list[str]) -> Grant:
    return replace(grant, namespace="") if grant.namespace in served else grant


@pytest.fixture(params=["wide", "narrow"])
def release(request: pytest.FixtureRequest, installed: Installed, namespace: str, tmp_path: Path) -> Iterator[Release]:
    """Install a release that serves all namespaces ("wide") or two ("narrow").

    The operator of ``installed`` is stopped until the test has ended.
    """
    cluster, name = installed.cluster, str(request.param)
    served = [namespace, "default"] if name == "narrow" else []
    values = {"replicas": 0, "crds": {"enabled": False}, "watchNamespaces": served}
    chart = str(REPOSITORY / "charts/finetune-operator")
    cluster.helm("install", name, chart, "-n", name, "--create-namespace", "--values", "-", stdin=json.dumps(values))
    cluster.run(["ip", "address", "replace", f"{ADDRESS}/32", "dev", BRIDGE])
    installed.operator.stop(signal.SIGTERM)
    program = operator_program(
        cluster,
        tmp_path,
        namespace=name,
        account=f"{name}-finetune-operator",
        health_port=HEALTH_PORT,
        name=name,
        settings={
            "FINETUNE_POD_IP": ADDRESS,
            **pod_of(installed, name, "first"),
            "FINETUNE_REPORT_HOST": ADDRESS,
            "FINETUNE_REPORT_PORT": str(REPORT_PORT),
            "FINETUNE_WATCH_NAMESPACES": ",".join(served),
        },
    )
    yield Release(installed, name, program, served)
    program.stop(signal.SIGTERM)
    installed.operator.start()
    installed.operator.wait_ready()
    cluster.helm("uninstall", name, "-n", name)
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.mark.long
def test_every_call_is_granted_and_every_grant_is_used(release: Release, namespace: str, stand_in: StandIn) -> None:
    installed = release.installed
    granted = grants(installed.cluster, release.user)
    live_through(release, namespace, stand_in(checks(None, RUNS)))
    wait_for(
        "every granted verb to be used",
        lambda: not release.unused(granted),
        90,
        evidence=lambda: f"unused: {release.unused(granted)}\n{release.program.evidence()}",
        interval=1,
    )
    made = release.calls()
    assert [call for call in made if call.code == 403] == []
    assert [call for call in made if not any(grant.covers(call) for grant in granted)] == []
    read = {(call.namespace, call.name) for call in made if call.resource == "secrets"}
    assert read == {(release.name, f"{release.account}-certificates")}
    if release.served:
        cluster_wide = {(grant.group, grant.resource, grant.verb) for grant in granted if not grant.namespace}
        assert cluster_wide == {("authentication.k8s.io", "tokenreviews", "create")}


def live_through(release: Release, namespace: str, image: str) -> None:
    """Bring the operator into situations that, taken together, need every permission of its roles.

    Among them are a preflight check, lost pods, a name conflict, a report and a second start.
    """
    installed, program = release.installed, release.program
    conflict = small_job("localhost/busybox:1", resources=TOO_MANY_GPUS)
    conflict["metadata"] = {"name": "conflict"}
    installed.apply(conflict, namespace)
    installed.apply(small_job(image, runPolicy=RUN), namespace)
    job = installed.job(namespace, "conflict")
    foreign: dict[str, Any] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": child_name(job)}}
    installed.apply(foreign, namespace)
    program.start()
    program.wait_ready()

    def evident(what: str, reached: Callable[[dict[str, Any]], Any], name: str = "quickstart") -> dict[str, Any]:
        return installed.wait(namespace, what, reached, 90, name)

    checked = small_job(image, runPolicy={"preflight": "Run"})
    checked["metadata"] = {"name": "checked"}
    installed.apply(checked, namespace)
    pods = ["get", "pods", "-n", namespace, "-o", "name"]
    wait_for("the pod of a check", lambda: "preflight" in installed.cluster.kubectl(*pods), 60)
    suspend = json.dumps({"spec": {"runPolicy": {"suspend": True}}})
    installed.cluster.kubectl("patch", "finetunejob", "checked", "-n", namespace, "--type=merge", "-p", suspend)
    evident("the end of the check", lambda job: condition(job, "Succeeded")["reason"] == "Suspended", "checked")
    evident("the conflict", lambda job: condition(job, "Accepted")["reason"] == "NameConflict", "conflict")
    installed.cluster.kubectl("delete", "configmap", child_name(job), "-n", namespace)
    job = evident("both pods", running)
    pod = job["status"]["attempts"]["current"]["pods"][0]
    token = token_of(installed, namespace, pod["name"], program.evidence)
    wait_for("both pods to run", lambda: phases_of(installed, namespace) == ["Running"] * 2, 60)
    secret = installed.cluster.get("secret", f"{release.account}-certificates", "-n", release.name)
    server, ca = f"https://{ADDRESS}:{REPORT_PORT}", secret["data"]["ca.crt"]
    body = report(pod["uid"]).to_json()
    assert post(installed, namespace, token, body, server=server, ca_certificate=ca) == 204
    wait_for("the annotation of the pods", lambda: annotated(installed, namespace), 60)
    # The attempt loses a pod, so the operator deletes the attempt's PyTorchJob and ConfigMap.
    installed.cluster.kubectl("delete", "pod", pod["name"], "-n", namespace, "--wait=false")
    evident("the end of the attempt", lambda job: job["status"]["attempts"].get("recent"))
    # The second start has another pod uid, so that the operator updates the EndpointSlice instead of creating it.
    # The Secret is deleted meanwhile, so that the operator creates it instead of filling the chart's empty one.
    program.stop(signal.SIGTERM)
    installed.cluster.kubectl("delete", "secret", f"{release.account}-certificates", "-n", release.name)
    program.environment = {**program.environment, **pod_of(installed, release.name, "second")}
    program.start()
    program.wait_ready()


def phases_of(installed: Installed, namespace: str) -> list[str]:
    """Return the phases of the pods of job `quickstart`; pods of other jobs, which stay Pending, are left out."""
    pods = installed.cluster.get("pods", "-n", namespace, "-l", "finetune.dev/job-name=quickstart")["items"]
    return [pod["status"]["phase"] for pod in pods]


def annotated(installed: Installed, namespace: str) -> bool:
    """Return whether both training pods carry the annotation with the time of the reported checkpoint."""
    pods = installed.cluster.get("pods", "-n", namespace, "-l", "finetune.dev/job-name=quickstart")["items"]
    times = [pod["metadata"]["annotations"].get("volcano.sh/last-checkpoint-time") for pod in pods]
    return times == ["2026-11-24T12:00:00Z"] * 2


def pod_of(installed: Installed, namespace: str, name: str) -> dict[str, str]:
    """Create a pod ``name``, and return the settings with which the operator takes this pod for its own pod."""
    return {"FINETUNE_POD_NAME": name, "FINETUNE_POD_UID": owner_of_the_slice(installed, name, namespace)}


TOO_MANY_GPUS = {"nodes": 1, "gpusPerNode": 16, "cpu": "50m", "memory": "100Mi", "sharedMemory": "8Mi"}

"""Helpers for tests of `reports.certificate.existingSecret`: a release of the chart with a certificate from a Secret.

`Release` runs the operator of the release as a program and reads the certificate that the report server presents.
`Attempt` sends reports as a pod of an attempt does.
"""

from __future__ import annotations

import json
import signal
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract import CA_FILE, report_path
from tests.cluster import Cluster, wait_for
from tests.cluster.api import answers
from tests.cluster.audit import calls
from tests.cluster.layout import BRIDGE
from tests.operator.builders import REPOSITORY
from tests.operator.conftest import Installed
from tests.operator.operator_program import OperatorProgram, operator_program
from tests.operator.test_on_cluster import child_name, pods_run, report, running
from tests.operator.test_reports_on_cluster import token_of
from tests.operator.test_two_replicas import owner_of_the_slice, post_by_name

CHART = REPOSITORY / "charts/finetune-operator"
SECRET = "reports-tls"
ADDRESS = "10.251.0.11"
REPORT_PORT, HEALTH_PORT = 18643, 18680
RESYNC_SECONDS = 5


@dataclass
class Release:
    """An installed release of the chart whose report server takes its certificate from a Secret; the test starts the
    operator."""

    installed: Installed
    program: OperatorProgram
    namespace: str
    account: str

    @property
    def cluster(self) -> Cluster:
        return self.installed.cluster

    @property
    def host(self) -> str:
        """Host name of the report Service, to which training pods send reports."""
        return f"{self.account}.{self.namespace}.svc"

    def start_without_a_certificate(self) -> None:
        """Start the operator and wait until its log names the missing Secret. Assert that /healthz succeeds and /readyz
        fails."""
        self.program.start()
        self.until_logged(f"Secret {self.namespace}/{SECRET} must exist and hold ca.crt, tls.crt, tls.key")
        with self.cluster.enter():
            assert not answers(f"http://127.0.0.1:{HEALTH_PORT}/readyz"), (
                "an operator that can't take reports is not ready"
            )
            assert answers(f"http://127.0.0.1:{HEALTH_PORT}/healthz"), "nor is it to be killed"

    def until_logged(self, text: str) -> None:
        wait_for(text, lambda: text in self.program.log.read_text(), 60, evidence=self.program.evidence)

    def presented(self) -> str:
        """Return the certificate (PEM) that the report server presents; empty while no server answers."""
        with self.cluster.enter():
            try:
                return ssl.get_server_certificate((ADDRESS, REPORT_PORT), timeout=5)
            except OSError:
                return ""

    def until_presented(self, chain: str) -> float:
        """Wait until the server presents the first certificate of ``chain`` (PEM); return the seconds waited."""
        began = time.monotonic()
        leaf = chain.partition("-----END CERTIFICATE-----")[0].strip()
        wait_for(
            "the certificate to be presented",
            lambda: leaf in self.presented(),
            60,
            evidence=self.program.evidence,
            interval=0.2,
        )
        return time.monotonic() - began

    def attempt(self, namespace: str, number: int) -> Attempt:
        """Wait until the pods of attempt ``number`` run, and return an `Attempt` that reports as the first pod does."""

        def reached(job: dict[str, Any]) -> bool:
            return job["status"]["attempts"]["started"] == number and running(job)

        job = self.installed.wait(namespace, f"both pods of attempt {number}", reached, 120)
        pod = job["status"]["attempts"]["current"]["pods"][0]
        token = token_of(self.installed, namespace, pod["name"], self.program.evidence)
        wait_for("both pods to run", lambda: pods_run(self.installed, namespace), 60)
        found = self.cluster.get("configmap", child_name(job, number), "-n", namespace)
        return Attempt(self, namespace, number, pod, token, found["data"][Path(CA_FILE).name])

    def reads_of_secrets(self) -> set[tuple[str, str]]:
        """Return (verb, name) of every request of the operator about Secrets, from the API server's audit log."""
        user = f"system:serviceaccount:{self.namespace}:{self.account}"
        made = calls(self.cluster.layout.audit_log, user)
        return {(call.verb, call.name) for call in made if call.resource == "secrets"}


@dataclass(frozen=True)
class Attempt:
    """Sends reports as the first pod of an attempt does, with the pod's token and the CA of the attempt."""

    release: Release
    namespace: str
    number: int
    pod: dict[str, Any]
    token: str
    trusted: str
    """PEM text of the CA in the attempt's ConfigMap."""

    def post(self) -> int:
        """Post a report and return the HTTP status; raises OSError if no server answers or its certificate is not
        trusted."""
        path, body = report_path(self.namespace, "quickstart", self.number), report(self.pod["uid"]).to_json()
        server = f"{self.release.host}:{REPORT_PORT}"
        return post_by_name(self.release.cluster, server, path, body, self.token, self.trusted)

    def assert_only_the_next_one_trusts(self, authority: str) -> None:
        """Assert that only the next attempt trusts a server certificate of the new CA ``authority`` (PEM).

        The current attempt still has the old CA. A pod of the current attempt is deleted, so that the next attempt
        begins.
        """
        with pytest.raises(ssl.SSLCertVerificationError):
            self.post()
        name = self.pod["name"]
        self.release.cluster.kubectl("delete", "pod", name, "-n", self.namespace, "--wait=false")
        following = self.release.attempt(self.namespace, self.number + 1)
        assert following.trusted == authority
        assert following.post() == 204

    def until_taken(self) -> None:
        """Wait until the Service's name resolves to the server and the server accepts a report."""

        def taken() -> bool:
            try:
                return self.post() == 204
            except OSError:
                return False

        wait_for("a report to be taken", taken, 60, evidence=self.release.program.evidence)


@contextmanager
def installed_release(installed: Installed, folder: Path, name: str, namespace: str) -> Iterator[Release]:
    """Install the chart as a second release.

    Inside the block the operator of ``installed`` is stopped, because both operators would reconcile the same jobs.
    """
    cluster = installed.cluster
    certificate = {"existingSecret": SECRET}
    values = {"replicas": 0, "crds": {"enabled": False}, "reports": {"certificate": certificate, "port": REPORT_PORT}}
    cluster.helm(
        *("install", name, str(CHART), "-n", namespace, "--create-namespace", "--values", "-"), stdin=json.dumps(values)
    )
    cluster.run(["ip", "address", "replace", f"{ADDRESS}/32", "dev", BRIDGE])
    (deployment,) = cluster.get("deployments", "-n", namespace)["items"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    chosen = {item["name"]: item.get("value", "") for item in container["env"]}
    account = deployment["metadata"]["name"]
    program = operator_program(
        cluster,
        folder,
        namespace=namespace,
        account=account,
        health_port=HEALTH_PORT,
        name=name,
        settings={
            # These variables are copied from the rendered Deployment, to test that `reports.certificate.existingSecret`
            # sets them.
            **{key: chosen[key] for key in ("FINETUNE_CERTIFICATE_SECRET", "FINETUNE_CERTIFICATE_FROM")},
            "FINETUNE_POD_IP": ADDRESS,
            "FINETUNE_POD_UID": owner_of_the_slice(installed, name, namespace),
            "FINETUNE_REPORT_PORT": str(REPORT_PORT),
            "FINETUNE_RESYNC_SECONDS": str(RESYNC_SECONDS),
        },
    )
    installed.operator.stop(signal.SIGTERM)
    try:
        yield Release(installed, program, namespace, account)
    finally:
        program.stop(signal.SIGTERM)
        installed.operator.start()
        installed.operator.wait_ready()
        cluster.helm("uninstall", name, "-n", namespace)
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")

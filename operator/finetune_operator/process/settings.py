"""Settings of the operator's process, from command line flags and environment variables.

Every setting has a flag and a variable, for example `--report-port` and `FINETUNE_REPORT_PORT`; the flag takes
precedence. `__main__.py` parses the settings once and passes them to `application.py`.
"""

from __future__ import annotations

import argparse
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_operator.queue.preflight_slots import DEFAULT_LIMIT

CERTIFICATE_SOURCES = ("Operator", "Secret")
PREFLIGHT = ("Run", "Skip")
SWITCH = ("on", "off")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The settings of the operator's process that an installation can choose."""

    trainer_image: str
    """Image of jobs without `podTemplate.image`."""
    preflight: str
    """``"Run"`` or ``"Skip"``: whether jobs without `runPolicy.preflight` are checked before attempt 1."""
    max_preflights: int
    """Largest number of preflight checks that run at the same time, over all jobs."""
    namespace: str
    """Namespace of the operator, with its certificate Secret, Lease and report Service."""
    certificate_secret: str
    """Name of the Secret with the CA and the certificate of the report server."""
    certificate_from: str
    """Who makes and renews the certificate: ``"Operator"``, or ``"Secret"`` where somebody else does, such as
    cert-manager."""
    lease: str
    """Name of the Lease whose holder is the leader."""
    report_service: str
    """Name of the headless Service in front of the report server."""
    report_host: str
    """Host name in the report URL and in the certificate. Empty means `<report_service>.<namespace>.svc`."""
    report_port: int
    report_connections: int
    """Largest number of connections of the report server in all. A training job keeps one connection open."""
    report_connections_per_address: int
    """Largest number of connections of one address. More are needed where many training pods share an address."""
    health_port: int
    """Port of /healthz, /readyz and /metrics."""
    pod_name: str
    pod_uid: str
    pod_ip: str
    """IP address of this pod, to which the report Service leads while this process is the leader. Empty outside a
    cluster."""
    checkpoint_annotations: bool
    """Whether pods get the annotation `volcano.sh/last-checkpoint-time`, for schedulers that preempt."""
    network_policies: bool
    """Whether each attempt gets a NetworkPolicy that admits connections from its own pods only."""
    watch_namespaces: tuple[str, ...]
    """Namespaces whose jobs are reconciled; empty means all namespaces."""
    workers: int
    """Number of jobs that are reconciled at the same time."""
    resync_seconds: float
    """Seconds between two lists of all jobs."""
    log_level: str
    kubeconfig: Path | None
    """Kubeconfig file for an operator outside a cluster; None means the pod's service account."""

    def lease_identity(self) -> str:
        """Return the name of this process as holder of the Lease, for example ``"operator-7d4f_<uid of the pod>"``.

        A container that the kubelet has restarted has the same identity as its predecessor, so the restarted container
        need not wait until the Lease expires. Outside a pod every process has an identity of its own.
        """
        return f"{self.pod_name}_{self.pod_uid or uuid.uuid4()}"

    @property
    def report_hostname(self) -> str:
        """Host name to which the training pods send reports."""
        return self.report_host or f"{self.report_service}.{self.namespace}.svc"

    @property
    def report_base_url(self) -> str:
        """Base of all report URLs, for example ``"https://finetune-operator.finetune-system.svc:8443"``.

        The URL has the port of the operator's pod, because the report Service is headless and maps no ports.
        """
        return f"https://{self.report_hostname}:{self.report_port}"


def _variable(flag: str) -> str:
    return "FINETUNE_" + flag.removeprefix("--").replace("-", "_").upper()


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Return the settings from the command line flags ``arguments`` and the variables in ``environment``.

    Where a setting is missing or malformed, print a usage message and end the process.
    """
    parser = argparse.ArgumentParser(
        prog="python3 -m finetune_operator",
        description="Operator of FineTuneJob: starts the training pods of each job and keeps its status true.",
        epilog="Each flag has an environment variable: --report-port is FINETUNE_REPORT_PORT.",
    )

    def add(flag: str, default: str | None, help_text: str, **options: object) -> None:
        value = environment.get(_variable(flag), default)
        shown = f"{help_text} (default: {default})" if default else help_text
        parser.add_argument(flag, default=value, required=value is None, help=shown, **options)  # type: ignore[arg-type]

    add("--trainer-image", None, "image of jobs that set no podTemplate.image")
    add("--preflight", "Run", "check jobs before GPUs are asked for, unless they say otherwise", choices=PREFLIGHT)
    add("--max-preflights", str(DEFAULT_LIMIT), "preflight checks that run at the same time", type=int)
    add("--namespace", "finetune-system", "the operator's own namespace")
    add("--certificate-secret", "finetune-operator-certificates", "Secret for the CA and the certificate of reports")
    add("--certificate-from", "Operator", "who keeps the certificate in the Secret", choices=CERTIFICATE_SOURCES)
    add("--lease", "finetune-operator", "Lease whose holder works; the others wait")
    add("--report-service", "finetune-operator", "headless Service in front of the report server")
    add("--report-host", "", "host name in the report address; default: <service>.<namespace>.svc")
    add("--report-port", "8443", "port of the report server", type=int)
    add("--report-connections", "2000", "most connections of the report server; a training job keeps one", type=int)
    add("--report-connections-per-address", "64", "most connections of one address", type=int)
    add("--health-port", "8080", "port of /healthz, /readyz and /metrics", type=int)
    add("--pod-name", "", "name of the operator's pod; default: the host's name")
    add("--pod-uid", "", "uid of the operator's pod")
    add("--pod-ip", "", "address of the operator's pod, which reports are led to")
    add("--checkpoint-annotations", "on", "volcano.sh/last-checkpoint-time on the pods", choices=SWITCH)
    add("--network-policies", "on", "a NetworkPolicy for the pods of each attempt", choices=SWITCH)
    add("--watch-namespaces", "", "namespaces to serve, separated by commas; default: all")
    add("--workers", "8", "jobs reconciled at the same time", type=int)
    add("--resync-seconds", "300", "seconds between two lists of all jobs", type=float)
    add("--log-level", "info", "least level to log", choices=LOG_LEVELS)
    add("--kubeconfig", "", "file to use outside a cluster")
    values = parser.parse_args(arguments)
    if values.workers < 1:
        parser.error("--workers must be at least 1")
    if values.report_connections < 1 or values.report_connections_per_address < 1:
        parser.error("--report-connections and --report-connections-per-address must be at least 1")
    if values.max_preflights < 1:
        parser.error("--max-preflights must be at least 1")
    if values.resync_seconds <= 0:
        parser.error("--resync-seconds must be greater than 0")
    return Settings(
        trainer_image=values.trainer_image,
        preflight=values.preflight,
        max_preflights=values.max_preflights,
        namespace=values.namespace,
        certificate_secret=values.certificate_secret,
        certificate_from=values.certificate_from,
        lease=values.lease,
        report_service=values.report_service,
        report_host=values.report_host,
        report_port=values.report_port,
        report_connections=values.report_connections,
        report_connections_per_address=values.report_connections_per_address,
        health_port=values.health_port,
        pod_name=values.pod_name or socket.gethostname(),
        pod_uid=values.pod_uid,
        pod_ip=values.pod_ip,
        checkpoint_annotations=values.checkpoint_annotations == "on",
        network_policies=values.network_policies == "on",
        watch_namespaces=tuple(name.strip() for name in values.watch_namespaces.split(",") if name.strip()),
        workers=values.workers,
        resync_seconds=values.resync_seconds,
        log_level=values.log_level,
        kubeconfig=Path(values.kubeconfig) if values.kubeconfig else None,
    )

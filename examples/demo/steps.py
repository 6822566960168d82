"""Functions for the steps from an empty test cluster to a FineTuneJob that has ended. The demo and the end-to-end tests
call these functions.

The functions put data into the cluster's MinIO, install the operator, apply jobs and wait for jobs.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3
import yaml
from kubernetes import client, config
from minio import Minio

from examples.trails.generate import Rows, write
from finetune_cli.apiserver.job_client import JobClient
from finetune_cli.state import condition, ending, state, state_message
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import GROUP, PLURAL, FineTuneJob
from finetune_core.contract.pod import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from tests.cluster import Cluster, ClusterError, images
from tests.cluster.layout import HOST_ADDRESS, MINIO_PORT

BUCKET = "finetune"
MODEL_KEY = "models/smollm2-135m"
ROWS_KEY = "data/trails"
STORE_NAMESPACE = "storage"
OPERATOR_NAMESPACE = "finetune-system"
RELEASE = "finetune-operator"
CREDENTIALS_SECRET = "storage-credentials"
QUICKSTARTS = {"LoRA": Path("examples/quickstart.yaml"), "Full": Path("examples/quickstart-full.yaml")}
REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "charts" / "finetune-operator"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
HELM_TIMEOUT_SECONDS = 180


# Functions for the object store


def object_store(cluster: Cluster) -> Minio:
    """Return a client of the cluster's MinIO, which works only inside ``cluster.enter()``."""
    store = cluster.minio
    address = urllib3.util.parse_url(store.endpoint).netloc or ""
    # The client gets a connection pool of its own, because the default pool of the library minio obeys Retry-After. A
    # MinIO server that has just started asks clients to wait a minute, although it is ready much earlier.
    retries = urllib3.Retry(
        total=10, backoff_factor=0.2, backoff_max=2, status_forcelist=[503], respect_retry_after_header=False
    )
    pool = urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=60), retries=retries)
    return Minio(
        address,
        access_key=store.access_key,
        secret_key=store.secret_key,
        secure=store.endpoint.startswith("https:"),
        region="us-east-1",
        http_client=pool,
    )


def make_bucket(cluster: Cluster, bucket: str = BUCKET) -> None:
    """Create the bucket ``bucket`` if it does not exist. By default this is the bucket that the quickstart job files
    name."""
    with cluster.enter():
        store = object_store(cluster)
        if not store.bucket_exists(bucket):
            store.make_bucket(bucket)


def put_base_model(cluster: Cluster, folder: Path, key: str = MODEL_KEY, bucket: str = BUCKET) -> None:
    """Upload the files in ``folder``, a model, into ``bucket``, each below ``key``."""
    with cluster.enter():
        store = object_store(cluster)
        for file in sorted(folder.iterdir()):
            store.fput_object(bucket, f"{key}/{file.name}", str(file), part_size=64 << 20)


def put_rows(cluster: Cluster, rows: Rows, key: str = ROWS_KEY, bucket: str = BUCKET) -> None:
    """Upload the training rows and the validation rows into ``bucket``, as files below ``key``. The held-out rows are
    not uploaded, so that no job can read them."""
    with tempfile.TemporaryDirectory() as folder:
        write(rows, Path(folder))
        for name in ("train.jsonl", "validation.jsonl"):
            put_file(cluster, f"{key}/{name}", (Path(folder) / name).read_bytes(), bucket)


def put_file(cluster: Cluster, key: str, content: bytes, bucket: str = BUCKET) -> None:
    """Upload ``content`` as the object ``key`` into the bucket."""
    with cluster.enter():
        object_store(cluster).put_object(bucket, key, io.BytesIO(content), len(content))


def name_object_store(cluster: Cluster, namespace: str = STORE_NAMESPACE) -> None:
    """Make the cluster's MinIO, which runs outside of Kubernetes, reachable for pods under the name
    `minio.<namespace>.svc`. By default this is `minio.storage.svc`, the name in the quickstart job files.

    The Service has no selector. An EndpointSlice contains the address of MinIO.
    """
    port = {"name": "http", "port": MINIO_PORT, "protocol": "TCP"}
    metadata = {"name": "minio", "namespace": namespace}
    apply(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    apply(
        cluster,
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"clusterIP": "None", "ports": [port]}},
    )
    apply(
        cluster,
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": metadata | {"labels": {"kubernetes.io/service-name": "minio"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [HOST_ADDRESS], "conditions": {"ready": True}}],
            "ports": [port],
        },
    )


# Functions that install the operator and prepare namespaces for jobs


def chart_values() -> dict[str, Any]:
    """Return values for the Helm chart that name the operator image and the trainer image of this working tree. An
    image that does not exist is built."""
    repository, _, tag = images.ensure(images.OPERATOR).rpartition(":")
    return {"image": {"repository": repository, "tag": tag}, "trainer": {"image": images.ensure(images.TRAINER)}}


def install_operator(cluster: Cluster, values: Mapping[str, Any], namespace: str = OPERATOR_NAMESPACE) -> None:
    """Install the operator with its Helm chart and wait until the operator is ready. ``values`` are the chart's
    values."""
    arguments = ["--namespace", namespace, "--create-namespace", "--wait", f"--timeout={HELM_TIMEOUT_SECONDS}s"]
    command = ["upgrade", "--install", RELEASE, str(CHART), *arguments, "--values", "-"]
    try:
        cluster.helm(*command, stdin=json.dumps(values), timeout=HELM_TIMEOUT_SECONDS + 30)
    except ClusterError as error:
        raise ClusterError(f"{error}\n{diagnostics(cluster, namespace)}") from error


def make_namespace(cluster: Cluster, namespace: str) -> None:
    """Create a namespace with the strictest level of pod security (`restricted`), and in it the Secret that the job
    files name, with the access key of the cluster's MinIO."""
    metadata = {"name": namespace, "labels": RESTRICTED}
    apply(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    keys = {ACCESS_KEY_ID: cluster.minio.access_key, SECRET_ACCESS_KEY: cluster.minio.secret_key}
    secret = {"name": CREDENTIALS_SECRET, "namespace": namespace}
    apply(cluster, {"apiVersion": "v1", "kind": "Secret", "metadata": secret, "stringData": keys})


# Functions that apply, follow and delete FineTuneJobs, and functions that show the state of the cluster


def apply(cluster: Cluster, manifest: Path | Mapping[str, Any], namespace: str | None = None) -> None:
    """Run `kubectl apply` with ``manifest``, which is an object or the path of a file, relative to the repository."""
    place = ["--namespace", namespace] if namespace else []
    if isinstance(manifest, Path):
        cluster.kubectl("apply", *place, "--filename", str(REPOSITORY / manifest))
    else:
        cluster.kubectl("apply", *place, "--filename", "-", stdin=json.dumps(manifest))


def manifest_of(path: Path, **changes: Any) -> dict[str, Any]:
    """Return the content of the job file ``path``, which is relative to the repository, with ``changes``. For example,
    the keyword argument `spec__training__maxSteps=10` sets the field `spec.training.maxSteps` to 10."""
    manifest: dict[str, Any] = yaml.safe_load((REPOSITORY / path).read_text())
    for place, value in changes.items():
        *parents, last = place.split("__")
        section = manifest
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return manifest


@contextmanager
def jobs_in(cluster: Cluster, namespace: str) -> Iterator[JobClient]:
    """Yield a client for the FineTuneJobs of ``namespace``. Inside the `with` block the calling thread is in the
    network namespace of the cluster."""
    with cluster.enter(), kubernetes_client(cluster) as api:
        yield JobClient(api, namespace)


def kubernetes_client(cluster: Cluster) -> client.ApiClient:
    """Return a Kubernetes client with the rights of an administrator, which works only inside ``cluster.enter()``."""
    configuration = client.Configuration()
    config.load_kube_config(str(cluster.kubeconfig), client_configuration=configuration)
    configuration.proxy = None
    return client.ApiClient(configuration)


def wait_for_job(
    cluster: Cluster,
    namespace: str,
    name: str,
    what: str,
    reached: Callable[[FineTuneJob], bool],
    timeout: float,
    notify: Callable[[str], None] = lambda sentence: None,
) -> FineTuneJob:
    """Return the job as soon as ``reached`` is true for its state. ``what`` names this state in error messages, for
    example "the first step". ``notify`` is called with a sentence when the connection to the API server is lost.

    Raises ClusterError where ``timeout`` seconds have passed, or where the job has ended without reaching the state.
    The message names the job's last state.
    """
    newest: FineTuneJob | None = None
    with jobs_in(cluster, namespace) as jobs:
        try:
            for newest in jobs.follow(name, notify, give_up_after=timeout):
                if reached(newest):
                    return newest
                if end := ending(newest):
                    raise ClusterError(f"{name} ended before {what}: {end.reason}: {end.message}")
        except TimeoutError as error:
            last = f"{state(newest)}: {state_message(newest)}" if newest else "never seen"
            raise ClusterError(f"waited {timeout:g} s for {what}; {name} is {last}\n{diagnostics(cluster)}") from error
    raise AssertionError("follow has no end")


def wait_for_condition(
    cluster: Cluster, namespace: str, name: str, kind: ConditionType, status: str = "True", *, timeout: float
) -> FineTuneJob:
    """Return the job as soon as its condition ``kind`` has ``status``. Raises the same errors as ``wait_for_job``."""

    def reached(job: FineTuneJob) -> bool:
        found = condition(job, kind)
        return found is not None and found.status == status

    return wait_for_job(cluster, namespace, name, f"{kind}={status}", reached, timeout)


def diagnostics(cluster: Cluster, namespace: str = OPERATOR_NAMESPACE) -> str:
    """Return text that helps to explain a failure: the list of all pods, and the end of the log of the operator in
    ``namespace``."""
    pods = cluster.run(["kubectl", "get", "pods", "--all-namespaces", "--output=wide"], check=False).stdout
    selector = f"--selector=app.kubernetes.io/instance={RELEASE}"
    log = cluster.run(["kubectl", "logs", "--namespace", namespace, selector, "--tail=40"], check=False)
    return f"{pods}\n--- the operator's log\n{log.stdout}{log.stderr}"


def delete_job(cluster: Cluster, namespace: str, name: str) -> None:
    """Delete a job and wait until it no longer exists."""
    cluster.kubectl("delete", f"{PLURAL}.{GROUP}", name, "--namespace", namespace, "--wait=true")


def operator_memory(cluster: Cluster, namespace: str = OPERATOR_NAMESPACE) -> int:
    """Return the working set of the operator's containers in bytes, as the kubelet measures it."""
    summary = json.loads(cluster.kubectl("get", "--raw", "/api/v1/nodes/node-1/proxy/stats/summary"))
    containers = [
        container
        for pod in summary["pods"]
        if pod["podRef"]["namespace"] == namespace
        for container in pod.get("containers", [])
    ]
    return sum(container.get("memory", {}).get("workingSetBytes", 0) for container in containers)

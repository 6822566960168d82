"""Tests on a real cluster of a job from creation to end: success, failures, retries, lost pods, reports and restarts.

API server, training-operator and kubelet are real. The training container is a stand-in image whose script runs until
SIGTERM, or ends at once with an exit code and a termination message of the trainer.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable
from typing import Any

import pytest

from finetune_core.api.conditions import ConditionType
from finetune_core.contract import (
    CREDENTIALS_FOLDER,
    RUN_FILE,
    TOKEN_FILE,
    CheckpointRecord,
    CurvePoint,
    Outcome,
    Phase,
    Report,
    RunConfig,
    report_audience,
    report_path,
)
from finetune_core.names import attempt_name, worker_name
from tests.cluster import ClusterError, wait_for
from tests.cluster.layout import HOST_ADDRESS
from tests.cluster.until_term import HANDLES_TERM, RUNS
from tests.operator.builders import NOW, result
from tests.operator.conftest import HEALTH_PORT, REPORT_PORT, Installed, condition, settled, small_job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

StandIn = Callable[[str], str]


def ends(code: int, message: str = "") -> str:
    """Return the script of a trainer that ends at once with ``code`` and the termination message ``message``.

    The script ends with exit code 99 where the run file or the credentials are not mounted.
    """
    mounted = f"test -s {RUN_FILE} && test -s {CREDENTIALS_FOLDER}/AWS_ACCESS_KEY_ID || exit 99"
    return f"{mounted}; echo -n '{message}' > /dev/termination-log; exit {code}"


def running(job: dict[str, Any]) -> bool:
    """Return whether the status lists both pods of the current attempt with a node."""
    current = job["status"]["attempts"].get("current")
    return bool(current and len([pod for pod in current["pods"] if pod.get("node")]) == 2)


def child_name(job: dict[str, Any], attempt: int = 1) -> str:
    return attempt_name(job["metadata"]["name"], job["metadata"]["uid"], attempt)


def pods_run(installed: Installed, namespace: str) -> bool:
    """Return whether the namespace has two pods that are not being deleted, and both run and handle SIGTERM. A test
    waits for this before it does anything that ends the pods."""
    pods = [
        pod
        for pod in installed.cluster.get("pods", "-n", namespace)["items"]
        if "deletionTimestamp" not in pod["metadata"]
    ]

    def handles_term(pod: dict[str, Any]) -> bool:
        return HANDLES_TERM in installed.cluster.kubectl("logs", pod["metadata"]["name"], "-n", namespace)

    return [pod["status"]["phase"] for pod in pods] == ["Running", "Running"] and all(map(handles_term, pods))


def test_a_job_succeeds_with_its_artifact_and_stays_as_it_was_applied(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    done = result(Outcome.COMPLETED, "done", with_artifact=True)
    manifest = small_job(stand_in(ends(0, done)))
    assert "Warning" not in installed.apply(manifest, namespace)
    before = installed.job(namespace)
    job = installed.wait(namespace, "the job to end", settled)
    status = job["status"]
    assert (condition(job, "Succeeded")["status"], condition(job, "Succeeded")["reason"]) == ("True", "Completed")
    assert {item["type"] for item in status["conditions"]} == set(ConditionType)
    assert condition(job, "Ready")["status"] == "True"
    assert condition(job, "Reconciling")["status"] == condition(job, "Stalled")["status"] == "False"
    assert status["artifact"]["uri"] == "s3://bucket/artifacts/000001"
    assert status["attempts"]["started"] == 1
    assert status["child"]["name"] == child_name(job)
    assert job["spec"] == before["spec"]
    assert job["metadata"]["annotations"] == before["metadata"]["annotations"]
    assert "finalizers" not in job["metadata"]
    assert job["metadata"]["generation"] == status["observedGeneration"] == 1
    run_file = installed.cluster.get("configmap", child_name(job), "-n", namespace)
    assert run_file["immutable"] is True
    assert RunConfig.model_validate_json(run_file["data"]["run.json"]).world.nodes == 2
    _assert_no_write_after_restart(installed, namespace)


def _assert_no_write_after_restart(installed: Installed, namespace: str) -> None:
    """Assert that a restarted operator reconciles the ended job again and writes nothing."""
    before = installed.job(namespace)["metadata"]["resourceVersion"]
    installed.operator.restart()
    wait_for("a reconcile of every job", lambda: _reconciles(installed) >= 1, 30)
    assert installed.job(namespace)["metadata"]["resourceVersion"] == before


def _reconciles(installed: Installed) -> float:
    with (
        installed.cluster.enter(),
        urllib.request.urlopen(f"http://127.0.0.1:{HEALTH_PORT}/metrics", timeout=5) as answer,
    ):
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('finetune_reconciles_total{result="ok"}'))


def test_bad_input_is_final_and_says_the_trainers_sentence(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    sentence = "dataset.train: column meaning must exist"
    installed.apply(small_job(stand_in(ends(64, result(Outcome.BAD_INPUT, sentence)))), namespace)
    job = installed.wait(namespace, "the job to end", settled)
    assert (condition(job, "Succeeded")["reason"], condition(job, "Succeeded")["message"]) == ("BadInput", sentence)
    assert condition(job, "Stalled")["status"] == "True"
    assert (job["status"]["attempts"]["started"], job["status"]["attempts"]["charged"]) == (1, 0)
    events = installed.cluster.get("events", "-n", namespace)["items"]
    reasons = [event["reason"] for event in events if event["involvedObject"]["kind"] == "FineTuneJob"]
    assert sorted(reasons) == ["AttemptEnded", "AttemptStarted", "BadInput"]


def test_what_failed_outside_is_retried_and_the_cause_stays_visible(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    sentence = "storage.credentialsSecretRef: the store refused the credentials"
    image = stand_in(ends(75, result(Outcome.OUTSIDE_FAILURE, sentence)))
    installed.apply(small_job(image, runPolicy={"maxRetries": 1}), namespace)
    job = installed.wait(namespace, "a retry", lambda job: condition(job, "Succeeded")["reason"] == "Retrying")
    assert sentence in condition(job, "Succeeded")["message"]
    job = installed.wait(namespace, "the job to be given up", settled)
    assert condition(job, "Succeeded")["reason"] == "RetriesExhausted"
    assert sentence in condition(job, "Succeeded")["message"]
    attempts = job["status"]["attempts"]
    assert (attempts["started"], attempts["charged"], attempts["free"]) == (2, 2, 0)
    children = installed.cluster.get("pytorchjobs", "-n", namespace)["items"]
    assert [child["metadata"]["name"] for child in children] == [child_name(job, 2)]
    maps = installed.cluster.kubectl("get", "configmaps", "-n", namespace, "-o", "name")
    assert child_name(job, 1) not in maps


@pytest.mark.parametrize("force", [False, True], ids=["gracefully", "by force"])
def test_a_deleted_pod_is_a_free_retry(installed: Installed, namespace: str, stand_in: StandIn, force: bool) -> None:
    installed.apply(small_job(stand_in(RUNS)), namespace)
    job = installed.wait(namespace, "both pods", running)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 30)
    victim = worker_name(child_name(job), 1)
    how = ["--force", "--grace-period=0"] if force else []
    installed.cluster.kubectl("delete", "pod", victim, "-n", namespace, "--wait=false", *how)
    job = installed.wait(namespace, "attempt 2", lambda job: job["status"]["attempts"]["started"] == 2 and running(job))
    attempts = job["status"]["attempts"]
    assert (attempts["charged"], attempts["free"]) == (0, 1)
    assert attempts["recent"][0]["verdict"] == "Free"
    children = installed.cluster.get("pytorchjobs", "-n", namespace)["items"]
    assert [child["metadata"]["name"] for child in children] == [child_name(job, 2)]


def test_a_deleted_child_is_a_free_retry(installed: Installed, namespace: str, stand_in: StandIn) -> None:
    installed.apply(small_job(stand_in(RUNS)), namespace)
    job = installed.wait(namespace, "both pods", running)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 30)
    installed.cluster.kubectl("delete", "pytorchjob", child_name(job), "-n", namespace, "--wait=false")
    job = installed.wait(namespace, "attempt 2", lambda job: job["status"]["attempts"]["started"] == 2)
    assert (job["status"]["attempts"]["charged"], job["status"]["attempts"]["free"]) == (0, 1)


def test_an_operator_killed_in_mid_run_doubles_nothing(installed: Installed, namespace: str, stand_in: StandIn) -> None:
    installed.apply(small_job(stand_in(RUNS)), namespace)
    job = installed.wait(namespace, "both pods, and since when they run", _running_since)
    before = installed.cluster.kubectl("get", "pods", "-n", namespace, "-o", "jsonpath={.items[*].metadata.uid}")
    installed.operator.restart()
    wait_for("a reconcile of every job", lambda: _reconciles(installed) >= 1, 30)
    assert installed.job(namespace)["status"]["attempts"] == job["status"]["attempts"]
    after = installed.cluster.kubectl("get", "pods", "-n", namespace, "-o", "jsonpath={.items[*].metadata.uid}")
    assert after == before


def _running_since(job: dict[str, Any]) -> bool:
    """Return whether both pods have nodes and the status has `runningTime`, which the operator may write later than the
    nodes."""
    return running(job) and "runningTime" in job["status"]["attempts"]["current"]


def test_deleting_the_job_leaves_nothing_also_while_the_operator_is_down(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    installed.apply(small_job(stand_in(RUNS)), namespace)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    with installed.operator.stopped():
        installed.cluster.kubectl("delete", "finetunejob", "quickstart", "-n", namespace, "--timeout=20s")
        kinds = "pytorchjobs,pods,configmaps"
        selector = ["-l", "app.kubernetes.io/managed-by=finetune-operator", "-n", namespace, "-o", "name"]
        wait_for("everything to be gone", lambda: not installed.cluster.kubectl("get", kinds, *selector), 60)


def test_a_foreign_object_of_the_childs_name_is_left_alone(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    image = stand_in(RUNS)
    with installed.operator.stopped():
        installed.apply(small_job(image), namespace)
        name = child_name(installed.job(namespace))
        container = {"name": "pytorch", "image": image}
        replica = {"replicas": 1, "restartPolicy": "Never", "template": {"spec": {"containers": [container]}}}
        foreign = {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": name},
            "spec": {"runPolicy": {"suspend": True}, "pytorchReplicaSpecs": {"Worker": replica}},
        }
        installed.apply(foreign, namespace)
    uid = installed.cluster.get("pytorchjob", name, "-n", namespace)["metadata"]["uid"]
    job = installed.wait(namespace, "the conflict", lambda job: condition(job, "Accepted")["reason"] == "NameConflict")
    assert name in condition(job, "Accepted")["message"]
    assert installed.cluster.get("pytorchjob", name, "-n", namespace)["metadata"]["uid"] == uid
    installed.cluster.kubectl("delete", "pytorchjob", name, "-n", namespace)
    job = installed.wait(namespace, "the job to go on", running)
    assert condition(job, "Accepted")["status"] == "True"


def test_a_backend_that_is_down_is_waited_for(installed: Installed, namespace: str, stand_in: StandIn) -> None:
    backend = installed.cluster.components["training-operator"]
    backend.stop()
    try:
        installed.apply(small_job(stand_in(RUNS)), namespace)
        reached = lambda job: condition(job, "Accepted")["reason"] == "BackendUnavailable"  # noqa: E731
        job = installed.wait(namespace, "the cause", reached)
        assert "webhook" in condition(job, "Accepted")["message"]
        assert condition(job, "Stalled")["status"] == "False"
    finally:
        backend.start()
        backend.wait_ready()
    installed.wait(namespace, "the job to go on", running)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"storage": "other-secret"}, ("other-secret", "not found")),
        ({"podTemplate": {"image": "registry.invalid/nobody:1"}}, ("can't be pulled", "registry.invalid/nobody:1")),
        (
            {"resources": {"nodes": 2, "gpusPerNode": 16, "cpu": "50m", "memory": "100Mi", "sharedMemory": "8Mi"}},
            ("Insufficient nvidia.com/gpu",),
        ),
    ],
    ids=["a Secret that is missing", "an image that can't be pulled", "pods that find no node"],
)
def test_what_the_pods_wait_for_stands_in_the_conditions(
    installed: Installed, namespace: str, stand_in: StandIn, spec: dict[str, Any], words: tuple[str, ...]
) -> None:
    manifest = small_job(stand_in(RUNS))
    if "storage" in spec:
        manifest["spec"]["storage"]["credentialsSecretRef"] = {"name": spec["storage"]}
    else:
        manifest["spec"] |= spec
    installed.apply(manifest, namespace)

    def explained(job: dict[str, Any]) -> bool:
        return all(word in condition(job, "Running")["message"] for word in words)

    job = installed.wait(namespace, "the cause", explained, 30)
    assert condition(job, "Succeeded")["status"] == "Unknown"
    assert job["status"]["attempts"]["started"] == 1


def test_a_quota_that_forbids_pods_is_named_in_the_conditions(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    installed.cluster.kubectl("create", "quota", "none", "--hard=pods=0", "-n", namespace)
    installed.apply(small_job(stand_in(RUNS)), namespace)
    job = installed.wait(namespace, "the cause", lambda job: "quota" in condition(job, "Running")["message"], 30)
    assert condition(job, "Succeeded")["reason"] == "Queued"


def test_an_api_server_that_was_away_is_found_again(installed: Installed, namespace: str, stand_in: StandIn) -> None:
    process = installed.operator.pid
    api_server = installed.cluster.components["api-server"]
    api_server.stop()
    before = installed.operator.log.stat().st_size
    # An idle operator logs nothing, so the first new line is about the API server.
    wait_for("the operator to notice", lambda: installed.operator.log.stat().st_size > before, 60)
    api_server.start()
    api_server.wait_ready()
    installed.apply(small_job(stand_in(RUNS)), namespace)
    installed.wait(namespace, "the child", lambda job: job["status"].get("child"), 30)
    assert installed.operator.pid == process


def report(pod_uid: str, **changes: Any) -> Report:
    values: dict[str, Any] = {
        "run": 1,
        "pod_uid": pod_uid,
        "phase": Phase.TRAINING,
        "ranks": 2,
        "step": 20,
        "total_steps": 100,
        "epoch": 0.4,
        "metrics": {"loss": 1.25},
        "history": [CurvePoint(step=20, loss=1.25)],
        "checkpoints": [CheckpointRecord(run=1, step=20, uri="s3://b/c", bytes=9, manifest_sha256="ab", time=NOW)],
    }
    return Report.model_validate(values | changes)


def post(
    installed: Installed,
    namespace: str,
    token: str,
    body: str,
    attempt: int = 1,
    *,
    server: str = f"https://{HOST_ADDRESS}:{REPORT_PORT}",
    path: str = "",
    ca_certificate: str = "",
) -> int:
    """Post a report as rank 0 of a job does, and return the HTTP status. Only ``ca_certificate`` (PEM in base64; the
    operator's CA by default) is trusted."""
    ca = ca_certificate or installed.ca_certificate
    context = ssl.create_default_context(cadata=b64decode(ca).decode())
    url = server + (path or report_path(namespace, "quickstart", attempt))
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, data=body.encode(), headers=headers)  # noqa: S310  (always https)
    with installed.cluster.enter():
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as answer:  # noqa: S310  (always https)
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


def test_a_report_with_the_pods_own_token_reaches_the_status_and_others_are_refused(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    kubectl = installed.cluster.kubectl
    installed.apply(small_job(stand_in(RUNS)), namespace)
    job = installed.wait(namespace, "both pods", running)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 30)
    pod = job["status"]["attempts"]["current"]["pods"][0]
    token = kubectl("exec", pod["name"], "-n", namespace, "--", "cat", TOKEN_FILE)
    body = report(pod["uid"]).to_json()

    def minted(audience: str) -> str:
        bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod['name']}"]
        return kubectl("create", "token", "default", "-n", namespace, f"--audience={audience}", *bound).strip()

    assert post(installed, namespace, minted("https://kubernetes.default.svc"), body) == 401
    assert post(installed, namespace, minted(report_audience("another-job")), body) == 401
    unbound = kubectl(
        "create", "token", "default", "-n", namespace, f"--audience={report_audience(job['metadata']['uid'])}"
    )
    assert post(installed, namespace, unbound.strip(), body) == 401
    assert post(installed, namespace, token, report("another-pod").to_json()) == 403
    assert post(installed, namespace, token, body, attempt=2) == 409
    assert post(installed, namespace, token, body + " " * 65536) == 413
    assert post(installed, namespace, token, body.replace("1.25", "NaN")) == 422
    assert installed.job(namespace)["status"].get("progress") is None

    assert post(installed, namespace, token, body) == 204
    job = installed.wait(namespace, "the report", lambda job: job["status"].get("progress"), 10)
    status = job["status"]
    assert (status["progress"]["step"], status["progress"]["percentage"]) == (20, 20)
    assert condition(job, "Running")["status"] == "True"
    assert condition(job, "CheckpointAvailable")["status"] == "True"
    assert status["checkpoints"][0]["last"] is True
    written = _status_writes_during_reports(installed, namespace, token, pod["uid"])
    assert written <= 2


def _status_writes_during_reports(installed: Installed, namespace: str, token: str, pod_uid: str) -> int:
    """Post 16 reports, each with a new step; return how often the operator wrote the job's status meanwhile."""
    versions: set[str] = set()
    steps = iter(range(21, 37))

    def all_posted() -> bool:
        step = next(steps, None)
        if step is None:
            return True
        assert post(installed, namespace, token, report(pod_uid, step=step).to_json()) == 204
        versions.add(installed.job(namespace)["metadata"]["resourceVersion"])
        return False

    wait_for("all reports", all_posted, 60, interval=0.3)
    return len(versions) - 1


def test_invalid_jobs_are_refused_with_a_sentence(installed: Installed, namespace: str) -> None:
    source = {"s3": {"uri": "s3://bucket/x"}}
    cases: dict[str, dict[str, Any]] = {
        "exactly one of": {"model": source | {"huggingFace": {"repo": "a/b"}}},
        "`lora` must be absent unless `method` is LoRA": {"method": "Full", "lora": {"rank": 8}},
        "zeroStage in body should be less than or equal to 3": {"deepspeed": {"zeroStage": 5}},
    }
    for sentence, spec in cases.items():
        with pytest.raises(ClusterError, match=sentence.replace("`", ".")):
            installed.apply(small_job("x", **spec), namespace)


def test_the_model_of_a_job_can_not_be_changed(installed: Installed, namespace: str, stand_in: StandIn) -> None:
    image = stand_in(RUNS)
    installed.apply(small_job(image), namespace)
    with pytest.raises(ClusterError, match="must not change after creation"):
        installed.apply(small_job(image, model={"s3": {"uri": "s3://finetune/models/another"}}), namespace)
    installed.apply(small_job(image, runPolicy={"maxRetries": 5}), namespace)


def test_a_spec_that_only_the_operator_can_refuse_is_final(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    training = {"maxSteps": 10, "globalBatchSize": 4, "microBatchSize": 3}
    installed.apply(small_job(stand_in(RUNS), training=training), namespace)
    job = installed.wait(namespace, "the refusal", settled)
    assert condition(job, "Accepted")["status"] == "False"
    assert condition(job, "Stalled")["status"] == "True"
    assert condition(job, "Succeeded")["reason"] == "BadInput"
    assert condition(job, "Accepted")["message"].startswith("spec.training.microBatchSize: must be at most 2")
    assert installed.cluster.get("pytorchjobs", "-n", namespace)["items"] == []


def test_the_installed_crd_is_the_committed_one_and_is_served_without_a_warning(installed: Installed) -> None:
    stored = installed.cluster.get("crd", "finetunejobs.finetune.dev")
    conditions = {item["type"]: item["status"] for item in stored["status"]["conditions"]}
    assert conditions["Established"] == conditions["NamesAccepted"] == "True"
    assert conditions.get("NonStructuralSchema", "False") == "False"
    assert "x-kubernetes-preserve-unknown-fields" not in json.dumps(stored["spec"])

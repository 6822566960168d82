"""Tests on a real cluster of suspend, resume, cancel, Kueue, deadlines, TTL, and upgrades of the operator.

API server, training-operator and kubelet are real. The training container is a stand-in image that runs a script.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from finetune_core.contract import Outcome
from finetune_core.names import worker_name
from tests.cluster import wait_for
from tests.cluster.kueue import FIELD_MANAGER, Kueue, PodSetInfo, suspending_webhook
from tests.cluster.node import REGISTRY
from tests.cluster.until_term import HANDLES_TERM, RUNS
from tests.operator.builders import result
from tests.operator.conftest import Installed, condition, settled, small_job
from tests.operator.test_on_cluster import StandIn, child_name, ends, pods_run, running

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SAVES = f"trap 'sleep 4; exit 143' TERM; echo {HANDLES_TERM}; while :; do sleep 0.2; done"
"""Script of a trainer that saves a checkpoint for four seconds after SIGTERM."""
DEADLINE_SECONDS = 60
"""The smallest deadline that the CRD allows."""

Manifest = dict[str, Any]


def policy(installed: Installed, namespace: str, name: str = "quickstart", **changes: Any) -> None:
    """Patch `spec.runPolicy` of the job, as a user does with kubectl."""
    patch = json.dumps({"spec": {"runPolicy": changes}})
    installed.cluster.kubectl("patch", "finetunejob", name, "-n", namespace, "--type=merge", "-p", patch)


def reason(job: Manifest) -> str:
    return str(condition(job, "Succeeded")["reason"])


def rests(installed: Installed, namespace: str, what: str = "the job to be suspended") -> Manifest:
    """Wait until the job is suspended and no pod or PyTorchJob of its attempt exists; return the job."""
    job = installed.wait(namespace, what, lambda job: reason(job) == "Suspended")
    wait_for("the pods to be gone", lambda: objects(installed, namespace, "pods,pytorchjobs") == [], 60)
    return job


def objects(installed: Installed, namespace: str, kinds: str) -> list[str]:
    selector = ["-l", "app.kubernetes.io/managed-by=finetune-operator", "-n", namespace, "-o", "name"]
    return installed.cluster.kubectl("get", kinds, *selector).split()


def held(job: Manifest) -> bool:
    """Return whether the job's status says that Kueue holds the attempt back, so that no deadline runs."""
    current = job["status"]["attempts"].get("current")
    return bool(current) and "admittedTime" not in current and reason(job) == "Queued"


def counts(job: Manifest) -> tuple[int, int, int]:
    attempts = job["status"]["attempts"]
    return attempts["started"], attempts["charged"], attempts["free"]


def seconds_between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


@pytest.fixture(scope="module")
def late_jobs(installed: Installed, stand_in: StandIn) -> Iterator[str]:
    """Create jobs that reach their deadlines while the other tests run; the last tests of the module check them."""
    namespace = "deadlines"
    kubectl = installed.cluster.kubectl
    kubectl("create", "namespace", namespace)
    keys = ["--from-literal=AWS_ACCESS_KEY_ID=a", "--from-literal=AWS_SECRET_ACCESS_KEY=b"]
    kubectl("create", "secret", "generic", "storage-credentials", "-n", namespace, *keys)
    wait_for("the service account", lambda: "default" in kubectl("get", "sa", "-n", namespace), 20)
    active = small_job(stand_in(RUNS), runPolicy={"activeDeadlineSeconds": DEADLINE_SECONDS})
    resources = {"nodes": 2, "gpusPerNode": 16, "cpu": "50m", "memory": "100Mi", "sharedMemory": "8Mi"}
    pending = {"pendingDeadlineSeconds": DEADLINE_SECONDS}
    unplaced = small_job(stand_in(RUNS), runPolicy=pending, resources=resources)
    for name, job in (("active", active), ("unplaced", unplaced)):
        job["metadata"]["name"] = name
        installed.apply(job, namespace)
    yield namespace
    kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.mark.usefixtures("late_jobs")
def test_suspend_takes_the_pods_and_resume_goes_on_and_neither_is_charged(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    installed.apply(small_job(stand_in(SAVES)), namespace)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    policy(installed, namespace, suspend=True)
    job = rests(installed, namespace)
    assert counts(job) == (1, 0, 1)
    assert job["status"]["attempts"]["recent"][0]["reason"] == "Suspended"
    explained = lambda job: "set it to false" in condition(job, "Succeeded")["message"]  # noqa: E731
    job = installed.wait(namespace, "what to do", explained)
    assert condition(job, "Running")["status"] == "False"
    assert job["status"]["usage"]["activeSeconds"] >= 4, "the pods saved for four seconds"
    version = installed.job(namespace)["metadata"]["resourceVersion"]
    installed.operator.restart()
    policy(installed, namespace, suspend=False)
    job = installed.wait(namespace, "attempt 2", lambda job: counts(job)[0] == 2 and running(job))
    assert counts(job) == (2, 0, 1)
    assert objects(installed, namespace, "pytorchjobs") == [f"pytorchjob.kubeflow.org/{child_name(job, 2)}"]
    assert int(job["metadata"]["resourceVersion"]) > int(version)
    events = installed.cluster.get("events", "-n", namespace)["items"]
    ended = [event for event in events if event["reason"] == "AttemptEnded"]
    assert [(event["type"], event.get("count")) for event in ended] == [("Normal", None)]


def test_what_kueue_wrote_into_the_child_is_never_written_over(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    cluster, node = installed.cluster, installed.cluster.get("nodes")["items"][0]["metadata"]["name"]
    cluster.kubectl("create", "priorityclass", f"of-{namespace}", "--value=1000")
    kueue = Kueue(cluster, namespace)
    job = small_job(stand_in(RUNS), runPolicy={"queueName": "gpu", "priorityClassName": f"of-{namespace}"})
    job["metadata"]["labels"] = {"kueue.x-k8s.io/priority-class": "urgent"}
    with suspending_webhook(cluster, namespace):
        installed.apply(job, namespace)
        job = installed.wait(namespace, "the queue", held)
    assert reason(job) == "Queued"
    assert "queue gpu" in condition(job, "Succeeded")["message"]
    name = child_name(job)
    created = kueue.get(name)
    labels = created["metadata"]["labels"]
    assert (labels["kueue.x-k8s.io/queue-name"], labels["kueue.x-k8s.io/priority-class"]) == ("gpu", "urgent")
    template = created["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert template["spec"]["priorityClassName"] == f"of-{namespace}"
    assert created["spec"]["runPolicy"]["suspend"] is True
    assert objects(installed, namespace, "pods") == []

    info = PodSetInfo(
        node_selector={"kubernetes.io/hostname": node},
        tolerations=[{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
        labels={"kueue.x-k8s.io/podset": "worker"},
        annotations={"kueue.x-k8s.io/workload": "w1"},
    )
    admitted = kueue.admit(name, info)
    job = installed.wait(namespace, "both pods", running)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    for pod in cluster.get("pods", "-n", namespace)["items"]:
        assert pod["spec"]["nodeSelector"]["kubernetes.io/hostname"] == node
        assert info.tolerations[0] in pod["spec"]["tolerations"]
        assert pod["metadata"]["labels"]["kueue.x-k8s.io/podset"] == "worker"
        assert pod["metadata"]["annotations"]["kueue.x-k8s.io/workload"] == "w1"
    installed.operator.restart()
    policy(installed, namespace, maxRetries=7)
    generation = installed.job(namespace)["metadata"]["generation"]
    installed.wait(namespace, "a reconcile", lambda job: job["status"]["observedGeneration"] == generation)
    _only_kueue_wrote(kueue.get(name), admitted)

    evicted = kueue.evict(name)
    wait_for("the pods to be gone", lambda: objects(installed, namespace, "pods") == [], 60)
    job = installed.wait(namespace, "the queue", held)
    assert counts(job) == (1, 0, 0)
    assert job["status"]["attempts"]["current"]["pods"] == []
    _only_kueue_wrote(kueue.get(name), evicted)

    wait_for("no pod to be active", lambda: not kueue.is_active(name), 30)
    again = kueue.admit(name, info)
    job = installed.wait(namespace, "both pods again", running)
    assert counts(job) == (1, 0, 0)
    assert job["status"]["child"]["uid"] == created["metadata"]["uid"]
    _only_kueue_wrote(kueue.get(name), again)
    cluster.kubectl("delete", "priorityclass", f"of-{namespace}")


def _only_kueue_wrote(now: Manifest, written: Manifest) -> None:
    """Assert that the operator has written nothing into the PyTorchJob since it created the object. Spec, labels,
    annotations and owner references of ``now`` must be those of ``written``, the object after the last write of
    Kueue."""
    assert now["spec"] == written["spec"]
    assert now["metadata"]["generation"] == written["metadata"]["generation"]
    for part in ("labels", "annotations", "ownerReferences"):
        assert now["metadata"].get(part) == written["metadata"].get(part)
    managers = {(entry["manager"], entry.get("subresource", "")) for entry in now["metadata"]["managedFields"]}
    assert (FIELD_MANAGER, "") in managers
    by_operator = [entry for entry in now["metadata"]["managedFields"] if entry["manager"] == "finetune-operator"]
    # The only entry of the operator must be that of its create request. The API server takes the time of this entry
    # before it calls webhooks, and sets the object's creationTimestamp afterwards. So the entry may be a second older
    # than the object, and only a later write would make it younger.
    (entry,) = by_operator
    assert entry["time"] <= now["metadata"]["creationTimestamp"]


@pytest.mark.long
def test_a_queue_that_resumes_while_old_pods_still_save_costs_a_free_attempt(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    """Kueue resumes the PyTorchJob while old pods still exist. training-operator then counts the old pods as failed and
    fails the PyTorchJob, so the operator must start a new attempt."""
    kueue = Kueue(installed.cluster, namespace)
    with suspending_webhook(installed.cluster, namespace):
        installed.apply(small_job(stand_in(SAVES), runPolicy={"queueName": "gpu"}), namespace)
        job = installed.wait(namespace, "the child", lambda job: job["status"].get("child", {}).get("uid"))
        kueue.admit(child_name(job), PodSetInfo())
        wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
        kueue.evict(child_name(job))

        def suspended() -> bool:
            conditions = kueue.get(child_name(job))["status"]["conditions"]
            return any(item["type"] == "Suspended" and item["status"] == "True" for item in conditions)

        wait_for("the suspension", suspended, 10)
        assert not kueue.is_active(child_name(job)), "Kueue sees no active pod, although the pods still save"
        kueue.admit(child_name(job), PodSetInfo())
        job = installed.wait(namespace, "attempt 2", lambda job: counts(job)[0] == 2 and reason(job) == "Queued")
        assert counts(job) == (2, 0, 1)
        past = job["status"]["attempts"]["recent"][0]
        assert (past["verdict"], past["reason"]) == ("Free", "ResumedTooEarly")
        second = child_name(job, 2)
        installed.wait(namespace, "its child", lambda job: job["status"].get("child", {}).get("name") == second)
        kueue.admit(second, PodSetInfo())
        installed.wait(namespace, "both pods", running)


def test_cancel_ends_the_job_once_its_pods_have_ended(installed: Installed, namespace: str, stand_in: StandIn) -> None:
    installed.apply(small_job(stand_in(SAVES)), namespace)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    policy(installed, namespace, cancel=True)
    job = installed.wait(namespace, "the order", lambda job: reason(job) == "Cancelled")
    assert condition(job, "Succeeded")["status"] == "Unknown", "the pods still save"
    job = installed.wait(namespace, "the end", settled)
    assert (condition(job, "Succeeded")["status"], reason(job), counts(job)) == ("False", "Cancelled", (1, 0, 0))
    assert condition(job, "Stalled")["status"] == "True"
    assert objects(installed, namespace, "pods,pytorchjobs,configmaps,networkpolicies") == []
    usage = job["status"]["usage"]
    assert usage["activeSeconds"] >= 4
    assert usage["holders"] == []


def test_a_suspended_job_is_cancelled_too(installed: Installed, namespace: str, stand_in: StandIn) -> None:
    installed.apply(small_job(stand_in(RUNS), runPolicy={"suspend": True}), namespace)
    job = installed.wait(namespace, "the rest", lambda job: reason(job) == "Suspended")
    assert counts(job) == (0, 0, 0)
    assert objects(installed, namespace, "pods,pytorchjobs,configmaps,networkpolicies") == []
    policy(installed, namespace, cancel=True)
    job = installed.wait(namespace, "the end", settled)
    assert (reason(job), counts(job)) == ("Cancelled", (0, 0, 0))


def test_a_scaled_child_is_noticed_and_costs_a_free_attempt(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    installed.apply(small_job(stand_in(RUNS)), namespace)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    job = installed.wait(namespace, "both pods", running)
    installed.cluster.kubectl("scale", "pytorchjob", child_name(job), "--replicas=1", "-n", namespace)
    has_cause = lambda job: (job["status"]["attempts"].get("current") or {}).get("cause")  # noqa: E731
    cause = installed.wait(namespace, "the cause", has_cause)["status"]["attempts"]["current"]["cause"]
    assert (cause["verdict"], cause["reason"]) == ("Free", "ChildChanged")
    assert "scaled to 1 workers" in cause["message"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_free_attempt_names_the_pod_that_was_deleted(
    installed: Installed, namespace: str, stand_in: StandIn, index: int
) -> None:
    # training-operator deletes the other pod a moment later. In the same second the message names both pods.
    installed.apply(small_job(stand_in(SAVES)), namespace)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    job = installed.job(namespace)
    victim = worker_name(child_name(job), index)
    installed.cluster.kubectl("delete", "pod", victim, "-n", namespace, "--wait=false")
    job = installed.wait(namespace, "the end of attempt 1", lambda job: job["status"]["attempts"]["recent"])
    past = job["status"]["attempts"]["recent"][0]
    assert (past["verdict"], past["reason"]) == ("Free", "PodDeleted")
    assert f"pod {victim} was deleted" in past["message"] or f"pod {victim} in the same second" in past["message"]


def test_the_ttl_removes_everything_but_the_job(installed: Installed, namespace: str, stand_in: StandIn) -> None:
    done = result(Outcome.COMPLETED, "done", with_artifact=True)
    installed.apply(small_job(stand_in(ends(0, done))), namespace)
    before = installed.wait(namespace, "the job to end", settled)
    assert len(objects(installed, namespace, "pods,pytorchjobs,configmaps,networkpolicies")) == 5
    policy(installed, namespace, ttlSecondsAfterFinished=0)
    wait_for(
        "everything to be gone",
        lambda: objects(installed, namespace, "pods,pytorchjobs,configmaps,networkpolicies") == [],
        60,
    )
    job = installed.wait(namespace, "the record of the child to be gone", lambda job: "child" not in job["status"])
    before["status"].pop("child")
    # The edit of the TTL is a new generation, and an ended job only observes it.
    generation = job["metadata"]["generation"]
    before["status"]["observedGeneration"] = generation
    for item in before["status"]["conditions"]:
        item["observedGeneration"] = generation
    assert job["status"] == before["status"]


@pytest.mark.long
def test_a_namespace_goes_also_while_the_operator_is_down(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    installed.apply(small_job(stand_in(RUNS)), namespace)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)

    def is_gone() -> bool:
        return f"namespace/{namespace}\n" not in installed.cluster.kubectl("get", "namespaces", "-o", "name")

    try:
        with installed.operator.stopped():
            installed.cluster.kubectl("delete", "namespace", namespace, "--wait=false")
            wait_for("the namespace to be gone", is_gone, 120)
    finally:
        installed.cluster.kubectl("create", "namespace", namespace)


@pytest.mark.long
def test_the_image_of_attempt_1_is_run_by_later_attempts_also_after_an_upgrade(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    moving = f"{REGISTRY}/stand-ins:moving"
    environment: dict[str, str] = installed.operator.environment  # type: ignore[assignment]
    before = dict(environment)
    push(installed, stand_in(RUNS), moving)
    try:
        environment["FINETUNE_TRAINER_IMAGE"] = moving
        installed.operator.restart()
        job = small_job("unused")
        del job["spec"]["podTemplate"]
        installed.apply(job, namespace)
        job = installed.wait(namespace, "the digest", lambda job: "@sha256:" in job["status"]["image"])
        assert job["status"]["image"].startswith(f"{moving}@sha256:")
        wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
        # The tag now points to another image. In addition, an upgrade of the operator changes the default image.
        push(installed, stand_in(SAVES), moving)
        environment["FINETUNE_TRAINER_IMAGE"] = f"{REGISTRY}/stand-ins:upgraded"
        installed.operator.restart()
        victim = worker_name(child_name(job), 0)
        installed.cluster.kubectl("delete", "pod", victim, "-n", namespace, "--wait=false")
        later = installed.wait(namespace, "attempt 2", lambda job: counts(job)[0] == 2 and running(job))
        wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    finally:
        environment |= before
        installed.operator.restart()
    assert later["status"]["image"] == job["status"]["image"]
    digest = job["status"]["image"].partition("@")[2]
    for pod in installed.cluster.get("pods", "-n", namespace)["items"]:
        assert pod["spec"]["containers"][0]["image"] == job["status"]["image"]
        assert pod["status"]["containerStatuses"][0]["imageID"].endswith(digest)


@pytest.mark.long
def test_an_image_that_the_node_also_knows_from_another_registry_is_run_again(
    installed: Installed, namespace: str, stand_in: StandIn
) -> None:
    """The job's next attempt must use the tag, because the digest that the kubelet reports is of no use.

    The kubelet reports the image under the other registry, with a digest that the job's registry may not have.
    """
    image, elsewhere = stand_in(f"{RUNS} # known twice"), f"{REGISTRY}/elsewhere"
    push(installed, image, f"{elsewhere}:1")
    other = small_job(f"{elsewhere}:1")
    other["metadata"] = {"name": "other"}
    installed.apply(other, namespace)
    installed.wait(namespace, "the pull", lambda job: "@sha256:" in job["status"]["image"], name="other")
    installed.cluster.kubectl("delete", "finetunejob", "other", "-n", namespace)
    wait_for("the pods to be gone", lambda: objects(installed, namespace, "pods") == [], 60)

    installed.apply(small_job(image), namespace)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    (first, _) = installed.cluster.get("pods", "-n", namespace)["items"]
    assert first["status"]["containerStatuses"][0]["imageID"].startswith(f"{elsewhere}@sha256:")
    victim = worker_name(child_name(installed.job(namespace)), 0)
    installed.cluster.kubectl("delete", "pod", victim, "-n", namespace, "--wait=false")
    later = installed.wait(namespace, "attempt 2", lambda job: counts(job)[0] == 2 and running(job))
    assert later["status"]["image"] == image
    wait_for(
        "both pods to run",
        lambda: pods_run(installed, namespace),
        60,
        evidence=lambda: installed.evidence(namespace),
    )


def push(installed: Installed, image: str, reference: str) -> None:
    """Push ``image`` from the node to the registry as ``reference``, and remove ``reference`` from the node."""
    ctr = ["ctr", "--namespace=k8s.io", "images"]
    for arguments in (
        ["tag", "--force", image, reference],
        ["push", "--plain-http", reference],
        ["rm", reference],
    ):
        installed.cluster.run([*ctr, *arguments])


# The following tests use the jobs of `late_jobs`. They come last, so that these jobs have reached their deadlines.


def test_the_active_deadline_ends_a_job_to_the_second(installed: Installed, late_jobs: str) -> None:
    job = installed.wait(late_jobs, "the deadline", settled, 3 * DEADLINE_SECONDS, name="active")
    assert (condition(job, "Succeeded")["status"], reason(job)) == ("False", "DeadlineExceeded")
    assert "60 s of `runPolicy.activeDeadlineSeconds`" in condition(job, "Succeeded")["message"]
    assert counts(job) == (1, 0, 0)
    (past,) = job["status"]["attempts"]["recent"]
    assert past["reason"] == "DeadlineExceeded"
    assert DEADLINE_SECONDS <= job["status"]["usage"]["activeSeconds"] <= DEADLINE_SECONDS + 10


def test_the_pending_deadline_ends_a_job_whose_pods_find_no_node(installed: Installed, late_jobs: str) -> None:
    job = installed.wait(late_jobs, "the deadline", settled, 3 * DEADLINE_SECONDS, name="unplaced")
    assert reason(job) == "DeadlineExceeded"
    message = condition(job, "Succeeded")["message"]
    assert "60 s of `runPolicy.pendingDeadlineSeconds`" in message
    assert "Insufficient nvidia.com/gpu" in message
    (past,) = job["status"]["attempts"]["recent"]
    assert DEADLINE_SECONDS <= seconds_between(past["startTime"], past["endTime"]) <= DEADLINE_SECONDS + 5
    assert job["status"]["usage"]["gpuSeconds"] == 0

"""The commands on a real API server: what they show and change, with the permissions that docs/cli.md lists, and what
they say without them. Logs come from pods that a real kubelet runs. No operator works, so only the tests change jobs.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.demo import steps
from finetune_cli.main import main
from finetune_core.names import attempt_name, worker_name
from finetune_operator.objects.labels import REPLICA_INDEX, attempt_labels
from tests.cli.stored import stored
from tests.cli.test_terminal import CONTROL, HOSTILE
from tests.cluster import Cluster, wait_for
from tests.cluster.oci import BUSYBOX_IMAGE
from tests.core.test_docs import DOCS, text_of

pytestmark = pytest.mark.cluster
NAMESPACE = "commands"
OTHER = "commands-other"
USER, STRANGER = "user", "stranger"
CRD = steps.REPOSITORY / "crds" / "finetune.dev_finetunejobs.yaml"


@dataclass(frozen=True)
class Answer:
    """What a command wrote, and its exit code."""

    code: int
    out: str
    err: str


Finetune = Callable[..., Answer]


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Iterator[Cluster]:
    """The test cluster with the CRD, two namespaces, a user with the Role of docs/cli.md, and one without any."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "--filename", str(CRD))
    name = yaml.safe_load(CRD.read_text())["metadata"]["name"]
    cluster.kubectl("wait", "--for=condition=Established", "crd", name, "--timeout=30s")
    (role,) = re.findall(r"^```yaml\n(.*?)^```", text_of(DOCS / "cli.md"), re.MULTILINE | re.DOTALL)
    for namespace in (NAMESPACE, OTHER):
        cluster.kubectl("create", "namespace", namespace)
    cluster.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=role)
    for user in (USER, STRANGER):
        cluster.kubectl("create", "serviceaccount", user, "-n", NAMESPACE)
    account = f"{NAMESPACE}:{USER}"
    binding = ["--role=finetune-user", f"--serviceaccount={account}"]
    cluster.kubectl("create", "rolebinding", USER, "-n", NAMESPACE, *binding)
    yield cluster
    for namespace in (NAMESPACE, OTHER):
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.fixture(scope="module")
def kubeconfigs(served: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A kubeconfig for each of the two users, and for the administrator."""
    folder = tmp_path_factory.mktemp("kubeconfigs")
    found = {}
    for user in (USER, STRANGER, "administrator"):
        config = yaml.safe_load(served.kubeconfig.read_text())
        config["contexts"][0]["context"]["namespace"] = NAMESPACE
        if user != "administrator":
            token = served.kubectl("create", "token", user, "-n", NAMESPACE).strip()
            config["users"][0]["user"] = {"token": token}
        found[user] = folder / user
        found[user].write_text(yaml.safe_dump(config))
    return found


@pytest.fixture
def finetune(
    served: Cluster,
    kubeconfigs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Finetune]:
    """Runs a command of the program in this process, inside of the cluster's network, as one of the users."""
    handlers = list(logging.getLogger().handlers)

    def run(*arguments: str, user: str = USER) -> Answer:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfigs[user]))
        capsys.readouterr()
        with served.enter():
            code = main(list(arguments))
        written = capsys.readouterr()
        return Answer(code, written.out, written.err)

    yield run
    logging.getLogger().handlers[:] = handlers
    logging.captureWarnings(capture=False)


def create(cluster: Cluster, name: str, state: str | None = None, *, namespace: str = NAMESPACE, **labels: str) -> str:
    """Create a job with the status in `jobs/<state>.yaml`, as the operator would write it, and return its uid."""
    manifest = steps.manifest_of(steps.QUICKSTARTS["LoRA"], metadata__name=name)
    manifest["metadata"]["labels"] = labels
    steps.apply(cluster, manifest, namespace)
    if state is not None:
        patch = json.dumps({"status": stored(state)["status"]})
        place = ["--namespace", namespace, "--subresource=status", "--type=merge"]
        cluster.kubectl("patch", "finetunejob", name, *place, "--patch", patch)
    return cluster.kubectl("get", "finetunejob", name, "-n", namespace, "-o", "jsonpath={.metadata.uid}")


def policy(cluster: Cluster, name: str) -> dict[str, Any]:
    """Return `runPolicy` of a job as the API server has it."""
    found: dict[str, Any] = json.loads(cluster.kubectl("get", "ftj", name, "-n", NAMESPACE, "-o", "json"))
    return dict(found["spec"]["runPolicy"])


def test_jobs_are_listed_by_labels_in_one_namespace_or_in_all(served: Cluster, finetune: Finetune) -> None:
    create(served, "listed-a", "running", team="nlp")
    create(served, "listed-b", "failed", team="vision")
    create(served, "listed-c", namespace=OTHER, team="nlp")
    lines = finetune("list", "-l", "team=nlp").out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["listed-a", "LoRA", "Running"]]
    everywhere = finetune("list", "-A", "-l", "team=nlp", user="administrator").out.splitlines()
    assert [line.split()[:2] for line in everywhere[1:]] == [[NAMESPACE, "listed-a"], [OTHER, "listed-c"]]
    assert finetune("list", "-l", "team", "-o", "name").out.splitlines() == [
        "finetunejob.finetune.dev/listed-a",
        "finetunejob.finetune.dev/listed-b",
    ]
    listing = json.loads(finetune("list", "listed-a", "listed-b", "-o", "json").out)
    assert [job["metadata"]["name"] for job in listing["items"]] == ["listed-a", "listed-b"]
    assert "managedFields" not in listing["items"][0]["metadata"]
    assert yaml.safe_load(finetune("list", "listed-a", "-o", "yaml").out)["items"] == listing["items"][:1]
    wide = finetune("list", "-l", "team=vision", "-o", "wide").out
    assert "row 1 has no field `sentense`" in wide
    nothing = finetune("list", "-l", "team=sales")
    assert (nothing.code, nothing.out) == (0, "")
    assert nothing.err.startswith(
        f"no FineTuneJob in namespace {NAMESPACE} with the labels team=sales; `finetune list -A`"
    )
    wrong = finetune("list", "-l", "team in")
    assert wrong.code == 2
    assert "the API server refuses the request" in wrong.err


def test_a_wrong_name_brings_similar_ones(served: Cluster, finetune: Finetune) -> None:
    create(served, "viggo-lora")
    for command in (["describe"], ["watch"], ["logs"], ["suspend"], ["watch", "viggo-lora"], ["list"]):
        found = finetune(*command, "vigo-lora")
        assert found.code == 2
        assert f"FineTuneJob {NAMESPACE}/vigo-lora: does not exist; similar names are viggo-lora" in found.err
    assert "`finetune list` shows the jobs" in finetune("describe", "zzz").err


def test_orders_change_the_policy_of_the_job_and_nothing_else(served: Cluster, finetune: Finetune) -> None:
    create(served, "ordered", "running", wave="one")
    before = policy(served, "ordered")
    told = finetune("suspend", "ordered")
    assert (told.code, told.err) == (0, "")
    assert told.out == "ordered is being suspended; `finetune resume` lets it go on\n"
    assert policy(served, "ordered") == {**before, "suspend": True}
    assert finetune("suspend", "ordered").out == "ordered is suspended already\n"
    assert finetune("resume", "finetunejob.finetune.dev/ordered").code == 0
    assert policy(served, "ordered") == {**before, "suspend": False}
    create(served, "ordered-too", "succeeded", wave="one")
    cancelled = finetune("cancel", "-l", "wave=one")
    assert cancelled.code == 2
    assert cancelled.out == "ordered is being cancelled; its checkpoints stay\n"
    assert "ordered-too: has ended (Completed) and can't be told to cancel" in cancelled.err
    assert policy(served, "ordered")["cancel"] is True
    assert "is being cancelled and can't be told to resume" in finetune("resume", "ordered").err
    assert "selects no FineTuneJob" in finetune("cancel", "-l", "wave=two").err
    fields = served.kubectl("get", "ftj", "ordered", "-n", NAMESPACE, "-o", "yaml", "--show-managed-fields")
    assert "manager: finetune-cli" in fields


def test_a_stranger_is_told_which_permission_is_missing(served: Cluster, finetune: Finetune) -> None:
    create(served, "secret-job", "running")
    for arguments, verb, resource in (
        (["list"], "list", "finetunejobs.finetune.dev"),
        (["watch"], "list", "finetunejobs.finetune.dev"),
        (["describe", "secret-job"], "get", "finetunejobs.finetune.dev"),
        (["cancel", "secret-job"], "get", "finetunejobs.finetune.dev"),
    ):
        found = finetune(*arguments, user=STRANGER)
        assert (found.code, found.out) == (2, "")
        assert f"ask for the verb `{verb}` on `{resource}`" in found.err
        assert len(found.err.splitlines()) == 1
    assert "ask for the verb `list` on" in finetune("list", "-A").err
    assert finetune("list", "-n", OTHER).code == 2


def test_a_cluster_without_the_resource_says_so(
    served: Cluster, finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("following", "job_client"):
        monkeypatch.setattr(f"finetune_cli.apiserver.{module}.PLURAL", "finetunejobz")
    for arguments in (["list"], ["watch", "x"], ["describe", "x"], ["resume", "x"]):
        found = finetune(*arguments, user="administrator")
        assert found.code == 2
        assert "FineTuneJob: is unknown to this cluster; install the Helm chart first" in found.err


def test_several_jobs_are_watched_until_all_have_ended(served: Cluster, finetune: Finetune) -> None:
    create(served, "watched-a", "running", sweep="x")
    create(served, "watched-b", "gate-failed", sweep="x")
    change = threading.Timer(2, create, (served, "watched-a", "succeeded"))
    change.start()
    found = finetune("watch", "watched-a", "watched-b", "--timeout", "60")
    change.join()
    assert found.code == 3
    assert re.search(r"^\d\d:\d\d:\d\d  watched-a  Running: all 2 ranks report$", found.out, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d  watched-a  Completed", found.out, re.MULTILINE)
    assert "watched-b  required exact at least 0.8: failed" in found.out
    assert found.err == "finetune: watched-b: GateFailed: evaluation.require: exact must be at least 0.8 and is 0.75\n"
    assert finetune("watch", "watched-a").code == 0
    assert "-A: must not be used together with names" in finetune("watch", "watched-a", "-A").err
    assert "-l: must not be used together with names" in finetune("cancel", "watched-a", "-l", "sweep").err
    late = finetune("watch", "-l", "sweep=x", "--timeout", "1")
    assert (late.code, late.err) == (0, "")
    assert "watched-b  GateFailed" in late.out
    create(served, "watched-c", "running")
    late = finetune("watch", "watched-b", "watched-c", "--timeout", "1")
    assert (late.code, late.err) == (2, "finetune: watched-b, watched-c: has not ended after 1 s\n")


def test_a_watch_goes_on_after_it_ended_and_after_a_restart_of_the_api_server(
    served: Cluster, finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_cli.apiserver.following.WATCH_SECONDS", 1)
    create(served, "long-a", "running")
    create(served, "long-b", "running")

    def meanwhile() -> None:
        create(served, "long-a", "succeeded")
        served.components["api-server"].restart()
        create(served, "long-b", "succeeded")

    change = threading.Timer(3, meanwhile)
    change.start()
    found = finetune("watch", "long-a", "long-b", "--timeout", "120")
    change.join()
    assert found.code == 0
    assert [line.split()[1] for line in found.out.splitlines() if "  Completed" in line] == ["long-a", "long-b"]


def pod_of(name: str, uid: str, script: str, *, attempt: int = 2, index: int = 0) -> dict[str, Any]:
    """Return a pod as training-operator makes it for an attempt of the job, whose container runs ``script``."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": worker_name(attempt_name(name, uid, attempt), index),
            "labels": {**attempt_labels(name, uid, attempt), REPLICA_INDEX: str(index)},
        },
        "spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "pytorch", "image": BUSYBOX_IMAGE, "command": ["sh", "-c", script]}],
        },
    }


def test_logs_and_events_come_from_the_pods_of_the_job(served: Cluster, finetune: Finetune) -> None:
    uid = create(served, "logged", "running")
    assert "has no pod of attempt 2 any more" in finetune("logs", "logged").err
    octal = "".join(f"\\{byte:03o}" for byte in HOSTILE.encode())
    scripts = [f"printf 'worker 0\\n{octal}\\nlast\\n'", "echo worker 1"]
    for index, script in enumerate(scripts):
        pod = pod_of("logged", uid, script, index=index)
        served.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(pod))
    names = [pod_of("logged", uid, "", index=index)["metadata"]["name"] for index in (0, 1)]

    def ended() -> bool:
        phases = served.kubectl("get", "pods", "-n", NAMESPACE, *names, "-o", "jsonpath={.items[*].status.phase}")
        return phases.split() == ["Succeeded", "Succeeded"]

    wait_for("both pods to end", ended, 60)
    found = finetune("logs", "logged")
    assert (found.code, found.err) == (0, "")
    lines = found.out.splitlines()
    assert (lines[0], lines[-1]) == ("worker 0", "last")
    assert CONTROL.findall(found.out) == []
    assert "before" in found.out
    assert finetune("logs", "logged", "-f", "--tail", "1").out == "last\n"
    both = finetune("logs", "logged", "--all-workers", "--attempt", "2").out.splitlines()
    assert {"[0] worker 0", "[1] worker 1", "[0] last"} <= set(both)
    assert "has no worker 7 in attempt 2; its workers are 0, 1" in finetune("logs", "logged", "--worker", "7").err
    assert "has no attempt 9" in finetune("logs", "logged", "--attempt", "9").err
    assert "container" in finetune("logs", "logged", "-c", "other").err
    events = finetune("events", "logged")
    assert events.code == 0
    assert any(line.split()[2] == "Scheduled" and names[0] in line for line in events.out.splitlines()[1:])
    raw = json.loads(finetune("events", "logged", "-o", "json").out)
    assert {event["regarding"]["name"] for event in raw["items"]} == set(names)
    page = finetune("describe", "logged")
    assert (page.code, page.err) == (0, "")
    assert "Scheduled" in page.out
    assert "PodDeleted: Somebody deleted the pod that the message names." in page.out
    served.kubectl("delete", "pod", "-n", NAMESPACE, *names, "--now")
    gone = finetune("logs", "logged")
    assert gone.code == 2
    assert "has no pod of attempt 2 any more, and a log goes with its pod" in gone.err


def test_a_hostile_job_is_shown_harmlessly_by_every_command(served: Cluster, finetune: Finetune) -> None:
    create(served, "hostile", "failed")
    status = stored("failed")["status"]
    for condition in status["conditions"]:
        condition["message"] = HOSTILE
    status["notices"] = [HOSTILE]
    place = ["--namespace", NAMESPACE, "--subresource=status", "--type=merge"]
    served.kubectl("patch", "finetunejob", "hostile", *place, "--patch", json.dumps({"status": status}))
    for arguments in (
        ["list", "hostile", "-o", "wide"],
        ["list", "hostile", "-o", "json"],
        ["list", "hostile", "-o", "yaml"],
        ["describe", "hostile"],
        ["describe", "hostile", "-o", "json"],
        ["describe", "hostile", "-o", "yaml"],
        ["watch", "hostile"],
        ["watch", "hostile", "watched-none"],
        ["suspend", "hostile"],
    ):
        found = finetune(*arguments)
        assert CONTROL.findall(found.out + found.err) == []
    assert "before" in finetune("describe", "hostile").out

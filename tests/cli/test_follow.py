"""`JobClient.follow`, which `finetune watch` uses, follows a job on a real API server. It yields the job at the start
and after every change, also after a restart of the API server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from queue import Queue
from typing import Any

import pytest
import yaml

from examples.demo import steps
from finetune_cli.state import state
from finetune_core.api.job import FineTuneJob
from finetune_core.errors import UserError
from tests.cli.stored import stored
from tests.cluster import Cluster

pytestmark = pytest.mark.cluster
NAMESPACE = "watched"
WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Iterator[Cluster]:
    """The test cluster with the CRD. No operator runs, so only the tests change the jobs."""
    crd = steps.REPOSITORY / "crds" / "finetune.dev_finetunejobs.yaml"
    name = yaml.safe_load(crd.read_text())["metadata"]["name"]
    cluster.kubectl("apply", "--server-side", "--filename", str(crd))
    cluster.kubectl("wait", "--for=condition=Established", "crd", name, "--timeout=30s")
    steps.make_namespace(cluster, NAMESPACE)
    yield cluster
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture
def name(served: Cluster, request: pytest.FixtureRequest) -> str:
    """The name of a new job. The job is in the cluster and has no status yet."""
    manifest = steps.manifest_of(
        steps.QUICKSTARTS["LoRA"], metadata__name=f"job-{abs(hash(request.node.name)) % 10**6}"
    )
    steps.apply(served, manifest, NAMESPACE)
    return str(manifest["metadata"]["name"])


def write_status(cluster: Cluster, name: str, stored_status: str) -> None:
    """Give the job in the cluster the status in `jobs/<stored_status>.yaml`, as the operator would."""
    patch = json.dumps({"status": stored(stored_status)["status"]})
    place = ["--namespace", NAMESPACE, "--subresource=status", "--type=merge"]
    cluster.kubectl("patch", "finetunejob", name, *place, "--patch", patch)


class Follower:
    """Follows a job in a thread. `next` returns the states of the job one by one. `told` contains the sentences that
    `finetune watch` would have shown to the user."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.seen: Queue[Any] = Queue()
        self.told: list[str] = []
        self._thread = threading.Thread(target=self._follow, args=(cluster, name), daemon=True)
        self._thread.start()

    def _follow(self, cluster: Cluster, name: str) -> None:
        try:
            with steps.jobs_in(cluster, NAMESPACE) as jobs:
                for job in jobs.follow(name, self.told.append, give_up_after=WAIT_SECONDS):
                    self.seen.put(job)
        except (UserError, TimeoutError) as error:
            self.seen.put(error)

    def next(self) -> Any:
        """Wait for the next state of the job and return it. If following has ended with an error, return the error."""
        return self.seen.get(timeout=WAIT_SECONDS)


def test_each_change_is_seen(served: Cluster, name: str) -> None:
    follower = Follower(served, name)
    assert state(follower.next()) == "Pending"
    for status, word in (("unschedulable", "Starting"), ("running", "Running"), ("succeeded", "Completed")):
        write_status(served, name, status)
        assert state(follower.next()) == word


def test_a_restart_of_the_api_server_is_survived(served: Cluster, name: str) -> None:
    follower = Follower(served, name)
    follower.next()
    served.components["api-server"].restart()
    write_status(served, name, "running")
    assert state(follower.next()) == "Running"
    write_status(served, name, "succeeded")
    assert state(follower.next()) == "Completed"


def test_a_deleted_job_ends_it_with_a_sentence(served: Cluster, name: str) -> None:
    follower = Follower(served, name)
    assert isinstance(follower.next(), FineTuneJob)
    steps.delete_job(served, NAMESPACE, name)
    assert str(follower.next()) == f"FineTuneJob {NAMESPACE}/{name}: was deleted"


def test_what_does_not_exist_is_named(served: Cluster) -> None:
    with steps.jobs_in(served, NAMESPACE) as jobs:
        with pytest.raises(UserError, match=f"FineTuneJob {NAMESPACE}/nothing: does not exist"):
            next(jobs.follow("nothing", lambda sentence: None))
        with pytest.raises(UserError, match=f"FineTuneJob {NAMESPACE}/nothing: does not exist"):
            jobs.get("nothing")
        with pytest.raises(UserError, match=f"Secret {NAMESPACE}/nothing: does not exist"):
            jobs.secret("nothing")


def test_the_secret_of_the_job_is_read(served: Cluster) -> None:
    with steps.jobs_in(served, NAMESPACE) as jobs:
        assert jobs.secret(steps.CREDENTIALS_SECRET)["AWS_ACCESS_KEY_ID"] == served.minio.access_key


def test_watching_gives_up_when_told(served: Cluster, name: str) -> None:
    with steps.jobs_in(served, NAMESPACE) as jobs, pytest.raises(TimeoutError, match="was followed for 2 s"):
        list(jobs.follow(name, lambda sentence: None, give_up_after=2))

"""Jobs are created before something that they need. The status of each job names something that is missing, and the
job runs once everything exists. In both tests Kubeflow's training-operator is installed after the jobs were created. In
the second test, a Secret, a PersistentVolumeClaim, an image and a bucket are also created later, each for one of the
jobs, and everything appears ten minutes after the jobs.

Each test needs a cluster of its own, because all other tests need Kubeflow from the start.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples.demo import steps
from finetune_operator.decide.verdict import PreflightVerdict
from tests.cluster import Cluster, images, tools, wait_for
from tests.cluster.addons import PYTORCHJOB_CRD
from tests.cluster.fixtures import started
from tests.e2e.bucket import RunFolder
from tests.e2e.jobs import MakeJob
from tests.e2e.rows import late, scripts
from tests.e2e.rows.late import FIRST_TIME_DONE
from tests.e2e.rows.observer import Manifest, Observer
from tests.e2e.rows.row import TOLERANCE, Row, condition, on_job, play, settled
from tests.e2e.rows.stage import JOB, PATIENCE_SECONDS, Stage
from tests.e2e.tiny_model import put_tiny_model_and_rows

pytestmark = [pytest.mark.cluster, pytest.mark.long]

PAUSE = 20.0
"""Seconds that the operator waits before its third try to create the PyTorchJob. Before the second try it waits 10
s."""
LONGEST_PAUSE = 300.0
"""Longest pause, in seconds, between two tries of the operator to create the PyTorchJob or to run the preflight check,
or between two image pulls of the kubelet. The pauses double and have reached this value after ten minutes."""
LONGEST_MOUNT_PAUSE = 122.0
"""Longest pause, in seconds, between two tries of the kubelet to mount a volume."""
RUN = 5.0
CHECK = 20.0
"""Seconds that the preflight check with the real trainer takes at most, as docs/performance.md promises."""
TRAINING = 60.0
"""Seconds that two pods with the real trainer need from start to end, for 8 steps of a tiny model."""
NAMED_SECONDS = 300.0
"""Seconds within which the preflight check with the real trainer must have reported a problem, including the pull of
the trainer's image."""
TEN_MINUTES = 600.0


@pytest.fixture
def bare() -> Iterator[Cluster]:
    """A new cluster for one test, with the operator, but without Kubeflow's training-operator and without the CRD
    PyTorchJob."""
    for cluster in started():
        cluster.components["training-operator"].stop()
        cluster.kubectl("delete", "crd", PYTORCHJOB_CRD)
        steps.install_operator(cluster, steps.chart_values())
        cluster.import_image(scripts.IMAGE)
        yield cluster


def install_backend(stage: Stage) -> None:
    """Install the CRD PyTorchJob, start the training-operator, and wait until both can be used."""
    (crd,) = tools.TRAINING_OPERATOR.data_files()
    stage.cluster.kubectl("create", "-f", "-", stdin=crd.read_text())

    def is_established() -> bool:
        # This function reads the conditions itself, because `kubectl wait` fails as long as the CRD has no conditions.
        conditions = stage.cluster.get("crd", PYTORCHJOB_CRD).get("status", {}).get("conditions") or []
        return any(item["type"] == "Established" and item["status"] == "True" for item in conditions)

    wait_for("the CRD to be established", is_established, 30)
    backend = stage.cluster.components["training-operator"]
    backend.start()
    backend.wait_ready()


@pytest.mark.timeout(600)
def test_the_backend_appears_later(bare: Cluster) -> None:
    def appears(stage: Stage) -> float:
        told = stage.job("the cause", lambda job: condition(job, "Accepted")["reason"] == "BackendUnavailable")
        assert "install Kubeflow's training-operator" in condition(told.object, "Accepted")["message"]
        assert condition(told.object, "Stalled")["status"] == "False"
        install_backend(stage)
        return stage.now()

    row = Row(
        name="PyTorchJob CRD that appears later",
        script=scripts.DONE,
        fault=appears,
        attempts=FIRST_TIME_DONE,
        milestones=(on_job("job ended", PAUSE + RUN, settled),),
        more_events=("BackendUnavailable",),
    )
    observer = Observer()
    with observer.watching(bare):
        stage = Stage.set(bare, observer, None, row.labels)
        measured = play(row, stage)
    print([(one.milestone.name, one.seconds, one.milestone.bound) for one in measured])
    assert all(one.seconds <= TOLERANCE * one.milestone.bound for one in measured), measured
    wait_for("the child", lambda: bare.get("pytorchjobs", "-n", stage.namespace)["items"], 10)


def after_ten_minutes(
    make: Callable[[Stage], None], *words: str, patience: float = PATIENCE_SECONDS
) -> Callable[[Stage], float]:
    """Return a function that waits until ten minutes after the job's first status and then calls ``make``, which
    creates the missing object.

    Within ``patience`` seconds the message of the condition Accepted must contain ``words``, which name the missing
    object. After the ten minutes the message must still contain these words, and no attempt may have been charged.
    """

    def named(job: Manifest) -> bool:
        accepted = condition(job, "Accepted")
        return accepted["status"] == "False" and all(word in accepted["message"] for word in words)

    def fault(stage: Stage) -> float:
        first = stage.job("the first status", lambda job: True)
        told = stage.job(f"{words}", named, patience)
        print(f"{words} named after {told.at - first.at:.1f} s")
        wait_for("ten minutes to pass", lambda: stage.now() - first.at >= TEN_MINUTES, TEN_MINUTES + 60, interval=1)
        job = stage.observer.history("job", stage.namespace, JOB)[-1].object
        assert named(job), condition(job, "Accepted")
        assert condition(job, "Stalled")["status"] == "False", job["status"]["conditions"]
        assert job["status"]["attempts"]["charged"] == 0
        make(stage)
        return stage.now()

    return fault


def bucket_row(make: Callable[[Stage], None], spec: Manifest) -> Row:
    """Return the test case of a job with ``spec`` whose bucket ``make`` creates ten minutes after the job. This job
    runs the real trainer, because the scripted trainer of the other cases would not look for the bucket."""

    def artifact_is_there(stage: Stage, job: Manifest) -> None:
        with stage.cluster.enter():
            run = RunFolder(stage.cluster, f"{uri}/{stage.namespace}/{JOB}/{job['metadata']['uid']}")
            assert len(run.verified("artifacts")) == 1

    uri = f"s3://{late.LATE_BUCKET}/runs"
    real = {"image": images.ensure(images.TRAINER), "env": []}
    changes = {"podTemplate": real, "runPolicy": {"preflight": "Run"}, "storage": spec["storage"] | {"uri": uri}}
    found = LONGEST_PAUSE + CHECK
    return Row(
        name="bucket",
        script="",
        spec={**spec, **changes},
        fault=after_ten_minutes(make, f"bucket '{late.LATE_BUCKET}' does not exist", patience=NAMED_SECONDS),
        attempts=FIRST_TIME_DONE,
        milestones=(
            on_job(
                "check passed", found, lambda job: job["status"]["preflight"].get("verdict") == PreflightVerdict.PASSED
            ),
            on_job("job ended", found + TRAINING, settled),
        ),
        more_events=("OutsideFailure", "Running", "CheckpointAvailable"),
        check=artifact_is_there,
    )


@pytest.mark.timeout(2400)
def test_what_appears_ten_minutes_after_the_job_is_found(bare: Cluster, tiny_job: MakeJob, tmp_path: Path) -> None:
    put_tiny_model_and_rows(bare, tmp_path)
    backend_serves = threading.Event()

    def backend(stage: Stage) -> None:
        install_backend(stage)
        backend_serves.set()

    def behind_the_backend(make: Callable[[Stage], None]) -> Callable[[Stage], None]:
        """Return a function that waits until the backend is installed and then calls ``make``. The backend therefore
        exists when ``make`` creates the object that a job waits for."""

        def made(stage: Stage) -> None:
            assert backend_serves.wait(120), "the backend was not installed"
            make(stage)

        return made

    def row(name: str, make: Callable[[Stage], None], words: tuple[str, ...], bound: float, **spec: Manifest) -> Row:
        return Row(
            name=name,
            script=scripts.checked(scripts.DONE),
            spec=spec,
            fault=after_ten_minutes(make, *words),
            attempts=FIRST_TIME_DONE,
            milestones=(on_job("job ended", bound + RUN, settled),),
            more_events=("BackendUnavailable" if make is backend else "OutsideFailure",),
            # The test case with the PersistentVolumeClaim may have one more event: as soon as the claim exists, the
            # message changes and says that the claim is not bound yet.
            repeated_event="OutsideFailure" if "model" in spec else None,
        )

    check = {"preflight": "Run"}
    short = {"spec__training__maxSteps": 8, "spec__storage__checkpoint": {"everySteps": 4}}
    secret = {"credentialsSecretRef": {"name": late.LATE_SECRET}}
    claim = {"volume": {"claimName": late.LATE_CLAIM, "path": "model"}}
    rows = [
        row("PyTorchJob CRD", backend, ("install Kubeflow's training-operator",), LONGEST_PAUSE),
        row(
            "Secret",
            behind_the_backend(late.make_secret),
            (late.LATE_SECRET, "not found"),
            LONGEST_MOUNT_PAUSE,
            runPolicy=check,
            storage=secret,
        ),
        row(
            "claim",
            behind_the_backend(late.make_claim),
            (late.LATE_CLAIM, "not found"),
            late.SCHEDULER_PAUSE,
            runPolicy=check,
            model=claim,
        ),
        row(
            "image",
            behind_the_backend(late.make_image),
            ("can't be pulled", late.LATE_IMAGE),
            LONGEST_PAUSE,
            runPolicy=check,
            podTemplate={"image": late.LATE_IMAGE},
        ),
        bucket_row(behind_the_backend(late.make_bucket), tiny_job(JOB, **short)["spec"]),
    ]
    observer = Observer()
    with observer.watching(bare), ThreadPoolExecutor(len(rows)) as together:
        stages = [Stage.set(bare, observer, None, row.labels) for row in rows]
        playing = [together.submit(play, row, stage) for row, stage in zip(rows, stages, strict=True)]
        times = {row.name: played.result() for row, played in zip(rows, playing, strict=True)}
    for name, measured in times.items():
        for one in measured:
            seconds = f"{one.seconds:.1f} s after it appeared (designed {one.milestone.bound:g})"
            print(f"{name}, ten minutes late: {one.milestone.name} {seconds}, load {os.getloadavg()[0]:.0f}")
    late_ones = {name: measured for name, measured in times.items() if any(one.late for one in measured)}
    assert not late_ones

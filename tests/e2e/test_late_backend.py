"""A cluster without Kubeflow: the operator starts, the job says what is missing, and runs once it is installed. On a
cluster of its own, because every other test needs the backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from examples.demo import steps
from tests.cluster import Cluster, tools, wait_for
from tests.cluster.addons import PYTORCHJOB_CRD
from tests.cluster.fixtures import started
from tests.e2e.rows import scripts
from tests.e2e.rows.late import FIRST_TIME_DONE
from tests.e2e.rows.observer import Observer
from tests.e2e.rows.row import TOLERANCE, Row, condition, on_job, play, settled
from tests.e2e.rows.stage import Stage

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]

PAUSE = 20.0
"""The operator's pause before its third try; the first two come 10 s apart."""
RUN = 5.0


@pytest.fixture
def bare() -> Iterator[Cluster]:
    """A cluster in which the operator was installed before Kubeflow was."""
    for cluster in started():
        cluster.components["training-operator"].stop()
        cluster.kubectl("delete", "crd", PYTORCHJOB_CRD)
        steps.install_operator(cluster, steps.chart_values())
        cluster.import_image(scripts.IMAGE)
        yield cluster


def test_the_backend_appears_later(bare: Cluster) -> None:
    def install_backend(stage: Stage) -> float:
        told = stage.job("the cause", lambda job: condition(job, "Accepted")["reason"] == "BackendUnavailable")
        assert "install Kubeflow's training-operator" in condition(told.object, "Accepted")["message"]
        assert condition(told.object, "Stalled")["status"] == "False"
        stage.cluster.kubectl("create", "-f", "-", stdin=tools.TRAINING_OPERATOR.data_file().read_text())
        stage.cluster.kubectl("wait", "--for=condition=Established", f"crd/{PYTORCHJOB_CRD}", "--timeout=30s")
        backend = stage.cluster.components["training-operator"]
        backend.start()
        backend.wait_ready()
        return stage.now()

    row = Row(
        name="PyTorchJob CRD that appears later",
        script=scripts.DONE,
        fault=install_backend,
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

"""Test on a real cluster: an unmodified Trainer of transformers sends reports as the pod of a FineTuneJob, crashes,
resumes and ends.

The Trainer adds KubeflowCallback by itself. The operator and the callback's HTTPS client are real.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_core.contract.stock_reports import CA_VARIABLE, SERVER_URL_VARIABLE, TOKEN_VARIABLE
from tests.cluster import wait_for
from tests.cluster.until_term import RUNS
from tests.operator.builders import REPOSITORY
from tests.operator.conftest import Installed, condition, small_job
from tests.operator.stock_trainer import SAVED_EVERY, STEPS
from tests.operator.test_on_cluster import pods_run, running

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(500)]

CRASH_AT = 40


def variables_of_the_pod(installed: Installed, namespace: str, pod: str, folder: Path) -> dict[str, str]:
    """Return the environment variables of ``pod`` whose names begin with KUBEFLOW_TRAINER_. Two of them name files.
    These files are copied into ``folder``, and the two variables are returned with the paths of the copies."""
    kubectl = installed.cluster.kubectl
    lines = kubectl("exec", pod, "-n", namespace, "--", "env").splitlines()
    found = dict(line.split("=", 1) for line in lines if line.startswith("KUBEFLOW_TRAINER_"))
    assert set(found) == {SERVER_URL_VARIABLE, CA_VARIABLE, TOKEN_VARIABLE}
    for variable in (CA_VARIABLE, TOKEN_VARIABLE):
        copy = folder / variable
        copy.write_text(kubectl("exec", pod, "-n", namespace, "--", "cat", found[variable]))
        found[variable] = str(copy)
    return found


def progress(job: dict[str, Any]) -> dict[str, Any]:
    return dict(job["status"].get("progress") or {})


def test_a_stock_trainer_reports_crashes_resumes_and_ends(
    installed: Installed, namespace: str, stand_in: Callable[[str], str], tmp_path: Path
) -> None:
    installed.apply(small_job(stand_in(RUNS)), namespace)
    job = installed.wait(namespace, "both pods", running, 90)
    wait_for("both pods to run", lambda: pods_run(installed, namespace), 60)
    pod = job["status"]["attempts"]["current"]["pods"][0]["name"]
    environment = variables_of_the_pod(installed, namespace, pod, tmp_path)
    out = tmp_path / "out"

    def start(*arguments: str) -> subprocess.Popen[Any]:
        command = [sys.executable, "-m", "tests.operator.stock_trainer", str(out), *arguments]
        log = (tmp_path / "trainer.log").open("ab")
        variables = {**os.environ, **environment}
        # The trainer enters only the network namespace of the cluster, and keeps the test machine's file system.
        enter = ["nsenter", f"--target={installed.cluster.namespaces.pid}", "--net", "--"]
        return subprocess.Popen([*enter, *command], cwd=REPOSITORY, env=variables, stdout=log, stderr=log)

    first = start(str(CRASH_AT))
    wait_for("the crash", lambda: first.poll() is not None, 180, evidence=(tmp_path / "trainer.log").read_text)
    assert first.returncode == 9, (tmp_path / "trainer.log").read_text()
    job = installed.wait(namespace, "the progress of the first run", lambda job: progress(job).get("step"), 30)
    before = progress(job)
    assert (before["totalSteps"], condition(job, "Running")["status"]) == (STEPS, "True")
    assert 0 < before["step"] <= CRASH_AT

    second, seen = start(), []

    def ended() -> bool:
        seen.append(progress(installed.job(namespace)))
        return second.poll() is not None

    wait_for("the resumed run", ended, 180, evidence=(tmp_path / "trainer.log").read_text, interval=0.5)
    assert second.returncode == 0, (tmp_path / "trainer.log").read_text()
    done = installed.wait(namespace, "100 %", lambda job: progress(job)["percentage"] == 100, 30)
    resumed_from = CRASH_AT // SAVED_EVERY * SAVED_EVERY
    # After a resume the client first reports 0 %. The step in the status must still not fall below the lower of two
    # steps: the step that the status showed after the crash, and that of the checkpoint from which the run resumed.
    assert min(item["step"] for item in seen) >= min(before["step"], resumed_from)
    assert progress(done)["etaSeconds"] == 0
    values = {metric["name"]: float(metric["value"]) for metric in done["status"]["metrics"]}
    assert {"loss", "gradientNorm", "learningRate"} <= values.keys()
    steps = [point["step"] for point in done["status"]["history"]]
    assert steps == sorted(set(steps))
    assert len(steps) >= 2

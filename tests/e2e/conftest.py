"""Fixtures of the end-to-end tests: one cluster, in which the operator runs from its own image and chart, and whose
MinIO holds a model and rows of data. Each test has a namespace of its own, with the Pod Security Standard
`restricted`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.demo import steps
from tests.cluster import Cluster
from tests.cluster.fixtures import cluster  # noqa: F401  (the fixture)
from tests.e2e.jobs import MakeJob, Manifest
from tests.e2e.tiny_model import TINY_MODEL, put_tiny_model_and_rows


@pytest.fixture(scope="session")
def operated(cluster: Cluster) -> Cluster:  # noqa: F811
    """The session's cluster, with the operator installed."""
    steps.install_operator(cluster, steps.chart_values())
    cluster.learn_new_kinds()
    return cluster


@pytest.fixture(scope="session")
def installed(operated: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The session's cluster, with the operator installed, and with a tiny model and rows about hiking trails, for
    training and validation, in MinIO."""
    put_tiny_model_and_rows(operated, tmp_path_factory.mktemp("tiny"))
    return operated


@pytest.fixture
def namespace(installed: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a new namespace. It is deleted after the test."""
    name = f"test-{secrets.token_hex(4)}"
    steps.make_namespace(installed, name)
    yield name
    installed.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def tiny_job() -> MakeJob:
    """Return a function that makes the manifest of a job from examples/quickstart.yaml. The job uses the tiny model,
    and has so few steps that training takes only seconds."""

    def make(name: str, **changes: Any) -> Manifest:
        defaults: dict[str, Any] = {
            "metadata__name": name,
            "spec__model": {"s3": {"uri": TINY_MODEL}},
            "spec__dataset__maxLength": 256,
            "spec__training__maxSteps": 60,
            "spec__training__globalBatchSize": 8,
            "spec__resources__memory": "3Gi",
            "spec__resources__cpu": "400m",
            # The pods share the two cores of the node with the programs of the cluster.
            "spec__resources__limitCpu": True,
            "spec__storage__checkpoint": {"everySteps": 20},
        }
        return steps.manifest_of(Path("examples/quickstart.yaml"), **{**defaults, **changes})

    return make

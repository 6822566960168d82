"""Fixtures of the trainer's tests: a real object store that holds the tiny model and its data, and launcher processes,
each in place of a pod."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import tiny
from tests.trainer.objectstore import ObjectStore, minio_binary, running_store
from tests.trainer.pods import Attempt, fill_bucket, start_pods

StartPods = Callable[..., Attempt]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the marker `gang` to all tests with the fixture `pods`. The other tests that start processes of a training
    carry the marker `gang` or `long` in their own files. pytest calls this hook first, before it chooses the tests by
    their markers."""
    for item in items:
        if "pods" in getattr(item, "fixturenames", ()):
            item.add_marker("gang")


@pytest.fixture(scope="session")
def minio() -> Path:
    """The path of the MinIO binary, for tests that start MinIO servers of their own."""
    binary = minio_binary()
    if binary is None:
        # Without MinIO there is no object store to test against. `make test` builds MinIO before it runs the tests.
        pytest.skip("no MinIO program: set FINETUNE_MINIO, or build the cluster's tools")
    return binary


@pytest.fixture(scope="session")
def empty_store(minio: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with running_store(minio, tmp_path_factory.mktemp("minio")) as store:
        yield store


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def store(empty_store: ObjectStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    fill_bucket(empty_store, tiny_model, tmp_path_factory.mktemp("data"))
    return empty_store


@pytest.fixture
def pods(tmp_path: Path, store: ObjectStore) -> Iterator[StartPods]:
    """A function that starts the pods of an attempt, each as a launcher process.

    All processes that still run at the end of the test are killed.
    """
    started: list[Attempt] = []

    def start(
        config: dict[str, Any],
        *,
        attempt: int = 1,
        credentials: Path | None = None,
        folder: Path | None = None,
        **options: Any,
    ) -> Attempt:
        folder = folder or tmp_path / f"attempt-{len(started)}"
        begun = start_pods(config, folder, credentials=credentials or store.credentials, attempt=attempt, **options)
        started.append(begun)
        return begun

    yield start
    for attempt_ in started:
        attempt_.end()

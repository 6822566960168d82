"""Fixtures of tests/cli: an object store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.trainer.objectstore import ObjectStore, minio_binary, running_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A running MinIO server with an empty bucket, for all tests of the session."""
    binary = minio_binary()
    if binary is None:
        # The tests are skipped, because they need an object store to read from. `make test` builds MinIO first, so it
        # skips none.
        pytest.skip("no MinIO program: set FINETUNE_MINIO, or build the cluster's tools")
    with running_store(binary, tmp_path_factory.mktemp("minio")) as running:
        yield running

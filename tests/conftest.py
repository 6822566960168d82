"""Fixtures for every test: the session's one cluster."""

from tests.cluster.fixtures import cluster

__all__ = ["cluster"]

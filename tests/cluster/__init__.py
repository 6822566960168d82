"""A real Kubernetes cluster on one machine, without a container engine, for tests that need a cluster.

``Cluster.start()`` starts a cluster from Python, and ``python -m tests.cluster up`` starts one from the command line.
The module `fixtures.py` provides a cluster to pytest. README.md explains how such a cluster works.
"""

from tests.cluster.cluster import Cluster, ObjectStore, unusable_because
from tests.cluster.waiting import ClusterError, wait_for

__all__ = ["Cluster", "ClusterError", "ObjectStore", "unusable_because", "wait_for"]

"""A real Kubernetes cluster on one machine, without a container engine, for the end-to-end tests.

``Cluster.start()`` starts a cluster from Python and ``python -m tests.cluster`` starts one from the command line. The
module `fixtures.py` gives a cluster to pytest, and README.md explains how a cluster works.
"""

from tests.cluster.cluster import Cluster, ObjectStore, unusable_because
from tests.cluster.waiting import ClusterError, wait_for

__all__ = ["Cluster", "ClusterError", "ObjectStore", "unusable_because", "wait_for"]

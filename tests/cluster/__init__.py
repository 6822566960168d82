"""A real Kubernetes cluster on one machine, without a container engine.

``Cluster.start()`` starts it, ``python -m tests.cluster`` does the same on the command line, ``fixtures`` hands one
to pytest; README.md tells how it works.
"""

from tests.cluster.cluster import Cluster, ObjectStore, unusable_because
from tests.cluster.waiting import ClusterError, wait_for

__all__ = ["Cluster", "ClusterError", "ObjectStore", "unusable_because", "wait_for"]

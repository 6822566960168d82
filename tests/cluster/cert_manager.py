"""Run cert-manager in a test cluster. Its CRDs are installed in the cluster. Its controllers run in one program outside
of pods, and this program is built on first use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster import tools
from tests.cluster.cluster import Cluster
from tests.cluster.component import Component

ESTABLISHED = ("wait", "crd", "--for=condition=Established", "--timeout=30s")


@contextmanager
def cert_manager(cluster: Cluster, namespace: str) -> Iterator[Component]:
    """Install cert-manager and run it during the block. Afterwards remove its CRDs, and with them all objects of these
    kinds.

    ``namespace`` is where a ClusterIssuer looks for the Secret with its signing key.
    """
    tools.build_missing((tools.CERT_MANAGER,))
    definitions = [f"--filename={file}" for file in tools.CERT_MANAGER.data_files()]
    # Client-side apply can't be used here. It stores the whole object in an annotation, and the CRDs of the issuers are
    # too large for an annotation.
    cluster.kubectl("apply", "--server-side", *definitions)
    names = cluster.kubectl("get", *definitions, "--output=jsonpath={.items[*].metadata.name}").split()
    # The controllers are started only after the API server serves the CRDs. A controller that starts before its CRD is
    # served waits several seconds before its next try.
    cluster.kubectl(*ESTABLISHED, *names)
    program = Component(
        "cert-manager",
        [
            tools.CERT_MANAGER.path(),
            f"--kubeconfig={cluster.kubeconfig}",
            f"--cluster-resource-namespace={namespace}",
        ],
        # The component counts as ready at once, because cert-manager's controllers have no endpoint for readiness.
        # Tests wait for the status of an Issuer instead, which shows that the controllers work.
        lambda: True,
        cluster.namespaces,
        cluster.layout.logs / "cert-manager.log",
        {"PATH": os.defpath, "HOME": str(cluster.layout.temporary), "NO_PROXY": "*"},
    )
    program.start()
    try:
        yield program
    finally:
        program.stop(signal.SIGTERM)
        cluster.kubectl("delete", "crd", *names, timeout=120)

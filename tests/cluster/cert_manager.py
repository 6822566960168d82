"""cert-manager in a cluster: its kinds, and its control loops as a program beside it, which is built on first use."""

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
    """Install it, run it in the block, and remove it with all that was made of its kinds.

    ``namespace`` has the Secrets that its ClusterIssuers sign with.
    """
    tools.build_missing((tools.CERT_MANAGER,))
    definitions = [f"--filename={file}" for file in tools.CERT_MANAGER.data_files()]
    # By the server: an issuer's schema is longer than the annotation in which kubectl would keep what it applied.
    cluster.kubectl("apply", "--server-side", *definitions)
    names = cluster.kubectl("get", *definitions, "--output=jsonpath={.items[*].metadata.name}").split()
    # A control loop whose kind is not served yet looks for it again only seconds later.
    cluster.kubectl(*ESTABLISHED, *names)
    program = Component(
        "cert-manager",
        [
            tools.CERT_MANAGER.path(),
            f"--kubeconfig={cluster.kubeconfig}",
            f"--cluster-resource-namespace={namespace}",
        ],
        # It serves nothing; that it works shows in what becomes of an Issuer.
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

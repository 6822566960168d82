"""Run cert-manager in a test cluster: its CRDs are installed, and its controllers run as a program beside the cluster.
The program is built on first use."""

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
    """Install cert-manager, run it during the block, and remove its CRDs afterwards, which also removes all objects of
    these kinds.

    ``namespace`` holds the Secrets with which ClusterIssuers sign.
    """
    tools.build_missing((tools.CERT_MANAGER,))
    definitions = [f"--filename={file}" for file in tools.CERT_MANAGER.data_files()]
    # Server-side apply is needed because the schema of an issuer is larger than the annotation in which client-side
    # apply stores the object.
    cluster.kubectl("apply", "--server-side", *definitions)
    names = cluster.kubectl("get", *definitions, "--output=jsonpath={.items[*].metadata.name}").split()
    # The controllers start after their CRDs are served, because a controller whose kind is missing tries again only
    # seconds later.
    cluster.kubectl(*ESTABLISHED, *names)
    program = Component(
        "cert-manager",
        [
            tools.CERT_MANAGER.path(),
            f"--kubeconfig={cluster.kubeconfig}",
            f"--cluster-resource-namespace={namespace}",
        ],
        # cert-manager's controllers have no endpoint that says that they are ready, so the component counts as ready at
        # once. Tests see it work by the status of an Issuer.
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

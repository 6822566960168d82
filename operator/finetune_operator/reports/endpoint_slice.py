"""Tells the training pods where the leader is: the EndpointSlice of the report Service, which has no selector.

All healthy replicas are Ready, but one takes reports: Kubernetes can't choose it by readiness, so the leader writes
its own address after it got the Lease. The slice belongs to the leader's pod and goes with it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from dataclasses import dataclass
from typing import Final

import aiohttp

from finetune_operator.kube.client import ApiError, KubeClient, Manifest
from finetune_operator.objects.labels import MANAGER

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 30.0
"""A slice that somebody changed or deleted is put right after this time."""
RETRY_SECONDS: Final = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportEndpoint:
    """The leader's pod, as the report Service names it."""

    namespace: str
    service: str
    address: str
    """IP address of the pod."""
    port: int
    pod_name: str
    pod_uid: str

    @property
    def slice_name(self) -> str:
        """Name of the one slice, whoever leads."""
        return f"{self.service}-leader"


def slice_manifest(endpoint: ReportEndpoint) -> Manifest:
    """Return the EndpointSlice that leads to ``endpoint`` and goes with its pod."""
    version = ipaddress.ip_address(endpoint.address).version
    pod = {"kind": "Pod", "namespace": endpoint.namespace, "name": endpoint.pod_name, "uid": endpoint.pod_uid}
    owner = {"apiVersion": "v1", "kind": "Pod", "name": endpoint.pod_name, "uid": endpoint.pod_uid}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": endpoint.slice_name,
            "namespace": endpoint.namespace,
            "labels": {
                "kubernetes.io/service-name": endpoint.service,
                "endpointslice.kubernetes.io/managed-by": MANAGER,
            },
            "ownerReferences": [owner],
        },
        "addressType": f"IPv{version}",
        "endpoints": [{"addresses": [endpoint.address], "conditions": {"ready": True}, "targetRef": pod}],
        "ports": [{"name": "reports", "port": endpoint.port, "protocol": "TCP"}],
    }


def leads_to(stored: Manifest, wanted: Manifest) -> bool:
    """Whether a stored slice says what ``wanted`` says."""
    metadata = stored["metadata"]
    return (
        all(stored.get(name) == wanted[name] for name in ("addressType", "endpoints", "ports"))
        and wanted["metadata"]["labels"].items() <= metadata.get("labels", {}).items()
        and metadata.get("ownerReferences") == wanted["metadata"]["ownerReferences"]
    )


class EndpointSlicePublisher:
    """Keeps the slice true while this process leads."""

    def __init__(self, cluster: KubeClient, endpoint: ReportEndpoint) -> None:
        """Announce ``endpoint``."""
        self._cluster = cluster
        self._wanted = slice_manifest(endpoint)

    async def keep(self) -> None:
        """Write the slice now and look after it, for ever; the API server may be away for a while."""
        while True:
            try:
                await self.announce()
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                logger.warning("the EndpointSlice could not be written: %s", str(error) or type(error).__name__)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await asyncio.sleep(LOOK_SECONDS)

    async def announce(self) -> None:
        """Create or replace the slice where it leads elsewhere; raises ApiError where somebody was faster."""
        metadata = self._wanted["metadata"]
        stored = await self._cluster.get_endpoint_slice(metadata["namespace"], metadata["name"])
        if stored is None:
            await self._cluster.create_endpoint_slice(self._wanted)
        elif leads_to(stored, self._wanted):
            return
        else:
            guard = {"resourceVersion": stored["metadata"]["resourceVersion"]}
            await self._cluster.update_endpoint_slice({**self._wanted, "metadata": metadata | guard})
        logger.info("reports are led to %s", self._wanted["endpoints"][0]["addresses"][0])

"""Publishes the leader's address in the EndpointSlice of the report Service.

The report Service has no selector: all healthy replicas are Ready, but only the leader takes reports, so readiness
can't choose the endpoint. The leader writes its own pod address after it has acquired the Lease. The leader's pod owns
the slice, so that the slice is deleted with the pod. `application.py` runs `publish_forever` while the process leads.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from dataclasses import dataclass
from typing import Final

from finetune_operator.kube.api_errors import REQUEST_ERRORS, describe_error
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.manifest import Manifest
from finetune_operator.kube.resources import ENDPOINT_SLICES
from finetune_operator.objects.labels import MANAGER

logger = logging.getLogger(__name__)

RECHECK_SECONDS: Final = 30.0
"""Seconds between two reads of the slice. A slice that somebody changed or deleted is then written anew."""
RETRY_SECONDS: Final = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportEndpoint:
    """The report Service, and the leader's pod to which it must lead."""

    namespace: str
    service: str
    address: str
    """IP address of the pod, IPv4 or IPv6."""
    port: int
    pod_name: str
    pod_uid: str

    @property
    def slice_name(self) -> str:
        """Name of the EndpointSlice, which is the same for every leader."""
        return f"{self.service}-leader"


def build_endpoint_slice(endpoint: ReportEndpoint) -> Manifest:
    """Return the manifest of the EndpointSlice that leads to ``endpoint`` and is owned by the pod of ``endpoint``."""
    version = ipaddress.ip_address(endpoint.address).version
    pod = {"kind": "Pod", "namespace": endpoint.namespace, "name": endpoint.pod_name, "uid": endpoint.pod_uid}
    owner = {"apiVersion": "v1", "kind": "Pod", "name": endpoint.pod_name, "uid": endpoint.pod_uid}
    return {
        "apiVersion": ENDPOINT_SLICES.api_version,
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


def is_up_to_date(stored: Manifest, wanted: Manifest) -> bool:
    """Return whether the ``stored`` slice has the endpoints, ports, labels and owner of ``wanted``."""
    metadata = stored["metadata"]
    return (
        all(stored.get(name) == wanted[name] for name in ("addressType", "endpoints", "ports"))
        and wanted["metadata"]["labels"].items() <= metadata.get("labels", {}).items()
        and metadata.get("ownerReferences") == wanted["metadata"]["ownerReferences"]
    )


class EndpointSlicePublisher:
    """Keeps the EndpointSlice pointing at this process's pod while the process leads."""

    def __init__(self, client: KubeClient, endpoint: ReportEndpoint) -> None:
        """Prepare to publish ``endpoint``. Nothing is written yet."""
        self._client = client
        self._wanted = build_endpoint_slice(endpoint)

    async def publish_forever(self) -> None:
        """Publish the slice now, and check it every 30 s. A failed request is retried after 2 s. Never returns."""
        while True:
            try:
                await self.publish()
            except REQUEST_ERRORS as error:
                logger.warning("the EndpointSlice could not be written: %s", describe_error(error))
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await asyncio.sleep(RECHECK_SECONDS)

    async def publish(self) -> None:
        """Create the slice where it does not exist; replace it where it is not up to date.

        Raises ApiError (409) where somebody else wrote the slice between this method's read and write.
        """
        metadata = self._wanted["metadata"]
        stored = await self._client.get_endpoint_slice(metadata["namespace"], metadata["name"])
        if stored is None:
            await self._client.create_endpoint_slice(self._wanted)
        elif is_up_to_date(stored, self._wanted):
            return
        else:
            guard = {"resourceVersion": stored["metadata"]["resourceVersion"]}
            await self._client.update_endpoint_slice({**self._wanted, "metadata": metadata | guard})
        logger.info("reports are led to %s", self._wanted["endpoints"][0]["addresses"][0])

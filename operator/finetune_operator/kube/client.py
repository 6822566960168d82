"""The operator's client of the API server: `KubeClient` has one method for each kind of request, except kopf's watches
and the requests about the Lease.

Objects are dictionaries as the API server sends them; `objects/observations.py` parses them. Each request has a
time-out and names its entry in the permission table (`rbac.py`). A method raises `ApiError` for an answer that is not
a success, unless its docstring says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from finetune_core.api import API_VERSION, KIND
from finetune_operator.kube.api_errors import ApiError, error_of, json_object
from finetune_operator.kube.fencing import fenced_client
from finetune_operator.kube.manifest import Manifest
from finetune_operator.kube.rbac import Permission
from finetune_operator.kube.resources import OPERATOR_NAME, TOKEN_REVIEWS
from finetune_operator.kube.retry_after import LoadLimit, pause_seconds
from finetune_operator.queue.key import Key

FIELD_MANAGER: Final = OPERATOR_NAME
REQUEST_SECONDS: Final = 15.0
CONNECTIONS: Final = 16
"""Largest number of requests at the same time, so that a restart with many jobs does not flood the API server."""
TRIES_IF_OVERLOADED: Final = 4
"""Largest number of times that one request is sent while the API server answers it with 429 (too many requests)."""
LIST_CHUNK: Final = 500
METADATA_ONLY: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""Accept header that asks for a list with metadata only. A list of thousands of jobs with spec and status would have
tens of megabytes."""
METHODS: Final = {"get": "GET", "list": "GET", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE"}
"""HTTP method of each RBAC verb that the client uses."""


async def load_configuration(kubeconfig: Path | None) -> Any:
    """Return the client configuration from the file ``kubeconfig``. None means the pod's service account."""
    configuration = kubernetes_client.Configuration()
    if kubeconfig is None:
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    else:
        await kubernetes_config.load_kube_config(
            config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
        )
    configuration.connection_pool_maxsize = CONNECTIONS
    return configuration


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedJob:
    """What a list of FineTuneJobs contains about each job: its key and its version, without spec and status."""

    key: Key
    resource_version: str


class KubeClient:
    """Client of the API server with one method for each kind of request (`rbac.py` lists the permissions)."""

    def __init__(self, configuration: Any, fence: Callable[[], None]) -> None:
        """Keep ``configuration``, which `load_configuration` returned; no connection is opened yet.

        The function ``fence`` is called right before every write, and must end the process if this process is no longer
        the leader.
        """
        self._client = fenced_client(configuration, fence)
        self._limit = LoadLimit(time.monotonic)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def get_job(self, key: Key) -> Manifest | None:
        """Return the FineTuneJob, or None where it does not exist."""
        return await self._get_or_none(Permission.GET_JOB, key.namespace, key.name)

    async def list_jobs(self, namespace: str | None) -> AsyncIterator[ListedJob]:
        """Yield all FineTuneJobs in ``namespace``; None means all namespaces. The list is read page by page."""
        token = ""
        while True:
            query = {"limit": str(LIST_CHUNK)} | ({"continue": token} if token else {})
            page = await self._request(Permission.LIST_JOBS, namespace, query=query, accept=METADATA_ONLY)
            # `items` of an empty PartialObjectMetadataList is null, not [].
            for item in page["items"] or ():
                metadata = item["metadata"]
                if key := Key.parse(metadata["namespace"], metadata["name"]):
                    yield ListedJob(key=key, resource_version=metadata["resourceVersion"])
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def apply_status(self, key: Key, resource_version: str, status: Manifest) -> str:
        """Replace the status of the job ``key`` by ``status``, and return the resourceVersion that the job has then.

        The status is written by server-side apply. The resourceVersion stays the same where ``status`` equals the
        stored status. Raises ApiError (409) where the job's resourceVersion is no longer ``resource_version``.

        The API server can't apply anything to an object of which a stored field has another type than in the CRD. Such
        a field may come from the time of another version of the CRD. The status is then replaced by a JSON patch, which
        does not keep the conditions of other field managers.
        """
        try:
            return await self._apply_status(key, resource_version, status)
        except ApiError as error:
            if not error.is_of_another_schema:
                raise
        operations: list[Manifest] = [
            {"op": "replace", "path": "/metadata/resourceVersion", "value": resource_version},
            {"op": "add", "path": "/status", "value": status},
        ]
        job = await self._request(
            Permission.APPLY_STATUS,
            key.namespace,
            key.name,
            body=operations,
            query={"fieldManager": FIELD_MANAGER},
            content_type="application/json-patch+json",
        )
        return str(job["metadata"]["resourceVersion"])

    async def _apply_status(self, key: Key, resource_version: str, status: Manifest) -> str:
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": key.name, "namespace": key.namespace, "resourceVersion": resource_version},
            "status": status,
        }
        job = await self._request(
            Permission.APPLY_STATUS,
            key.namespace,
            key.name,
            body=body,
            query={"fieldManager": FIELD_MANAGER, "force": "true"},
            content_type="application/apply-patch+yaml",
        )
        return str(job["metadata"]["resourceVersion"])

    async def get_child(self, namespace: str, name: str) -> Manifest | None:
        """Return a PyTorchJob; None where the PyTorchJob, or the CRD of PyTorchJobs, does not exist."""
        return await self._get_or_none(Permission.GET_CHILD, namespace, name)

    async def create_child(self, manifest: Manifest) -> Manifest:
        """Create a PyTorchJob and return the created object."""
        return await self._create(Permission.CREATE_CHILD, manifest)

    async def delete_child(self, namespace: str, name: str, uid: str) -> None:
        """Delete the PyTorchJob ``namespace/name`` if it has this ``uid``.

        The garbage collector deletes the pods of the PyTorchJob later. A PyTorchJob that does not exist any more is no
        error. Raises ApiError (409) where the PyTorchJob of this name has another uid.
        """
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        await self._delete(Permission.DELETE_CHILD, namespace, name, body)

    async def get_config_map(self, namespace: str, name: str) -> Manifest | None:
        """Return a ConfigMap, or None where it does not exist."""
        return await self._get_or_none(Permission.GET_CONFIG_MAP, namespace, name)

    async def create_config_map(self, manifest: Manifest) -> Manifest:
        """Create a ConfigMap and return the created object."""
        return await self._create(Permission.CREATE_CONFIG_MAP, manifest)

    async def delete_config_map(self, namespace: str, name: str, uid: str) -> None:
        """Delete the ConfigMap ``namespace/name`` if it has this ``uid``.

        A ConfigMap that does not exist any more is no error. Raises ApiError (409) where the ConfigMap of this name has
        another uid.
        """
        await self._delete(Permission.DELETE_CONFIG_MAP, namespace, name, {"preconditions": {"uid": uid}})

    async def get_network_policy(self, namespace: str, name: str) -> Manifest | None:
        """Return a NetworkPolicy, or None where it does not exist."""
        return await self._get_or_none(Permission.GET_NETWORK_POLICY, namespace, name)

    async def create_network_policy(self, manifest: Manifest) -> Manifest:
        """Create a NetworkPolicy and return the created object."""
        return await self._create(Permission.CREATE_NETWORK_POLICY, manifest)

    async def delete_network_policy(self, namespace: str, name: str, uid: str) -> None:
        """Delete the NetworkPolicy ``namespace/name`` if it has this ``uid``.

        A NetworkPolicy that does not exist any more is no error. Raises ApiError (409) where the NetworkPolicy of this
        name has another uid.
        """
        await self._delete(Permission.DELETE_NETWORK_POLICY, namespace, name, {"preconditions": {"uid": uid}})

    async def list_pods(self, namespace: str | None, selector: str) -> list[Manifest]:
        """Return the pods that match the label ``selector``, for example ``"finetune.dev/job-uid=..."``.

        ``namespace`` is None for the pods of all namespaces.
        """
        page = await self._request(Permission.LIST_PODS, namespace, query={"labelSelector": selector})
        items: list[Manifest] = page["items"]
        return items

    async def create_pod(self, manifest: Manifest) -> Manifest:
        """Create a pod and return the created object."""
        return await self._create(Permission.CREATE_POD, manifest)

    async def delete_pod(self, namespace: str, name: str, uid: str) -> bool:
        """Delete the pod ``namespace/name`` if it has this ``uid``; return False where no pod of this name exists.

        Raises ApiError (409) where the pod of this name has another uid.
        """
        return await self._delete(Permission.DELETE_POD, namespace, name, {"preconditions": {"uid": uid}})

    async def annotate_pod(self, namespace: str, name: str, uid: str, annotations: dict[str, str]) -> None:
        """Set ``annotations`` on the pod ``namespace/name`` if it has this ``uid``.

        The patch goes to the pod's `status` subresource, so that the operator needs no permission to change pod specs.
        Raises ApiError (404) where no pod of this name exists, and ApiError (409) where the pod has another uid.
        """
        await self._request(
            Permission.ANNOTATE_POD,
            namespace,
            name,
            body={"metadata": {"uid": uid, "annotations": annotations}},
            query={"fieldManager": FIELD_MANAGER},
            content_type="application/merge-patch+json",
        )

    async def list_warnings(self, namespace: str, uid: str) -> list[Manifest]:
        """Return up to 50 events of type Warning about the object with ``uid``."""
        query = {"fieldSelector": f"regarding.uid={uid},type=Warning", "limit": "50"}
        page = await self._request(Permission.LIST_EVENTS, namespace, query=query)
        items: list[Manifest] = page["items"]
        return items

    async def create_event(self, namespace: str, manifest: Manifest) -> bool:
        """Create an event; return False where an event of the same name exists already."""
        try:
            await self._request(Permission.CREATE_EVENT, namespace, body=manifest)
        except ApiError as error:
            if error.is_name_taken:
                return False
            raise
        return True

    async def review_token(self, token: str, audience: str) -> Manifest:
        """Return the `status` of a TokenReview: what the API server says about ``token`` for ``audience``."""
        body = {
            "apiVersion": TOKEN_REVIEWS.api_version,
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        answer = await self._request(Permission.REVIEW_TOKEN, None, body=body)
        status: Manifest = answer.get("status", {})
        return status

    async def get_secret(self, namespace: str, name: str) -> Manifest | None:
        """Return the operator's certificate Secret, or None where it does not exist."""
        return await self._get_or_none(Permission.GET_CERTIFICATES, namespace, name)

    async def create_secret(self, manifest: Manifest) -> Manifest:
        """Create the operator's certificate Secret and return it; raises ApiError (409) where it exists already."""
        return await self._create(Permission.CREATE_CERTIFICATES, manifest)

    async def update_secret(self, manifest: Manifest) -> Manifest:
        """Replace the operator's certificate Secret by ``manifest``, and return the new Secret.

        Raises ApiError (409) where the Secret's resourceVersion differs from the resourceVersion in ``manifest``.
        """
        return await self._update(Permission.UPDATE_CERTIFICATES, manifest)

    async def get_endpoint_slice(self, namespace: str, name: str) -> Manifest | None:
        """Return the EndpointSlice of the report Service, or None where it does not exist."""
        return await self._get_or_none(Permission.GET_ENDPOINT_SLICE, namespace, name)

    async def create_endpoint_slice(self, manifest: Manifest) -> Manifest:
        """Create the EndpointSlice of the report Service and return the created object."""
        namespace = manifest["metadata"]["namespace"]
        return await self._request(Permission.CREATE_ENDPOINT_SLICE, namespace, body=manifest)

    async def update_endpoint_slice(self, manifest: Manifest) -> Manifest:
        """Replace the EndpointSlice of the report Service by ``manifest``, and return the new EndpointSlice.

        Raises ApiError (409) where the slice's resourceVersion differs from the resourceVersion in ``manifest``.
        """
        return await self._update(Permission.UPDATE_ENDPOINT_SLICE, manifest)

    async def _create(self, permission: Permission, manifest: Manifest) -> Manifest:
        namespace = manifest["metadata"]["namespace"]
        return await self._request(permission, namespace, body=manifest, query={"fieldManager": FIELD_MANAGER})

    async def _update(self, permission: Permission, manifest: Manifest) -> Manifest:
        metadata = manifest["metadata"]
        return await self._request(permission, metadata["namespace"], metadata["name"], body=manifest)

    async def _get_or_none(self, permission: Permission, namespace: str, name: str) -> Manifest | None:
        try:
            return await self._request(permission, namespace, name)
        except ApiError as error:
            if error.is_not_found:
                return None
            raise

    async def _delete(self, permission: Permission, namespace: str, name: str, body: Manifest) -> bool:
        """Delete an object; return False where it does not exist any more.

        ``body`` holds the options of the deletion, such as a precondition on the uid.
        """
        try:
            await self._request(permission, namespace, name, body=body)
        except ApiError as error:
            # A 409 mostly means that the object is gone and a new object has its name, so that the uid precondition
            # failed. The 409 is raised nevertheless, because it can also have other causes, and the next reconcile
            # reads what exists.
            if not error.is_not_found:
                raise
            return False
        return True

    async def _request(
        self,
        permission: Permission,
        namespace: str | None,
        name: str | None = None,
        *,
        body: Manifest | list[Manifest] | None = None,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Manifest:
        """Send the request that ``permission`` names and return the JSON object in the answer.

        No request is sent while the API server asks for a pause. A request that is answered with 429 was not carried
        out, and is sent again after the pause, at most `TRIES_IF_OVERLOADED` times in all. Raises ApiError for any
        answer that is not 2xx or is no JSON object. Raises ValueError, and sends nothing, where ``namespace`` or
        ``name`` is no possible name.
        """
        rule = permission.value
        for tries_left in reversed(range(TRIES_IF_OVERLOADED)):
            await self._limit.wait()
            method, url, headers, content, _ = await self._client.param_serialize(
                METHODS[rule.verb],
                rule.resource.path(namespace, name, rule.subresource),
                query_params=list((query or {}).items()),
                header_params={"Accept": accept, "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            response = await self._client.call_api(method, url, headers, content, _request_timeout=REQUEST_SECONDS)
            answer = await response.read()
            pause = pause_seconds(response.status, response.headers, datetime.now(UTC))
            if pause is not None:
                self._limit.pause(pause)
            if response.status != HTTPStatus.TOO_MANY_REQUESTS or not tries_left:
                break
        if not 200 <= response.status < 300:
            raise error_of(response.status, answer)
        result = json_object(answer)
        if result is None:
            raise ApiError(response.status, "NotJSON", "the answer is cut off, or comes from a proxy")
        return result

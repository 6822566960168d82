"""The one client of the API server: every request of the operator but kopf's watches goes through `Cluster`.

Objects come and go as the dictionaries that the server speaks; `observed` turns them into values. Each request
has a time-out, names its entry in the permission table, and raises `ApiError` for an answer that is no success.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from finetune_core.api import API_VERSION, GROUP, KIND, PLURAL, VERSION
from finetune_operator.kube.connections import fenced_client
from finetune_operator.kube.permissions import Allowed
from finetune_operator.queue.keyqueue import Key

Manifest = dict[str, Any]

FIELD_MANAGER: Final = "finetune-operator"
REQUEST_SECONDS: Final = 15.0
CONNECTIONS: Final = 16
"""Requests in flight: a limit of our own, so that a restart with many jobs does not flood the server."""
LIST_CHUNK: Final = 500
METADATA_ONLY: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""A list without spec and status: thousands of whole jobs are tens of megabytes to make, carry and parse."""


class ApiError(Exception):
    """The API server answered with something else than success."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        """Keep the HTTP ``status``, the server's CamelCase ``reason`` and its sentence."""
        super().__init__(f"the API server answered {status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def is_refusal(self) -> bool:
        """Whether it was the object that was not taken, by a quota, a policy or a webhook: asking at once is no use."""
        webhook_down = self.status == 500 and "webhook" in self.message
        return webhook_down or (400 <= self.status < 500 and self.status not in (401, 408, 409, 429))


async def load_configuration(kubeconfig: Path | None) -> Any:
    """Return the client configuration: that of ``kubeconfig``, or of the pod's service account where it is None."""
    configuration = kubernetes_client.Configuration()
    if kubeconfig is None:
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    else:
        await kubernetes_config.load_kube_config(
            config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
        )
    configuration.connection_pool_maxsize = CONNECTIONS
    return configuration


def _error(status: int, body: bytes) -> ApiError:
    """Return the error of an answer; a Status object where the body is one."""
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    if isinstance(content, dict):
        return ApiError(status, str(content.get("reason") or ""), str(content.get("message") or ""))
    return ApiError(status, "", body.decode(errors="replace").strip()[:512])


class Cluster:
    """Requests that the operator makes, one method for each."""

    def __init__(self, configuration: Any, fence: Callable[[], None]) -> None:
        """Open no connection yet; ``configuration`` comes from `load_configuration`.

        ``fence`` is called right before every write and does not return in a process that may not write.
        """
        self._client = fenced_client(configuration, fence)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _request(
        self,
        allowed: Allowed,
        path: str,
        *,
        body: Manifest | None = None,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Manifest:
        methods = {"get": "GET", "list": "GET", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE"}
        method, url, headers, body, _ = await self._client.param_serialize(
            methods[allowed.value.verb],
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": accept, "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = await self._client.call_api(method, url, headers, body, _request_timeout=REQUEST_SECONDS)
        content = await response.read()
        if not 200 <= response.status < 300:
            raise _error(response.status, content)
        result: Manifest = json.loads(content)
        return result

    async def _get_or_none(self, allowed: Allowed, path: str) -> Manifest | None:
        try:
            return await self._request(allowed, path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def get_job(self, key: Key) -> Manifest | None:
        """Return the FineTuneJob, or None where it does not exist."""
        return await self._get_or_none(Allowed.GET_JOB, _path(GROUP, VERSION, PLURAL, key.namespace, key.name))

    async def list_job_keys(self, namespace: str | None) -> AsyncIterator[Key]:
        """Yield the keys of all FineTuneJobs of a namespace, or of the cluster, page by page."""
        token = ""
        while True:
            query = {"limit": str(LIST_CHUNK)} | ({"continue": token} if token else {})
            path = _path(GROUP, VERSION, PLURAL, namespace)
            page = await self._request(Allowed.LIST_JOBS, path, query=query, accept=METADATA_ONLY)
            # An empty list of metadata has null where a list of objects has [].
            for item in page["items"] or ():
                yield Key(item["metadata"]["namespace"], item["metadata"]["name"])
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def apply_status(self, key: Key, resource_version: str, status: Manifest) -> None:
        """Apply the whole status. ``resource_version`` is the guard: a job that changed meanwhile answers 409."""
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": key.name, "namespace": key.namespace, "resourceVersion": resource_version},
            "status": status,
        }
        await self._request(
            Allowed.APPLY_STATUS,
            _path(GROUP, VERSION, PLURAL, key.namespace, key.name) + "/status",
            body=body,
            query={"fieldManager": FIELD_MANAGER, "force": "true"},
            content_type="application/apply-patch+yaml",
        )

    async def get_child(self, namespace: str, name: str) -> Manifest | None:
        """Return a PyTorchJob; None where it, or its kind, does not exist."""
        return await self._get_or_none(Allowed.GET_CHILD, _path("kubeflow.org", "v1", "pytorchjobs", namespace, name))

    async def create_child(self, manifest: Manifest) -> Manifest:
        """Create a PyTorchJob."""
        path = _path("kubeflow.org", "v1", "pytorchjobs", manifest["metadata"]["namespace"])
        return await self._request(Allowed.CREATE_CHILD, path, body=manifest, query={"fieldManager": FIELD_MANAGER})

    async def delete_child(self, namespace: str, name: str, uid: str) -> None:
        """Delete the PyTorchJob with this uid; its pods go after it. One that is gone already is fine."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        await self._delete(Allowed.DELETE_CHILD, _path("kubeflow.org", "v1", "pytorchjobs", namespace, name), body)

    async def get_config_map(self, namespace: str, name: str) -> Manifest | None:
        """Return a ConfigMap or None."""
        return await self._get_or_none(Allowed.GET_CONFIG_MAP, _path("", "v1", "configmaps", namespace, name))

    async def create_config_map(self, manifest: Manifest) -> Manifest:
        """Create a ConfigMap."""
        path = _path("", "v1", "configmaps", manifest["metadata"]["namespace"])
        return await self._request(
            Allowed.CREATE_CONFIG_MAP, path, body=manifest, query={"fieldManager": FIELD_MANAGER}
        )

    async def delete_config_map(self, namespace: str, name: str) -> None:
        """Delete a ConfigMap; one that is gone already is fine."""
        await self._delete(Allowed.DELETE_CONFIG_MAP, _path("", "v1", "configmaps", namespace, name), {})

    async def list_pods(self, namespace: str, selector: str) -> list[Manifest]:
        """Return the pods that carry the labels of ``selector``."""
        page = await self._request(
            Allowed.LIST_PODS, _path("", "v1", "pods", namespace), query={"labelSelector": selector}
        )
        items: list[Manifest] = page["items"]
        return items

    async def create_pod(self, manifest: Manifest) -> Manifest:
        """Create a pod."""
        path = _path("", "v1", "pods", manifest["metadata"]["namespace"])
        return await self._request(Allowed.CREATE_POD, path, body=manifest, query={"fieldManager": FIELD_MANAGER})

    async def delete_pod(self, namespace: str, name: str, uid: str) -> None:
        """Delete the pod with this uid; one that is gone already is fine."""
        await self._delete(
            Allowed.DELETE_POD, _path("", "v1", "pods", namespace, name), {"preconditions": {"uid": uid}}
        )

    async def annotate_pod(self, namespace: str, name: str, uid: str, annotations: dict[str, str]) -> None:
        """Set annotations of the pod with this uid, through its status: the spec can't be changed there."""
        await self._request(
            Allowed.ANNOTATE_POD,
            _path("", "v1", "pods", namespace, name) + "/status",
            body={"metadata": {"uid": uid, "annotations": annotations}},
            query={"fieldManager": FIELD_MANAGER},
            content_type="application/merge-patch+json",
        )

    async def list_warnings(self, namespace: str, uid: str) -> list[Manifest]:
        """Return the warning events about the object with ``uid``."""
        page = await self._request(
            Allowed.LIST_EVENTS,
            _path("events.k8s.io", "v1", "events", namespace),
            query={"fieldSelector": f"regarding.uid={uid},type=Warning", "limit": "50"},
        )
        items: list[Manifest] = page["items"]
        return items

    async def create_event(self, namespace: str, manifest: Manifest) -> bool:
        """Create an event; False where one of this name exists already."""
        try:
            await self._request(Allowed.CREATE_EVENT, _path("events.k8s.io", "v1", "events", namespace), body=manifest)
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        return True

    async def review_token(self, token: str, audience: str) -> Manifest:
        """Return the TokenReview status of ``token`` for ``audience``."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        answer = await self._request(
            Allowed.REVIEW_TOKEN, _path("authentication.k8s.io", "v1", "tokenreviews"), body=body
        )
        status: Manifest = answer.get("status", {})
        return status

    async def get_secret(self, namespace: str, name: str) -> Manifest | None:
        """Return the operator's own Secret or None."""
        return await self._get_or_none(Allowed.GET_CERTIFICATES, _path("", "v1", "secrets", namespace, name))

    async def update_secret(self, manifest: Manifest) -> Manifest:
        """Replace the operator's own Secret; its resourceVersion guards against a second writer."""
        metadata = manifest["metadata"]
        path = _path("", "v1", "secrets", metadata["namespace"], metadata["name"])
        return await self._request(Allowed.UPDATE_CERTIFICATES, path, body=manifest)

    async def get_endpoint_slice(self, namespace: str, name: str) -> Manifest | None:
        """Return the EndpointSlice of the report Service or None."""
        path = _path("discovery.k8s.io", "v1", "endpointslices", namespace, name)
        return await self._get_or_none(Allowed.GET_ENDPOINTS, path)

    async def create_endpoint_slice(self, manifest: Manifest) -> Manifest:
        """Create the EndpointSlice of the report Service."""
        path = _path("discovery.k8s.io", "v1", "endpointslices", manifest["metadata"]["namespace"])
        return await self._request(Allowed.CREATE_ENDPOINTS, path, body=manifest)

    async def update_endpoint_slice(self, manifest: Manifest) -> Manifest:
        """Replace the EndpointSlice of the report Service; its resourceVersion guards against a second writer."""
        metadata = manifest["metadata"]
        path = _path("discovery.k8s.io", "v1", "endpointslices", metadata["namespace"], metadata["name"])
        return await self._request(Allowed.UPDATE_ENDPOINTS, path, body=manifest)

    async def _delete(self, allowed: Allowed, path: str, body: Manifest) -> None:
        try:
            await self._request(allowed, path, body=body)
        except ApiError as error:
            # 409: the uid precondition failed, so what we meant to delete is gone and its name was taken anew.
            if error.status not in (404, 409):
                raise


def _path(group: str, version: str, plural: str, namespace: str | None = None, name: str = "") -> str:
    root = f"/apis/{group}/{version}" if group else f"/api/{version}"
    scope = f"/namespaces/{namespace}" if namespace else ""
    return f"{root}{scope}/{plural}" + (f"/{name}" if name else "")

"""The API resources that the operator uses, each named once with group, version and plural.

`rbac.py` builds the permission table from these resources, `client.py` the request paths, `watches.py` the watches,
and `objects/` the apiVersion of new objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from finetune_core.api import GROUP, PLURAL, VERSION

OPERATOR_NAME: Final = "finetune-operator"
"""Field manager of the operator's writes, and value of the label `app.kubernetes.io/managed-by` of its objects."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource of the API server, for example ``Resource("kubeflow.org", "v1", "pytorchjobs")``."""

    group: str
    """API group; empty for the core group."""
    version: str
    plural: str

    @property
    def api_version(self) -> str:
        """The `apiVersion` of objects of this resource, for example ``"kubeflow.org/v1"`` or ``"v1"``."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        """Return the request path of one object, or of the collection where ``name`` is None.

        Example: ``"/apis/kubeflow.org/v1/namespaces/team-a/pytorchjobs/viggo-1"``. ``namespace`` is None for a list
        over all namespaces and for cluster-scoped resources. ``subresource`` is for example ``"status"``; empty for the
        object itself.

        No other place builds the paths of `KubeClient`'s requests. Every segment is quoted, so that no text can lead
        the operator's credentials to another path. Raises ValueError where ``namespace`` or ``name`` can be no segment
        of a path at all.
        """
        root = f"/apis/{self.api_version}" if self.group else f"/api/{self.api_version}"
        scope = "" if namespace is None else f"/namespaces/{_segment(namespace)}"
        place = f"{root}{scope}/{self.plural}"
        if name is None:
            return place
        return f"{place}/{_segment(name)}" + (f"/{subresource}" if subresource else "")


def _segment(text: str) -> str:
    """Return ``text`` quoted as one segment of a path; raise ValueError for a text that is no segment even when quoted.

    An empty segment would turn the path of an object into the path of a collection, or the path of a namespace into the
    path of all namespaces. Clients and servers resolve the segments "." and "..", even where their dots are quoted.
    """
    if text in ("", ".", ".."):
        raise ValueError(f"{text!r} names no object of the API server")
    return quote(text, safe="")


FINETUNEJOBS: Final = Resource(GROUP, VERSION, PLURAL)
PYTORCHJOBS: Final = Resource("kubeflow.org", "v1", "pytorchjobs")
PODS: Final = Resource("", "v1", "pods")
CONFIG_MAPS: Final = Resource("", "v1", "configmaps")
SECRETS: Final = Resource("", "v1", "secrets")
EVENTS: Final = Resource("events.k8s.io", "v1", "events")
TOKEN_REVIEWS: Final = Resource("authentication.k8s.io", "v1", "tokenreviews")
CRDS: Final = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions")
NETWORK_POLICIES: Final = Resource("networking.k8s.io", "v1", "networkpolicies")
LEASES: Final = Resource("coordination.k8s.io", "v1", "leases")
ENDPOINT_SLICES: Final = Resource("discovery.k8s.io", "v1", "endpointslices")

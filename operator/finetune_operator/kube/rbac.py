"""The table of RBAC permissions that the operator needs: one entry for each verb on each resource.

`client.py` names an entry of the table in each request. kopf's watches and the leader election need the other entries.
A test compares the table with the roles in the Helm chart, so that the chart grants no other permissions. Where
somebody else keeps the certificate, the chart leaves out CREATE_CERTIFICATES and UPDATE_CERTIFICATES.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

from finetune_operator.kube.resources import (
    CONFIG_MAPS,
    CRDS,
    ENDPOINT_SLICES,
    EVENTS,
    FINETUNEJOBS,
    LEASES,
    NETWORK_POLICIES,
    PODS,
    PYTORCHJOBS,
    SECRETS,
    TOKEN_REVIEWS,
    Resource,
)


class RoleScope(StrEnum):
    """Which role of the Helm chart grants a permission."""

    JOBS = "jobs"
    """Needed in every served namespace: a ClusterRole, or a Role in each namespace of the chart's `watchNamespaces`."""
    ANNOTATIONS = "annotations"
    """As JOBS, but granted only where the chart's values keep the checkpoint annotation of pods switched on."""
    NETWORK_POLICIES = "network-policies"
    """As JOBS, but granted only where the chart's values keep the NetworkPolicies of attempts switched on."""
    CLUSTER = "cluster"
    """A ClusterRole in every installation, because the resource is cluster-scoped."""
    DISCOVERY = "discovery"
    """The ClusterRole of CLUSTER, but only where all namespaces are served. With these permissions on CRDs, kopf
    notices CRDs that are installed later."""
    OWN = "own"
    """A rule in the Role of the operator's own namespace, limited to one object by `resourceNames`."""
    OWN_NEW = "own-new"
    """A rule in the Role of the operator's own namespace without `resourceNames`, because RBAC can't limit `create` to
    a name."""


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """A permission: one verb on one resource, and which role grants it."""

    resource: Resource
    verb: str
    scope: RoleScope = RoleScope.JOBS
    subresource: str = ""
    """Subresource that the permission is about, for example ``"status"``; empty for the resource itself."""

    @property
    def rbac_resource(self) -> str:
        """The resource as an RBAC rule writes it, for example ``"pods"`` or ``"pods/status"``."""
        return f"{self.resource.plural}/{self.subresource}" if self.subresource else self.resource.plural


class Permission(Enum):
    """The table of all RBAC permissions that the operator needs, one member for each verb on each resource."""

    GET_JOB = PolicyRule(FINETUNEJOBS, "get")
    LIST_JOBS = PolicyRule(FINETUNEJOBS, "list")
    WATCH_JOBS = PolicyRule(FINETUNEJOBS, "watch")
    APPLY_STATUS = PolicyRule(FINETUNEJOBS, "patch", subresource="status")
    GET_CHILD = PolicyRule(PYTORCHJOBS, "get")
    LIST_CHILDREN = PolicyRule(PYTORCHJOBS, "list")
    WATCH_CHILDREN = PolicyRule(PYTORCHJOBS, "watch")
    CREATE_CHILD = PolicyRule(PYTORCHJOBS, "create")
    DELETE_CHILD = PolicyRule(PYTORCHJOBS, "delete")
    LIST_PODS = PolicyRule(PODS, "list")
    CREATE_POD = PolicyRule(PODS, "create")
    DELETE_POD = PolicyRule(PODS, "delete")
    WATCH_PODS = PolicyRule(PODS, "watch")
    ANNOTATE_POD = PolicyRule(PODS, "patch", RoleScope.ANNOTATIONS, subresource="status")
    GET_CONFIG_MAP = PolicyRule(CONFIG_MAPS, "get")
    CREATE_CONFIG_MAP = PolicyRule(CONFIG_MAPS, "create")
    DELETE_CONFIG_MAP = PolicyRule(CONFIG_MAPS, "delete")
    GET_NETWORK_POLICY = PolicyRule(NETWORK_POLICIES, "get", RoleScope.NETWORK_POLICIES)
    CREATE_NETWORK_POLICY = PolicyRule(NETWORK_POLICIES, "create", RoleScope.NETWORK_POLICIES)
    DELETE_NETWORK_POLICY = PolicyRule(NETWORK_POLICIES, "delete", RoleScope.NETWORK_POLICIES)
    CREATE_EVENT = PolicyRule(EVENTS, "create")
    LIST_EVENTS = PolicyRule(EVENTS, "list")
    REVIEW_TOKEN = PolicyRule(TOKEN_REVIEWS, "create", RoleScope.CLUSTER)
    LIST_CRDS = PolicyRule(CRDS, "list", RoleScope.DISCOVERY)
    WATCH_CRDS = PolicyRule(CRDS, "watch", RoleScope.DISCOVERY)
    GET_CERTIFICATES = PolicyRule(SECRETS, "get", RoleScope.OWN)
    UPDATE_CERTIFICATES = PolicyRule(SECRETS, "update", RoleScope.OWN)
    CREATE_CERTIFICATES = PolicyRule(SECRETS, "create", RoleScope.OWN_NEW)
    GET_LEASE = PolicyRule(LEASES, "get", RoleScope.OWN)
    UPDATE_LEASE = PolicyRule(LEASES, "update", RoleScope.OWN)
    CREATE_LEASE = PolicyRule(LEASES, "create", RoleScope.OWN_NEW)
    GET_ENDPOINT_SLICE = PolicyRule(ENDPOINT_SLICES, "get", RoleScope.OWN)
    UPDATE_ENDPOINT_SLICE = PolicyRule(ENDPOINT_SLICES, "update", RoleScope.OWN)
    CREATE_ENDPOINT_SLICE = PolicyRule(ENDPOINT_SLICES, "create", RoleScope.OWN_NEW)

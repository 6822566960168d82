"""Every verb that the operator uses, in one table: requests name their entry, the chart's roles equal the table."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

from finetune_core.api import GROUP, PLURAL


class Scope(StrEnum):
    """Where a permission is needed."""

    JOBS = "jobs"
    """In every served namespace: a ClusterRole, or a Role in each of `watchNamespaces`."""
    ANNOTATIONS = "annotations"
    """As JOBS, unless the annotation for schedulers is switched off."""
    CLUSTER = "cluster"
    """Of cluster-wide objects: a ClusterRole in any case."""
    DISCOVERY = "discovery"
    """Of cluster-wide objects, only where all namespaces are served: kopf notices CRDs that are installed later."""
    OWN = "own"
    """In the operator's own namespace, of one object by name."""
    OWN_NEW = "own-new"
    """In the operator's own namespace; a role can't name what is yet to be created."""


@dataclass(frozen=True, slots=True)
class Permission:
    """One verb on one resource."""

    group: str
    resource: str
    verb: str
    scope: Scope = Scope.JOBS


class Allowed(Enum):
    """The table."""

    GET_JOB = Permission(GROUP, PLURAL, "get")
    LIST_JOBS = Permission(GROUP, PLURAL, "list")
    WATCH_JOBS = Permission(GROUP, PLURAL, "watch")
    APPLY_STATUS = Permission(GROUP, f"{PLURAL}/status", "patch")
    GET_CHILD = Permission("kubeflow.org", "pytorchjobs", "get")
    LIST_CHILDREN = Permission("kubeflow.org", "pytorchjobs", "list")
    WATCH_CHILDREN = Permission("kubeflow.org", "pytorchjobs", "watch")
    CREATE_CHILD = Permission("kubeflow.org", "pytorchjobs", "create")
    DELETE_CHILD = Permission("kubeflow.org", "pytorchjobs", "delete")
    LIST_PODS = Permission("", "pods", "list")
    CREATE_POD = Permission("", "pods", "create")
    DELETE_POD = Permission("", "pods", "delete")
    WATCH_PODS = Permission("", "pods", "watch")
    ANNOTATE_POD = Permission("", "pods/status", "patch", Scope.ANNOTATIONS)
    GET_CONFIG_MAP = Permission("", "configmaps", "get")
    CREATE_CONFIG_MAP = Permission("", "configmaps", "create")
    DELETE_CONFIG_MAP = Permission("", "configmaps", "delete")
    CREATE_EVENT = Permission("events.k8s.io", "events", "create")
    LIST_EVENTS = Permission("events.k8s.io", "events", "list")
    REVIEW_TOKEN = Permission("authentication.k8s.io", "tokenreviews", "create", Scope.CLUSTER)
    LIST_CRDS = Permission("apiextensions.k8s.io", "customresourcedefinitions", "list", Scope.DISCOVERY)
    WATCH_CRDS = Permission("apiextensions.k8s.io", "customresourcedefinitions", "watch", Scope.DISCOVERY)
    GET_CERTIFICATES = Permission("", "secrets", "get", Scope.OWN)
    UPDATE_CERTIFICATES = Permission("", "secrets", "update", Scope.OWN)
    GET_LEASE = Permission("coordination.k8s.io", "leases", "get", Scope.OWN)
    UPDATE_LEASE = Permission("coordination.k8s.io", "leases", "update", Scope.OWN)
    GET_ENDPOINTS = Permission("discovery.k8s.io", "endpointslices", "get", Scope.OWN)
    UPDATE_ENDPOINTS = Permission("discovery.k8s.io", "endpointslices", "update", Scope.OWN)
    CREATE_ENDPOINTS = Permission("discovery.k8s.io", "endpointslices", "create", Scope.OWN_NEW)

"""The kinds of objects that Argo CD does not apply with its default setting of `resource.exclusions`.

Source: `data["resource.exclusions"]` of the ConfigMap `argocd-cm` in `manifests/base/config/argocd-cm.yaml` of
argoproj/argo-cd, which has this content since version 3.0.
"""

from __future__ import annotations

from typing import Any, Final

EXCLUSIONS: Final = (
    (("", "discovery.k8s.io"), ("Endpoints", "EndpointSlice")),
    (("apiregistration.k8s.io",), ("APIService",)),
    (("coordination.k8s.io",), ("Lease",)),
    (
        ("authentication.k8s.io", "authorization.k8s.io"),
        (
            "SelfSubjectReview",
            "TokenReview",
            "LocalSubjectAccessReview",
            "SelfSubjectAccessReview",
            "SelfSubjectRulesReview",
            "SubjectAccessReview",
        ),
    ),
    (("certificates.k8s.io",), ("CertificateSigningRequest",)),
    (("cert-manager.io",), ("CertificateRequest",)),
    (("cilium.io",), ("CiliumIdentity", "CiliumEndpoint", "CiliumEndpointSlice")),
    (
        ("kyverno.io", "reports.kyverno.io", "wgpolicyk8s.io"),
        (
            "PolicyReport",
            "ClusterPolicyReport",
            "EphemeralReport",
            "ClusterEphemeralReport",
            "AdmissionReport",
            "ClusterAdmissionReport",
            "BackgroundScanReport",
            "ClusterBackgroundScanReport",
            "UpdateRequest",
        ),
    ),
)
"""Each entry has API groups and kinds. Argo CD excludes all of these kinds in all of these groups."""


def is_excluded(manifest: dict[str, Any]) -> bool:
    """Return whether Argo CD with its default settings leaves out ``manifest``, an object with `apiVersion` and
    `kind`."""
    group = manifest["apiVersion"].rpartition("/")[0]
    return any(group in groups and manifest["kind"] in kinds for groups, kinds in EXCLUSIONS)

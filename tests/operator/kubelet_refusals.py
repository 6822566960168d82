"""The reasons with which a kubelet refuses a pod, listed from the source of Kubernetes 1.34.

Each handler of admission has reasons of its own, and `rejectPod` in pkg/kubelet/kubelet.go writes the reason into
`status.reason` of the pod.
"""

from __future__ import annotations

KUBELET_REFUSALS = frozenset(
    {
        # pkg/kubelet/lifecycle/predicate.go
        "InvalidNodeInfo",
        "PodOSSelectorNodeLabelDoesNotMatch",
        "PodOSNotSupported",
        "InitContainerRestartPolicyForbidden",
        "SupplementalGroupsPolicyNotSupported",
        "UnexpectedAdmissionError",
        "UnknownReason",
        "UnexpectedPredicateFailureType",
        "OutOfcpu",
        "OutOfmemory",
        "OutOfephemeral-storage",
        "OutOfpods",
        "OutOfnvidia.com/gpu",  # an example: the reason is "OutOf" and the name of the extended resource
        # The names of plugins of the scheduler, whose checks the kubelet repeats: AdmissionCheck in
        # pkg/scheduler/eventhandlers.go, and the check of taints in pkg/kubelet/lifecycle/predicate.go
        "NodeAffinity",
        "NodeName",
        "NodePorts",
        "TaintToleration",
        # pkg/kubelet/lifecycle/handlers.go
        "AppArmor",
        "PodLevelResourcesNotSupported",
        # pkg/kubelet/cm/topologymanager, pkg/kubelet/cm/cpumanager
        "TopologyAffinityError",
        "SMTAlignmentError",
        # pkg/kubelet/nodeshutdown, pkg/kubelet/sysctl, pkg/kubelet/eviction, pkg/kubelet/volumemanager
        "NodeShutdown",
        "SysctlForbidden",
        "Evicted",
        "VolumeAttachmentLimitExceeded",
    }
)

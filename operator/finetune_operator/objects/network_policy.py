"""Builds the NetworkPolicy of an attempt: only pods of the same attempt may open connections to its pods.

The policy is needed because the ranks of an attempt talk to each other in clear text, and gloo and NCCL accept any
connection. The job owns the policy. `act/attempt_objects.py` creates the policy after the attempt's ConfigMap, and
deletes the policy when the next attempt begins. `settled.py` deletes the policy of the last attempt.
"""

from __future__ import annotations

from finetune_core.api import FineTuneJob
from finetune_operator.kube.manifest import Manifest
from finetune_operator.kube.resources import NETWORK_POLICIES
from finetune_operator.objects.labels import ATTEMPT, JOB_UID, attempt_labels, owner_reference
from finetune_operator.objects.pod_template import AttemptSpec


def build_network_policy(job: FineTuneJob, attempt: AttemptSpec) -> Manifest:
    """Return the NetworkPolicy of an attempt.

    Connections that the pods open themselves are not limited, because the addresses of object store, Hugging Face Hub
    and DNS are not known here. What the kubelet of the same node sends, such as probes, is always allowed
    (kubernetes.io/docs/concepts/services-networking/network-policies).
    """
    metadata = job.metadata
    pods = {"matchLabels": {JOB_UID: metadata.uid, ATTEMPT: str(attempt.number)}}
    return {
        "apiVersion": NETWORK_POLICIES.api_version,
        "kind": "NetworkPolicy",
        "metadata": {
            "name": attempt.name,
            "namespace": metadata.namespace,
            "labels": attempt_labels(metadata.name, metadata.uid, attempt.number),
            "ownerReferences": [owner_reference(job)],
        },
        "spec": {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": pods}]}]},
    }

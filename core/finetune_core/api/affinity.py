"""`podTemplate.affinity`: a typed subset of the affinity in Kubernetes' core/v1. The subset leaves out `matchFields`,
`namespaces` and `namespaceSelector`, among others.

The fields of list items have no defaults, because kubectl and Argo CD compare lists as a whole. If the API server
filled in a default inside of a list item, both programs would report a difference from the user's file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ENTRIES, ApiModel, LabelKey, LabelValue, QualifiedName, cel

Weight = Annotated[int, Field(ge=1, le=100)]
"""Weight of a preference, from 1 to 100. For each node, the scheduler adds the weights of all preferences that the node
fulfils."""


class NodeSelectorRequirement(ApiModel):
    """A condition on one label of a node."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.operator in ['Exists', 'DoesNotExist'] ? !has(self.values)"
                " : has(self.values) && (!(self.operator in ['Gt', 'Lt']) || self.values.size() == 1)",
                "`values` must be absent with Exists and DoesNotExist, one number with Gt and Lt, else set",
            ),
        )
    )

    key: QualifiedName
    """Label key, for example `topology.kubernetes.io/zone`."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How the node's label value is compared with `values`. `Exists` and `DoesNotExist` only check whether the node has
    the label."""
    values: Annotated[list[LabelValue], Field(min_length=1, max_length=16)] | None = None
    """Values that the label is compared with, for example `["zone-a"]`. `Gt` and `Lt` take exactly one number."""


class NodeSelectorTerm(ApiModel):
    """Conditions on a node's labels. A node matches when all conditions hold."""

    match_expressions: Annotated[list[NodeSelectorRequirement], Field(min_length=1, max_length=8)]
    """The conditions, which must all hold."""


class NodeSelector(ApiModel):
    """Alternatives for a node. A node matches when at least one term matches."""

    node_selector_terms: Annotated[list[NodeSelectorTerm], Field(min_length=1, max_length=8)]
    """The terms, of which at least one must match."""


class PreferredNode(ApiModel):
    """A preference for nodes that match a term."""

    weight: Weight
    """Weight of the preference, 1 to 100. For each node, the scheduler adds the weights of the preferences that the
    node fulfils."""
    preference: NodeSelectorTerm
    """The term that preferred nodes match."""


class NodeAffinity(ApiModel):
    """Rules about the nodes that the pods run on."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """Nodes that the pods must run on."""
    preferred_during_scheduling_ignored_during_execution: Annotated[list[PreferredNode], Field(max_length=8)] = []
    """Nodes that the scheduler prefers for the pods."""


class LabelSelectorRequirement(ApiModel):
    """A condition on one label of a pod."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "(self.operator in ['Exists', 'DoesNotExist']) != has(self.values)",
                "`values` must be absent with Exists and DoesNotExist, else set",
            ),
        )
    )

    key: QualifiedName
    """Label key, for example `app.kubernetes.io/name`."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """How the pod's label value is compared with `values`. `Exists` and `DoesNotExist` only check whether the pod has
    the label."""
    values: Annotated[list[LabelValue], Field(min_length=1, max_length=16)] | None = None
    """Values that the label is compared with, for example `["web", "cache"]`."""


class LabelSelector(ApiModel):
    """Conditions on a pod's labels. A pod matches when all conditions hold."""

    match_labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=16), ENTRIES] | None = None
    """Labels that the pod must have with exactly these values, for example `{team: research}`."""
    match_expressions: Annotated[list[LabelSelectorRequirement], Field(max_length=8)] | None = None
    """Further conditions, which must all hold too."""


class PodAffinityTerm(ApiModel):
    """A set of pods in the job's namespace, and a kind of place (topology domain), such as a node or a zone. Two pods
    are near each other when they are in the same place of this kind."""

    label_selector: LabelSelector
    """The pods that the term is about."""
    topology_key: QualifiedName
    """Node label whose value names the topology domain, for example `kubernetes.io/hostname` for single nodes."""


class PreferredPods(ApiModel):
    """A preference of the scheduler to place the job's pods near other pods, or away from other pods."""

    weight: Weight
    """Weight of the preference, 1 to 100. For each node, the scheduler adds the weights of the preferences that the
    node fulfils."""
    pod_affinity_term: PodAffinityTerm
    """The pods and the topology domain that the preference is about."""


class PodAffinity(ApiModel):
    """Rules that place the job's pods near other pods (`podAffinity`) or away from other pods (`podAntiAffinity`)."""

    required_during_scheduling_ignored_during_execution: Annotated[list[PodAffinityTerm], Field(max_length=8)] = []
    """Terms that must hold for a pod to be scheduled. Under `podAffinity` the pod must be near pods of each term, and
    under `podAntiAffinity` it must not be near any pod of a term."""
    preferred_during_scheduling_ignored_during_execution: Annotated[list[PreferredPods], Field(max_length=8)] = []
    """Preferences that the scheduler satisfies where it can: for nodes near pods of a term under `podAffinity`, and for
    nodes away from such pods under `podAntiAffinity`."""


class Affinity(ApiModel):
    """Rules about the nodes that the pods run on, and about their distance to other pods."""

    node_affinity: NodeAffinity | None = None
    """Rules about the nodes that the pods run on."""
    pod_affinity: PodAffinity | None = None
    """Rules that place the pods near other pods, for example on the same node."""
    pod_anti_affinity: PodAffinity | None = None
    """Rules that keep the pods away from other pods, for example off the same node."""

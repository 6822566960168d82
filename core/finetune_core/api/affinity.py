"""`podTemplate.affinity`: a typed subset of core/v1's, without `matchFields` and namespace selectors.

Fields of list items have no defaults: kubectl and Argo CD replace lists as a whole, so a default in one is drift.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_core.api.base import ENTRIES, ApiModel, LabelKey, LabelValue, QualifiedName, cel

Weight = Annotated[int, Field(ge=1, le=100)]


class NodeSelectorRequirement(ApiModel):
    """A condition on a node's label."""

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
    """Label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How the label's value is compared."""
    values: Annotated[list[LabelValue], Field(min_length=1, max_length=16)] | None = None
    """What it is compared with."""


class NodeSelectorTerm(ApiModel):
    """Conditions that all hold."""

    match_expressions: Annotated[list[NodeSelectorRequirement], Field(min_length=1, max_length=8)]
    """The conditions."""


class NodeSelector(ApiModel):
    """Terms of which one holds."""

    node_selector_terms: Annotated[list[NodeSelectorTerm], Field(min_length=1, max_length=8)]
    """The terms."""


class PreferredNode(ApiModel):
    """A term that is preferred, with its weight."""

    weight: Weight
    """1 to 100."""
    preference: NodeSelectorTerm
    """The term."""


class NodeAffinity(ApiModel):
    """Nodes that the pods need or prefer."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """Nodes that the pods need."""
    preferred_during_scheduling_ignored_during_execution: Annotated[list[PreferredNode], Field(max_length=8)] = []
    """Nodes that the pods prefer."""


class LabelSelectorRequirement(ApiModel):
    """A condition on a pod's label."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "(self.operator in ['Exists', 'DoesNotExist']) != has(self.values)",
                "`values` must be absent with Exists and DoesNotExist, else set",
            ),
        )
    )

    key: QualifiedName
    """Label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """How the label's value is compared."""
    values: Annotated[list[LabelValue], Field(min_length=1, max_length=16)] | None = None
    """What it is compared with."""


class LabelSelector(ApiModel):
    """Conditions on pods that all hold."""

    match_labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=16), ENTRIES] | None = None
    """Labels with their values."""
    match_expressions: Annotated[list[LabelSelectorRequirement], Field(max_length=8)] | None = None
    """Further conditions."""


class PodAffinityTerm(ApiModel):
    """Pods of the job's namespace, and the part of the cluster that counts as the same place."""

    label_selector: LabelSelector
    """Which pods."""
    topology_key: QualifiedName
    """Node label whose value says what one place is, such as `kubernetes.io/hostname`."""


class PreferredPods(ApiModel):
    """A term that is preferred, with its weight."""

    weight: Weight
    """1 to 100."""
    pod_affinity_term: PodAffinityTerm
    """The term."""


class PodAffinity(ApiModel):
    """Pods that the job's pods go to, or stay away from."""

    required_during_scheduling_ignored_during_execution: Annotated[list[PodAffinityTerm], Field(max_length=8)] = []
    """Terms that hold."""
    preferred_during_scheduling_ignored_during_execution: Annotated[list[PreferredPods], Field(max_length=8)] = []
    """Terms that are preferred."""


class Affinity(ApiModel):
    """Which nodes the pods need or prefer, and which pods they go to or stay away from."""

    node_affinity: NodeAffinity | None = None
    """Nodes."""
    pod_affinity: PodAffinity | None = None
    """Pods to go to."""
    pod_anti_affinity: PodAffinity | None = None
    """Pods to stay away from."""

"""The chart passes `helm lint --strict`. The rendered chart runs the operator in a restricted pod, and grants the
operator exactly the permissions that the operator uses."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.api.crd import CRD_FILE, chart_template, crd_yaml
from finetune_operator.kube.rbac import Permission, RoleScope
from finetune_operator.process.settings import parse_settings
from tests.chart.argo_cd import is_excluded
from tests.chart.helm import CHART, helm, helm_program

REPOSITORY = Path(__file__).resolve().parents[2]
CONFINED = {"watchNamespaces": ["team-a", "team-b"]}

Manifest = dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def _helm_is_there() -> None:
    helm_program()


def rendered(values: Manifest | None = None) -> list[Manifest]:
    """Render the chart with ``values`` for a release in the namespace `system`, and return its objects."""
    # The loader of libyaml returns the same objects as PyYAML's own loader. PyYAML's own loader, which is written in
    # Python, would take longer for the CRD than helm takes to render the chart.
    return [item for item in yaml.load_all(rendered_text(json.dumps(values or {})), Loader=yaml.CSafeLoader) if item]


@functools.cache
def rendered_text(values: str) -> str:
    """Return the text that helm renders from the chart with ``values``, which is JSON. The results are cached, because
    many tests use the same values, and because no template has a random part."""
    return helm("template", "finetune-operator", str(CHART), "--namespace", "system", "--values", "-", stdin=values)


def of_kind(objects: list[Manifest], kind: str) -> list[Manifest]:
    return [item for item in objects if item["kind"] == kind]


def deployment(values: Manifest | None = None) -> Manifest:
    (found,) = of_kind(rendered(values), "Deployment")
    return found


def test_strict_lint_passes() -> None:
    for values in ({}, CONFINED, {"crds": {"enabled": False}}):
        helm("lint", "--strict", str(CHART), "--values", "-", stdin=json.dumps(values))


def test_the_operators_pod_is_restricted() -> None:
    spec = deployment()["spec"]["template"]["spec"]
    pod, container = spec["securityContext"], spec["containers"][0]["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["allowPrivilegeEscalation"] is False
    assert container["readOnlyRootFilesystem"] is True
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(spec)
    assert all("hostPath" not in volume for volume in spec["volumes"])
    assert spec["containers"][0]["resources"]["limits"]["memory"]


def test_a_new_operator_waits_beside_the_old_one_for_the_lease() -> None:
    spec = deployment()["spec"]
    assert (spec["replicas"], spec["strategy"]["rollingUpdate"]) == (1, {"maxUnavailable": 0, "maxSurge": 1})
    two = deployment({"replicas": 2})["spec"]
    assert two["replicas"] == 2
    (spread,) = two["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == two["selector"]["matchLabels"]
    assert of_kind(rendered(), "Lease") == [], "an upgrade must not take the Lease from its holder"


def test_the_operator_reads_what_the_chart_sets() -> None:
    container = deployment(CONFINED)["spec"]["template"]["spec"]["containers"][0]
    environment = {item["name"]: item.get("value", "system") for item in container["env"]}
    settings = parse_settings([], environment)
    assert settings.namespace == "system"
    assert settings.watch_namespaces == ("team-a", "team-b")
    assert settings.report_base_url == "https://finetune-operator.system.svc:8443"
    assert settings.trainer_image == "finetune-trainer:0.1.0"
    (secret,) = of_kind(rendered(), "Secret")
    assert settings.certificate_secret == secret["metadata"]["name"]
    assert settings.lease == OWN_NAMES["leases"]
    (service,) = of_kind(rendered(), "Service")
    assert settings.report_service == service["metadata"]["name"]


def test_the_report_service_is_headless_and_leaves_its_endpoints_to_the_leader() -> None:
    (service,) = of_kind(rendered(), "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert "selector" not in service["spec"]


def test_disruption_budget_and_monitor_are_there_when_asked_for() -> None:
    assert of_kind(rendered(), "PodDisruptionBudget") == of_kind(rendered(), "PodMonitor") == []
    objects = rendered(
        {"podDisruptionBudget": {"enabled": True}, "podMonitor": {"enabled": True, "labels": {"p": "x"}}}
    )
    labels = deployment()["spec"]["template"]["metadata"]["labels"]
    (budget,) = of_kind(objects, "PodDisruptionBudget")
    (monitor,) = of_kind(objects, "PodMonitor")
    for selecting in (budget, monitor):
        assert selecting["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = deployment()["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in [port["name"] for port in ports]
    assert monitor["metadata"]["labels"]["p"] == "x"


def granted(roles: list[Manifest]) -> set[tuple[str, str, str, str]]:
    """Return the permissions that ``roles`` grant: API group, resource, verb, and the object's name or an empty
    text."""
    found: set[tuple[str, str, str, str]] = set()
    for rule in itertools.chain.from_iterable(role["rules"] for role in roles):
        names = rule.get("resourceNames", [""])
        found |= set(itertools.product(rule["apiGroups"], rule["resources"], rule["verbs"], names))
    return found


OWN_NAMES = {
    "secrets": "finetune-operator-certificates",
    "leases": "finetune-operator",
    "endpointslices": "finetune-operator-leader",
}


def used(*scopes: RoleScope) -> set[tuple[str, str, str, str]]:
    """Return the permissions that the operator needs from roles with one of ``scopes``, in the form in which `granted`
    returns permissions."""
    permissions = [permission.value for permission in Permission if permission.value.scope in scopes]
    return {
        (
            item.resource.group,
            item.rbac_resource,
            item.verb,
            OWN_NAMES[item.rbac_resource] if item.scope is RoleScope.OWN else "",
        )
        for item in permissions
    }


@pytest.mark.parametrize("values", [{}, CONFINED, {"podMonitor": {"enabled": True}}], ids=["wide", "confined", "more"])
def test_argo_cd_applies_every_object_of_the_chart(values: Manifest) -> None:
    objects = rendered(values)
    assert [item["kind"] for item in objects if is_excluded(item)] == []


def test_the_roles_grant_exactly_what_the_operator_uses() -> None:
    objects = rendered()
    assert granted(of_kind(objects, "ClusterRole")) == used(
        RoleScope.JOBS,
        RoleScope.ANNOTATIONS,
        RoleScope.NETWORK_POLICIES,
        RoleScope.CLUSTER,
        RoleScope.DISCOVERY,
    )
    assert granted(of_kind(objects, "Role")) == used(RoleScope.OWN, RoleScope.OWN_NEW)


def test_a_confined_operator_may_only_review_tokens_cluster_wide() -> None:
    objects = rendered(CONFINED)
    assert granted(of_kind(objects, "ClusterRole")) == used(RoleScope.CLUSTER)
    for namespace in CONFINED["watchNamespaces"]:
        roles = [role for role in of_kind(objects, "Role") if role["metadata"].get("namespace") == namespace]
        assert granted(roles) == used(RoleScope.JOBS, RoleScope.ANNOTATIONS, RoleScope.NETWORK_POLICIES)
        bindings = of_kind(objects, "RoleBinding")
        assert any(binding["metadata"]["namespace"] == namespace for binding in bindings)


def test_without_the_annotation_there_is_no_permission_on_pods_beyond_reading() -> None:
    objects = rendered({"checkpointAnnotations": False})
    assert granted(of_kind(objects, "ClusterRole")) == used(
        RoleScope.JOBS, RoleScope.NETWORK_POLICIES, RoleScope.CLUSTER, RoleScope.DISCOVERY
    )
    environment = deployment({"checkpointAnnotations": False})["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "FINETUNE_CHECKPOINT_ANNOTATIONS", "value": "off"} in environment


def test_without_network_policies_there_is_no_permission_on_them() -> None:
    values = {"attemptNetworkPolicies": False}
    assert granted(of_kind(rendered(values), "ClusterRole")) == used(
        RoleScope.JOBS, RoleScope.ANNOTATIONS, RoleScope.CLUSTER, RoleScope.DISCOVERY
    )
    environment = deployment(values)["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "FINETUNE_NETWORK_POLICIES", "value": "off"} in environment


def test_every_binding_names_a_role_and_the_service_account() -> None:
    objects = rendered(CONFINED)
    accounts = [(item["metadata"]["name"], "system") for item in of_kind(objects, "ServiceAccount")]
    roles = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for binding in of_kind(objects, "RoleBinding") + of_kind(objects, "ClusterRoleBinding"):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in roles
        assert [(item["name"], item["namespace"]) for item in binding["subjects"]] == accounts


def test_a_certificate_that_somebody_else_keeps_is_only_read() -> None:
    values = {"reports": {"certificate": {"existingSecret": "from-cert-manager"}}}
    objects = rendered(values)
    assert of_kind(objects, "Secret") == []
    own = granted(of_kind(objects, "Role"))
    assert {item for item in own if item[1] == "secrets"} == {("", "secrets", "get", "from-cert-manager")}
    environment = deployment(values)["spec"]["template"]["spec"]["containers"][0]["env"]
    settings = parse_settings([], {item["name"]: item.get("value", "system") for item in environment})
    assert (settings.certificate_secret, settings.certificate_from) == ("from-cert-manager", "Secret")


def test_the_secret_is_empty_so_that_an_upgrade_keeps_its_data() -> None:
    (secret,) = of_kind(rendered(), "Secret")
    assert {"data", "stringData"}.isdisjoint(secret)


def test_the_charts_crd_is_the_generated_one() -> None:
    stored = CHART / "templates/crds" / CRD_FILE
    assert stored.read_text(encoding="utf-8") == chart_template(), "run: make crds"
    (crd,) = of_kind(rendered({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert crd == yaml.safe_load(crd_yaml())


def test_the_crd_stays_unless_told_otherwise() -> None:
    (crd,) = of_kind(rendered(), "CustomResourceDefinition")
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert of_kind(rendered({"crds": {"enabled": False}}), "CustomResourceDefinition") == []


def _toggles() -> Iterator[tuple[str, Manifest, str]]:
    yield "digest", {"image": {"repository": "r", "digest": "sha256:" + "0" * 64}}, "r@sha256:" + "0" * 64
    yield "tag", {"image": {"repository": "r", "tag": "7"}}, '"r:7"'
    yield "pull secrets", {"imagePullSecrets": [{"name": "registry"}]}, "name: registry"
    yield "trainer", {"trainer": {"image": "own/trainer:2"}}, "own/trainer:2"
    yield "preflight", {"preflight": "Skip"}, "value: Skip"
    yield "checks at a time", {"maxPreflights": 7}, 'value: "7"'
    yield "log level", {"logLevel": "debug"}, "value: debug"
    yield "workers", {"workers": 3}, 'value: "3"'
    yield "resync", {"resyncSeconds": 60}, 'value: "60"'
    yield "report port", {"reports": {"port": 9443}}, "containerPort: 9443"
    yield "health port", {"health": {"port": 9090}}, "containerPort: 9090"
    yield "account", {"serviceAccount": {"name": "own", "annotations": {"a": "b"}}}, "serviceAccountName: own"
    yield "pod annotations", {"podAnnotations": {"a": "b"}}, "a: b"
    yield "pod labels", {"podLabels": {"team": "x"}}, "team: x"
    yield "node selector", {"nodeSelector": {"zone": "a"}}, "zone: a"
    yield "tolerations", {"tolerations": [{"key": "k"}]}, "key: k"
    yield "affinity", {"affinity": {"nodeAffinity": {}}}, "nodeAffinity"
    yield "priority", {"priorityClassName": "high"}, "priorityClassName: high"
    yield "resources", {"resources": {"limits": {"memory": "1Gi"}}}, "memory: 1Gi"
    yield "name", {"fullnameOverride": "other"}, "name: other-certificates"


@pytest.mark.parametrize(
    ("values", "expected"), [case[1:] for case in _toggles()], ids=[case[0] for case in _toggles()]
)
def test_every_value_shows(values: Manifest, expected: str) -> None:
    text = helm("template", "x", str(CHART), "--values", "-", stdin=json.dumps(values))
    assert expected in text


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 6},
        {"podMonitor": {"interval": "often"}},
        {"logLevel": "loud"},
        {"preflight": "Maybe"},
        {"maxPreflights": 0},
        {"imge": {}},
        {"watchNamespaces": ["Team_A"]},
        {"trainer": {"image": ""}},
        {"image": {"repository": "r", "digest": "latest"}},
    ],
)
def test_wrong_values_are_refused(values: Manifest) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failure:
        helm("template", "x", str(CHART), "--values", "-", stdin=json.dumps(values))
    assert "schema" in failure.value.stderr


def test_the_readme_names_every_value() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    assert [name for name in values if f"`{name}" not in readme] == []

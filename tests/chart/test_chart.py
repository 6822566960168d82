"""The chart as helm renders it: strict lint, restricted pods, exactly the permissions that the operator uses."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.api.crd import CRD_FILE, chart_template, crd_yaml
from finetune_operator.permissions import Allowed, Scope
from finetune_operator.settings import parse_settings
from tests.chart.helm import CHART, helm, helm_program

REPOSITORY = Path(__file__).resolve().parents[2]
CONFINED = {"watchNamespaces": ["team-a", "team-b"]}

Manifest = dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def _helm_is_there() -> None:
    helm_program()


def rendered(values: Manifest | None = None) -> list[Manifest]:
    """Return the objects of the chart for a release in namespace `system`."""
    text = helm(
        "template",
        "finetune-operator",
        str(CHART),
        "--namespace",
        "system",
        "--values",
        "-",
        stdin=json.dumps(values or {}),
    )
    return [item for item in yaml.safe_load_all(text) if item]


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


def test_one_operator_at_a_time() -> None:
    spec = deployment()["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")


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
    (service,) = of_kind(rendered(), "Service")
    assert settings.report_service == service["metadata"]["name"]


def test_the_report_service_is_headless_and_selects_the_operator() -> None:
    (service,) = of_kind(rendered(), "Service")
    labels = deployment()["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= labels.items()


def granted(roles: list[Manifest]) -> set[tuple[str, str, str, str]]:
    """Return group, resource, verb and object name of every rule."""
    found: set[tuple[str, str, str, str]] = set()
    for rule in itertools.chain.from_iterable(role["rules"] for role in roles):
        names = rule.get("resourceNames", [""])
        found |= set(itertools.product(rule["apiGroups"], rule["resources"], rule["verbs"], names))
    return found


def used(*scopes: Scope, name: str = "") -> set[tuple[str, str, str, str]]:
    """Return what the operator uses in ``scopes``."""
    permissions = [allowed.value for allowed in Allowed]
    return {(item.group, item.resource, item.verb, name) for item in permissions if item.scope in scopes}


def test_the_roles_grant_exactly_what_the_operator_uses() -> None:
    objects = rendered()
    assert granted(of_kind(objects, "ClusterRole")) == used(Scope.JOBS, Scope.CLUSTER, Scope.DISCOVERY)
    own = used(Scope.OWN, name="finetune-operator-certificates")
    assert granted(of_kind(objects, "Role")) == own


def test_a_confined_operator_may_only_review_tokens_cluster_wide() -> None:
    objects = rendered(CONFINED)
    assert granted(of_kind(objects, "ClusterRole")) == used(Scope.CLUSTER)
    for namespace in CONFINED["watchNamespaces"]:
        roles = [role for role in of_kind(objects, "Role") if role["metadata"].get("namespace") == namespace]
        assert granted(roles) == used(Scope.JOBS)
        bindings = of_kind(objects, "RoleBinding")
        assert any(binding["metadata"]["namespace"] == namespace for binding in bindings)


def test_every_binding_names_a_role_and_the_service_account() -> None:
    objects = rendered(CONFINED)
    accounts = [(item["metadata"]["name"], "system") for item in of_kind(objects, "ServiceAccount")]
    roles = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for binding in of_kind(objects, "RoleBinding") + of_kind(objects, "ClusterRoleBinding"):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in roles
        assert [(item["name"], item["namespace"]) for item in binding["subjects"]] == accounts


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
        {"replicas": 2},
        {"logLevel": "loud"},
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

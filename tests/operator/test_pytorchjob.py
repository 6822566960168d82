"""Tests of the rendered PyTorchJob: the golden file, Pod Security, and the environment and mounts of the contract.

After an intended change, `python -m tests.operator.test_pytorchjob` writes the golden file anew.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from finetune_core.contract import IDENTITY_VARIABLES, MASTER_ADDR_VARIABLE, STORAGE_CA_FILE, report_audience
from finetune_core.contract.pod import CPU_REQUEST_VARIABLE
from finetune_core.names import attempt_name
from finetune_operator.objects.backends.pytorchjob import build_pytorchjob, parse_pytorchjob
from finetune_operator.objects.pod_template import AttemptSpec
from finetune_operator.objects.preflight_pod import PreflightSpec, build_preflight_pod
from tests.operator.builders import UID, job

GOLDEN = Path(__file__).parent / "golden" / "quickstart.yaml"


def attempt_spec(number: int = 1) -> AttemptSpec:
    return AttemptSpec(
        number=number,
        name=attempt_name("quickstart", UID, number),
        image="trainer:1",
        report_base_url="https://operator:8443",
    )


def rendered(**spec: Any) -> dict[str, Any]:
    return build_pytorchjob(job(**spec), attempt_spec())


def template(**spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = rendered(**spec)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    return found


def text() -> str:
    return yaml.safe_dump(rendered(), sort_keys=False, width=100)


def test_the_quickstart_renders_as_stored() -> None:
    assert text() == GOLDEN.read_text(encoding="utf-8")


def test_building_twice_gives_the_same() -> None:
    assert rendered() == rendered()


def test_every_identity_variable_is_set() -> None:
    names = {variable["name"] for variable in template()["spec"]["containers"][0]["env"]}
    assert {*IDENTITY_VARIABLES.values(), MASTER_ADDR_VARIABLE} <= names


def test_gpus_bring_a_limit_a_node_selector_and_the_process_count() -> None:
    resources = {"nodes": 3, "gpusPerNode": 8, "cpu": "32", "memory": "256Gi"}
    built = rendered(resources=resources)
    assert built["spec"]["nprocPerNode"] == "8"
    assert built["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 3
    spec = template(resources=resources, podTemplate={"nodeSelector": {"zone": "a"}})["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB", "zone": "a"}


NETWORK: dict[str, Any] = {
    "resources": {
        "nodes": 2,
        "gpusPerNode": 8,
        "cpu": "96",
        "memory": "1000Gi",
        "extended": {"rdma/hca_shared_devices_a": 1, "vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"},
    },
    "podTemplate": {"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}},
}
"""A job with network devices for RDMA, huge pages and locked memory."""


def test_network_devices_are_requested_whole_and_the_cpus_have_no_limit() -> None:
    (container,) = template(**NETWORK)["spec"]["containers"]
    limits = {"memory": "1000Gi", "nvidia.com/gpu": "8", "rdma/hca_shared_devices_a": "1"}
    limits |= {"vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"}
    amounts = container["resources"]
    assert {name: amount for name, amount in amounts["limits"].items() if name != "ephemeral-storage"} == limits
    requests = {name: amount for name, amount in amounts["requests"].items() if name != "ephemeral-storage"}
    assert requests == limits | {"cpu": "96"}


def test_the_cpu_request_is_the_limit_by_choice() -> None:
    amounts = template(resources=NETWORK["resources"] | {"limitCpu": True})["spec"]["containers"][0]["resources"]
    assert amounts["limits"]["cpu"] == amounts["requests"]["cpu"] == "96"


def test_a_capability_is_added_by_choice_to_the_training_pods_alone() -> None:
    context = template(**NETWORK)["spec"]["containers"][0]["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]},
        "readOnlyRootFilesystem": True,
    }
    sections: list[dict[str, Any]] = [{}, {"securityContext": {}}, {"securityContext": {"capabilities": {}}}]
    for section in sections:
        (container,) = template(podTemplate=section)["spec"]["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_preflight_pod_is_the_same_with_and_without_network_devices() -> None:
    check = PreflightSpec(number=1, name="check", image="trainer:1")
    plain = {name: value for name, value in NETWORK["resources"].items() if name != "extended"}
    assert build_preflight_pod(job(**NETWORK), check) == build_preflight_pod(job(resources=plain), check)


def test_the_kubelet_tells_the_trainer_its_cpu_request() -> None:
    (container,) = template()["spec"]["containers"]
    (found,) = [item for item in container["env"] if item["name"] == CPU_REQUEST_VARIABLE]
    reference = {"containerName": container["name"], "resource": "requests.cpu", "divisor": "1m"}
    assert found["valueFrom"] == {"resourceFieldRef": reference}


def test_without_gpus_no_gpu_is_asked_for() -> None:
    spec = template()["spec"]
    assert "nodeSelector" not in spec
    assert "nvidia.com/gpu" not in spec["containers"][0]["resources"]["limits"]


def test_the_claims_and_tokens_of_every_source_of_a_mix_are_mounted() -> None:
    mix = [
        {"volume": {"claimName": "rows", "path": "a.jsonl"}},
        {"volume": {"claimName": "rows", "path": "b"}},
        {"huggingFace": {"repo": "a/b", "split": "train", "tokenSecretRef": {"name": "hub", "key": "t"}}},
    ]
    dataset = job().spec.dataset.to_json() | {"train": {"mix": mix}}
    volumes = template(dataset=dataset)["spec"]["volumes"]
    assert [
        volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume
    ] == ["rows"]
    (projected,) = [volume["projected"] for volume in volumes if volume["name"] == "hub-data-tokens"]
    assert projected["sources"] == [
        {"secret": {"name": "hub", "items": [{"key": "t", "path": "dataset.train.mix[2]"}]}}
    ]


def test_claims_and_the_hub_token_are_mounted_read_only() -> None:
    model = {"huggingFace": {"repo": "a/b", "tokenSecretRef": {"name": "hub", "key": "t"}}}
    volume = {"volume": {"claimName": "rows", "path": "train.jsonl"}}
    dataset = {"train": volume, "validation": volume, "format": {"promptCompletion": {}}}
    spec = template(model=model, dataset=dataset)["spec"]
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts["/var/run/finetune/volumes/rows"]["readOnly"]
    assert mounts["/var/run/secrets/finetune.dev/hub"]["readOnly"]
    claims = [volume for volume in spec["volumes"] if "persistentVolumeClaim" in volume]
    assert len(claims) == 1


def test_the_pod_template_section_reaches_the_pods_and_our_labels_win() -> None:
    section = {
        "labels": {"team": "x", "finetune.dev/attempt": "99"},
        "annotations": {"note": "y", "sidecar.istio.io/inject": "true"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "registry"}],
        "serviceAccountName": "trainer",
    }
    built = template(podTemplate=section)
    assert built["metadata"]["labels"]["team"] == "x"
    assert built["metadata"]["labels"]["finetune.dev/attempt"] == "1"
    assert built["metadata"]["annotations"] == {"note": "y", "sidecar.istio.io/inject": "true"}
    assert {"key": "gpu", "operator": "Exists"} in built["spec"]["tolerations"]
    assert built["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert built["spec"]["serviceAccountName"] == "trainer"
    assert built["spec"]["automountServiceAccountToken"] is False


def test_a_pytorchjob_is_read_back() -> None:
    manifest = rendered() | {"status": {"conditions": [{"type": "Failed", "status": "True", "message": "m"}]}}
    manifest["metadata"] |= {"uid": "u"}
    observed = parse_pytorchjob(manifest)
    assert (observed.uid, observed.owner_uid, observed.replicas, observed.failed, observed.message) == (
        "u",
        UID,
        2,
        True,
        "m",
    )
    assert not observed.suspended


def test_a_store_with_an_authority_of_its_own_and_the_pods_identity() -> None:
    """The job names no Secret, so no Secret is mounted. The CA file is mounted at the path that the trainer reads."""
    storage = {"uri": "s3://bucket/x", "caConfigMapRef": {"name": "company", "key": "root.pem"}}
    spec = template(storage=storage, podTemplate={"serviceAccountName": "trainer"})["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["name"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert "storage-credentials" not in volumes
    assert "storage-credentials" not in mounts
    assert spec["serviceAccountName"] == "trainer"
    assert volumes["storage-ca"]["configMap"] == {
        "name": "company",
        "defaultMode": 0o440,
        "items": [{"key": "root.pem", "path": PurePosixPath(STORAGE_CA_FILE).name}],
    }
    assert mounts["storage-ca"]["mountPath"] == str(PurePosixPath(STORAGE_CA_FILE).parent)


IDENTITY = {"uri": "s3://finetune/runs", "identity": {"audience": "minio"}}


def pods() -> list[dict[str, Any]]:
    """Return the specs of the training pods of five jobs, and then those of their preflight pods. The first job is
    plain, and the second has `storage.identity`. The third has a claim as `storage.cache` and an emptyDir of a given
    size as `resources.scratch`. The fourth has an ephemeral volume for each of the two, and the fifth has network
    devices."""
    check = PreflightSpec(number=1, name="check", image="trainer:1")
    storage = {"uri": "s3://finetune/runs"}
    shared = {"storage": storage | {"cache": {"claimName": "models"}}, "resources": {"scratch": {"size": "9Gi"}}}
    volume = {"size": "9Gi", "storageClassName": "fast"}
    own = {"storage": storage | {"cache": {"ephemeral": volume}}, "resources": {"scratch": volume}}
    devices = {"resources": NETWORK["resources"]}
    specs: list[dict[str, Any]] = [{}, {"storage": IDENTITY}, shared, own, devices]
    training: list[dict[str, Any]] = [template(**spec)["spec"] for spec in specs]
    return training + [build_preflight_pod(job(**spec), check)["spec"] for spec in specs]


def test_no_pod_has_a_token_for_the_api_server() -> None:
    for spec in pods():
        assert spec["automountServiceAccountToken"] is False
        tokens = [
            source["serviceAccountToken"]
            for volume in spec["volumes"]
            for source in volume.get("projected", {}).get("sources", [])
            if "serviceAccountToken" in source
        ]
        assert all(token["audience"] in (report_audience(UID), "minio") for token in tokens)


def test_the_pods_ask_for_nothing_that_restricted_forbids() -> None:
    for spec in pods():
        assert {"hostNetwork", "hostPID", "hostIPC", "hostUsers", "initContainers"}.isdisjoint(spec)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert all("hostPort" not in port for port in container.get("ports", []))
        kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "secret", "projected", "emptyDir", "persistentVolumeClaim", "csi", "ephemeral"}


if __name__ == "__main__":
    GOLDEN.write_text(text(), encoding="utf-8")

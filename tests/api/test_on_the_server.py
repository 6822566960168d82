"""The real API server accepts the CRD and the examples, and refuses bad values with a message. `kubectl get` shows the
columns that the CRD defines, and `kubectl explain` shows the descriptions of the fields."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_core.api.crd import CRD_FILE
from finetune_core.validation.validate_job import validate_job, validate_spec
from tests.api.conftest import CRD
from tests.api.server import NAMESPACE, Server
from tests.api.strategies import PLACES_WITH_FIELDS
from tests.api.test_agreement import document
from tests.cluster import Cluster
from tests.cluster.waiting import wait_for
from tests.core.jobs import EXAMPLES, quickstart

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

COLUMNS = ["NAME", "MODEL", "METHOD", "STATE", "STEP", "OF", "LOSS", "PERPLEXITY", "CHECKPOINT", "AGE"]


def test_it_installs_without_a_warning(cluster: Cluster, server: Server) -> None:
    kubectl = cluster.layout.programs / "kubectl"
    command: list[str | Path] = [
        kubectl,
        "apply",
        "--server-side",
        "--force-conflicts",
        "--warnings-as-errors",
        "-f",
        "-",
    ]
    done = cluster.run(command, stdin=CRD.read_text(encoding="utf-8"))
    assert done.stderr == ""
    conditions = {
        condition["type"]: condition["status"]
        for condition in cluster.get("crd", "finetunejobs.finetune.dev")["status"]["conditions"]
    }
    assert conditions["Established"] == "True"
    assert conditions.get("NonStructuralSchema", "False") == "False"
    assert CRD.name == CRD_FILE


def test_every_field_is_explained(cluster: Cluster, server: Server) -> None:
    explain: list[str | Path] = [cluster.layout.programs / "kubectl", "explain", "ftj.spec", "--recursive"]
    # The test waits, because the API server publishes the schema of a new CRD some seconds after it serves the CRD.
    wait_for("the schema to be published", lambda: cluster.run(explain, check=False).returncode == 0, 60)
    text = cluster.run(explain).stdout
    for path in PLACES_WITH_FIELDS:
        assert re.search(rf"^\s+{path[-1]}\t", text, re.MULTILINE), path
    for section in (
        "spec",
        "spec.training.learningRate",
        "spec.podTemplate.volumes.csi",
        "status.progress",
        "status.plan",
    ):
        explained = cluster.kubectl("explain", f"ftj.{section}")
        assert "<empty>" not in explained


def test_columns(cluster: Cluster, server: Server) -> None:
    server.create(json.dumps(document(quickstart()["spec"])), keep=True)
    hub = quickstart("model", {"huggingFace": {"repo": "meta-llama/Llama-2-7b-hf"}, "addedTokens": ["<A>"]})
    hub["metadata"] = {"name": "hub"}
    server.create(json.dumps(hub), keep=True)
    status = yaml.safe_load((EXAMPLES.parent / "tests/cli/jobs/running.yaml").read_text(encoding="utf-8"))
    cluster.kubectl(
        "patch", "ftj", "hub", "-n", NAMESPACE, "--subresource=status", "--type=merge", "-p", json.dumps(status)
    )
    try:
        narrow = cluster.kubectl("get", "ftj", "-n", NAMESPACE).splitlines()
        assert narrow[0].split() == [
            "NAME",
            "MODEL",
            "METHOD",
            "STATE",
            "STEP",
            "OF",
            "LOSS",
            "PERPLEXITY",
            "CHECKPOINT",
            "AGE",
        ]
        assert narrow[1].split()[:3] == ["generated", "s3://finetune/models/smollm2-135m", "LoRA"]
        assert narrow[2].split()[:9] == [
            "hub",
            "meta-llama/Llama-2-7b-hf",
            "LoRA",
            "Running",
            "40",
            "100",
            "0.0051",
            "1.0231",
            "40",
        ]
        wide = cluster.kubectl("get", "finetunejob", "-n", NAMESPACE, "-o", "wide").splitlines()
        assert wide[0].split()[-3:] == ["ATTEMPTS", "ARTIFACT", "MESSAGE"]
    finally:
        server.remove("generated")
        server.remove("hub")


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_accepted(server: Server, path: Path) -> None:
    manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    answer = server.create(json.dumps(manifest))
    assert answer.accepted, answer.message
    assert answer.spec == validate_spec(manifest["spec"]).stored


REFUSED: list[tuple[str, Any, str]] = [
    ("lora.rank", 0, "spec.lora.rank: Invalid value: 0: spec.lora.rank in body should be greater than or equal to 1"),
    ("lora.dropout", "1", "`dropout` must be at least 0 and less than 1"),
    ("lora.loraPlusRatio", "0.99", "`loraPlusRatio` must be at least 1"),
    ("method", "Full", "`lora` must be absent unless `method` is LoRA"),
    ("model.volume", {"claimName": "a", "path": "b"}, "exactly one of `huggingFace`, `s3`, `volume` must be set"),
    (
        "dataset.train",
        {"s3": {"uri": "s3://bucket/a.jsonl"}, "mix": [{"s3": {"uri": "s3://bucket/b.jsonl"}}]},
        "exactly one of `huggingFace`, `s3`, `volume`, `mix` must be set",
    ),
    (
        "dataset.train",
        {"mix": [{"s3": {"uri": "s3://bucket/a"}, "weight": "1"}, {"s3": {"uri": "s3://bucket/b"}}]},
        "`weight` must be set in all sources of `mix` or in none",
    ),
    ("dataset.train", {"mix": [{"s3": {"uri": "s3://bucket/a"}, "weight": "0.0"}]}, "spec.dataset.train.mix[0].weight"),
    ("dataset.train.s3.uri", "s3://bucket/../x", "must not have `.` or `..` as a part of its path"),
    ("dataset.train", {"huggingFace": {"repo": "a/b"}}, "exactly one of `split`, `path` must be set"),
    (
        "dataset.train",
        {"huggingFace": {"repo": "a/b", "path": "x", "subset": "y"}},
        "`subset` must be absent unless `split` is set",
    ),
    ("storage.cache", {"claimName": "a", "ephemeral": {"size": "9Gi"}}, "exactly one of `claimName`, `ephemeral` must"),
    ("storage.cache", {"ephemeral": {"size": "9"}}, "spec.storage.cache.ephemeral.size"),
    ("dataset.longRows", "Split", "`longRows` must be Fail or Skip unless `format.text` is set"),
    ("training.epochs", 3, "exactly one of `epochs`, `maxSteps` must be set"),
    ("training.learningRate", "0.0", "`learningRate` must be greater than 0 and at most 1"),
    ("training.warmupSteps", 101, "`warmupSteps` must be at most `maxSteps`"),
    ("training.gradientAccumulationSteps", 3, "`training.globalBatchSize` must be `training.microBatchSize` x"),
    (
        "deepspeed",
        {"zeroStage": 2, "offloadParameters": "CPU"},
        "`offloadParameters` must be None unless `zeroStage` is 3",
    ),
    (
        "deepspeed",
        {"zeroStage": 0},
        "`deepspeed.zeroStage` must be 1, 2, 3, None or Auto unless `training.precision` is fp32",
    ),
    ("deepspeed", {"zeroStage": "None", "offloadOptimizer": "CPU"}, "`offloadOptimizer` must be None unless"),
    ("deepspeed", {"zeroStage": "None", "overrides": "{}"}, "`overrides` must be absent with `zeroStage` None"),
    ("deepspeed.zeroStage", "1", "spec.deepspeed.zeroStage"),
    ("deepspeed", {"zeroStage": 0, "offloadOptimizer": "CPU"}, "`offloadOptimizer` must be None unless `zeroStage` is"),
    ("resources.device", "GPU", "`gpusPerNode` must be at least 1 unless `device` is CPU"),
    ("resources.memory", "1Mi", "spec.resources.memory"),
    ("resources.cpu", "0", "spec.resources.cpu"),
    ("runPolicy.activeDeadlineSeconds", 59, "spec.runPolicy.activeDeadlineSeconds"),
    ("dataset.format.promptCompletion.template", "no place", "`template` must hold a column of the row"),
    ("dataset.format.promptCompletion.template", "{{prompt}}", "`template` must hold a column of the row"),
    ("dataset.format.promptCompletion.template", "{prompt", "`template` must name a column in each pair of braces"),
    ("dataset.format.promptCompletion.template", "{prompt}{}", "`template` must name a column in each pair of braces"),
    ("dataset.format.promptCompletion.completion", "}{a}", "`completion` must name a column in each pair of braces"),
    ("dataset.format.promptCompletion.completion", "", "`completion` must hold a column of the row"),
    ("evaluation.patience", 0, "spec.evaluation.patience"),
    ("podTemplate.env", [{"name": "FTJ_NAME", "value": "x"}], "`name` must not be HOME or begin with FTJ_"),
    ("podTemplate.env", [{"name": "A"}], "exactly one of `value`, `valueFrom` must be set"),
    ("podTemplate.labels", {"-a": "b"}, "`labels` must have keys such as `team`"),
    (
        "podTemplate.volumes",
        [{"name": "a", "mountPath": "/etc/finetune/x", "emptyDir": {}}],
        "`mountPath` must not be /etc/finetune",
    ),
    (
        "podTemplate.volumes",
        [{"name": "a", "mountPath": "/x", "emptyDir": {}}, {"name": "b", "mountPath": "/x", "emptyDir": {}}],
        "`volumes` must have different `mountPath`s",
    ),
    ("podTemplate.tolerations", [{"effect": "NoExecute"}], "`operator` must be Exists unless `key` is set"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), REFUSED, ids=[f"{path}={value}"[:60] for path, value, _ in REFUSED]
)
def test_a_bad_value_is_refused_with_a_sentence(server: Server, path: str, value: Any, message: str) -> None:
    answer = server.create(json.dumps(document(quickstart(path, value)["spec"])))
    assert answer.status == 422
    assert message in answer.message
    assert validate_spec(quickstart(path, value)["spec"]).stored is None


@pytest.mark.parametrize("name", ["Quick", "1st", "a.b", "a" * 41, "a-"])
def test_a_bad_name_is_refused(server: Server, name: str) -> None:
    manifest = document(quickstart()["spec"])
    manifest["metadata"]["name"] = name
    answer = server.create(json.dumps(manifest))
    assert answer.status == 422
    assert "metadata.name" in answer.message


METADATA: list[dict[str, Any]] = [
    {"labels": {"team": "a", "example.com/team": "", "a": None}},
    {"labels": {"-a": "b"}},
    {"labels": {"a": "b c"}},
    {"labels": {"a": "x" * 64}},
    {"labels": {"a": 1}},
    {"labels": {"A/b": "c"}},
    {"labels": {"example.com/": "c"}},
    {"labels": []},
    {"annotations": {"Note.Example/A": "any text ü"}},
    {"annotations": {"a b": "c"}},
    {"annotations": {"a": True}},
    {"annotations": {"a": "x" * 262_144}},
    {"annotations": {"a": None}},
    {"labels": None, "annotations": None},
    {"lables": {"a": "b"}},
    {"name": None},
    {"name": 7},
    {"finalizers": []},
]


@pytest.mark.parametrize("metadata", METADATA, ids=lambda value: str(value)[:40])
def test_metadata_is_judged_alike(server: Server, metadata: dict[str, Any]) -> None:
    manifest = document(quickstart()["spec"])
    manifest["metadata"] |= metadata
    answer, verdict = server.create(json.dumps(manifest)), validate_job(manifest)
    assert answer.accepted == (verdict.stored is not None), (answer.message, [str(item) for item in verdict.problems])

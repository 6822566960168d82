"""The quickstart with the real base model, from `kubectl apply` to an adapter that peft loads without code of this
project. Two further tests use a tiny model: the operator changes nothing in the spec of a job, and the model of a full
fine-tuning is judged by the scores that the job requires."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo import steps
from examples.demo.base_model import base_model
from finetune_cli.state import condition
from finetune_core.api.conditions import ConditionType
from finetune_core.api.job import FineTuneJob
from finetune_core.api.status import RequirementStatus
from tests.cluster import Cluster
from tests.e2e.bucket import RunFolder
from tests.e2e.jobs import STARTED_SECONDS, MakeJob

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

DATA = Path(os.environ.get("FINETUNE_TEST_DATA", steps.REPOSITORY.parent / "shared" / "data"))
VALIDATION_ROWS = 24
TRAINING_STEPS = 20
ROWS_PER_STEP = 8

LOAD_ADAPTER = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
lora = {n: p for n, p in model.named_parameters() if "lora_B" in n}
print(json.dumps({"adapters": len(lora), "trained": sum(bool(p.abs().sum() > 0) for p in lora.values())}))
"""


def _viggo(split: str, rows: int | None) -> bytes:
    """Return, as CSV, the header of the ViGGO file of ``split`` and its first ``rows`` rows, or all rows if ``rows`` is
    None. The columns are mr and ref."""
    lines = (DATA / "viggo" / f"viggo-{split}.csv").read_bytes().splitlines(keepends=True)
    return b"".join(lines[: rows + 1 if rows else None])


def _quickstart(cluster: Cluster, name: str) -> dict[str, object]:
    """Return the manifest of examples/quickstart.yaml with fewer steps. If the data set ViGGO is on this machine,
    upload rows of it and let the job train on them; otherwise the job trains on generated rows."""
    changes: dict[str, object] = {
        "metadata__name": name,
        "spec__training__maxSteps": TRAINING_STEPS,
        "spec__training__globalBatchSize": ROWS_PER_STEP,
        "spec__evaluation__everySteps": TRAINING_STEPS // 2,
        "spec__storage__checkpoint__everySteps": TRAINING_STEPS // 2,
    }
    if (DATA / "viggo").is_dir():
        steps.put_file(cluster, "data/viggo/train.csv", _viggo("train", None))
        steps.put_file(cluster, "data/viggo/validation.csv", _viggo("valid", VALIDATION_ROWS))
        changes |= {
            "spec__dataset__train": {"s3": {"uri": f"s3://{steps.BUCKET}/data/viggo/train.csv"}},
            "spec__dataset__validation": {"s3": {"uri": f"s3://{steps.BUCKET}/data/viggo/validation.csv"}},
            "spec__dataset__maxLength": 256,
            "spec__dataset__format__promptCompletion": {
                "promptField": "ref",
                "completionField": "mr",
                "template": "Sentence: {prompt}\nMeaning:",
                "completion": " {completion}",
            },
        }
    return steps.manifest_of(Path("examples/quickstart.yaml"), **changes)


def _assert_learned(job: FineTuneJob) -> None:
    assert job.status is not None
    losses = [float(point.loss) for point in job.status.history if point.loss is not None]
    perplexities = [float(point.perplexity) for point in job.status.history if point.perplexity is not None]
    assert losses[-1] < losses[0] / 2, losses
    assert perplexities[-1] < perplexities[0], perplexities
    assert all(1 < value < 1000 for value in perplexities), perplexities


def test_quickstart_ends_with_an_adapter_that_peft_loads(installed: Cluster, namespace: str, tmp_path: Path) -> None:
    cluster = installed
    steps.put_base_model(cluster, base_model())
    steps.apply(cluster, _quickstart(cluster, "quickstart"), namespace)
    seen: list[FineTuneJob] = []

    def running(job: FineTuneJob) -> bool:
        seen.append(job)
        return job.status is not None and job.status.progress is not None and job.status.progress.step > 0

    # The wait is long, because it includes the pull of the trainer's image (several gigabytes) unless an earlier test
    # has pulled it.
    during = steps.wait_for_job(cluster, namespace, "quickstart", "a first step", running, 300)
    assert during.status is not None
    assert {condition.type for condition in during.status.conditions} == set(ConditionType)
    job = steps.wait_for_condition(cluster, namespace, "quickstart", ConditionType.SUCCEEDED, timeout=900)

    assert job.status is not None
    assert job.status.attempts.started == 1
    assert job.status.progress is not None
    assert job.status.progress.percentage == 100
    _assert_learned(job)
    artifact = job.status.artifact
    assert artifact is not None
    best = [checkpoint for checkpoint in job.status.checkpoints if checkpoint.best]
    assert [checkpoint.step for checkpoint in best] == [artifact.step]
    evaluation = job.status.evaluation
    assert evaluation is not None
    assert evaluation.base is not None
    assert evaluation.tuned is not None
    assert (evaluation.rows, evaluation.tuned_step) == ("Validation", artifact.step)
    # The tuned model was made from the best checkpoint. Its perplexity must therefore equal the perplexity that was
    # measured for this checkpoint during training.
    assert float(evaluation.tuned.perplexity or 0) == pytest.approx(float(best[0].perplexity or 0), rel=0.01)
    assert float(evaluation.base.perplexity or 0) > float(evaluation.tuned.perplexity or 0)

    target = tmp_path / "adapter"
    command = [sys.executable, "-m", "finetune_cli", "download", "quickstart", "-n", namespace, "-o", str(target)]
    cluster.run([*command, "--endpoint", cluster.minio.endpoint], timeout=120)
    output = subprocess.run(
        [sys.executable, "-c", LOAD_ADAPTER, str(base_model()), str(target)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    adapters = json.loads(output.splitlines()[-1])
    # Every adapter is trained. There are 210, because the base model has 30 layers with 7 linear layers each.
    assert adapters["adapters"] == adapters["trained"] == 210

    with cluster.enter():
        run = RunFolder(cluster, f"s3://{steps.BUCKET}/runs/{namespace}/quickstart/{job.metadata.uid}")
        assert run.pointer()["manifestSha256"] == artifact.manifest_sha256
        assert len(run.verified("artifacts")) == 1
        committed = {folder.manifest.step for folder in run.verified("checkpoints")}
        assert committed == {checkpoint.step for checkpoint in job.status.checkpoints}


def test_the_spec_stays_as_it_was_applied(installed: Cluster, namespace: str, tiny_job: MakeJob) -> None:
    manifest = tiny_job("untouched", spec__training__maxSteps=2)
    steps.apply(installed, manifest, namespace)
    before = installed.get("ftj", "untouched", "-n", namespace)
    steps.wait_for_condition(installed, namespace, "untouched", ConditionType.SUCCEEDED, timeout=300)
    after = installed.get("ftj", "untouched", "-n", namespace)
    assert after["spec"] == before["spec"]
    assert after["metadata"]["annotations"] == before["metadata"]["annotations"]
    assert "finalizers" not in after["metadata"]
    assert after["metadata"]["generation"] == 1


def test_full_fine_tuning_ends_with_a_model_that_is_judged_by_its_scores_and_later_by_stricter_ones(
    installed: Cluster, namespace: str, tiny_job: MakeJob
) -> None:
    better, perfect = ({"score": "perplexity", **bound} for bound in ({"betterThanBase": True}, {"atMost": "1"}))
    manifest = tiny_job("full", spec__method="Full", spec__deepspeed={"zeroStage": 2}, spec__training__maxSteps=20)
    del manifest["spec"]["lora"]
    manifest["spec"]["evaluation"] = {"everySteps": 20, "require": [better]}
    steps.apply(installed, manifest, namespace)
    job = steps.wait_for_condition(installed, namespace, "full", ConditionType.SUCCEEDED, timeout=300)
    with installed.enter():
        run = RunFolder(installed, f"s3://{steps.BUCKET}/runs/{namespace}/full/{job.metadata.uid}")
        (artifact,) = run.verified("artifacts")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in artifact.manifest.files}
    (reached,) = _judged(job)
    assert reached.passed
    assert float(reached.base or 0) > float(reached.tuned or 0) > 1

    # A job that requires more is judged by the scores of the same training.
    steps.delete_job(installed, namespace, "full")
    manifest["spec"]["evaluation"]["require"] = [better, perfect]
    steps.apply(installed, manifest, namespace)
    stricter = steps.wait_for_condition(
        installed, namespace, "full", ConditionType.SUCCEEDED, "False", timeout=STARTED_SECONDS
    )
    ended = condition(stricter, ConditionType.SUCCEEDED)
    assert ended is not None
    assert ended.reason == "GateFailed", ended
    assert job.status is not None
    assert stricter.status is not None
    assert (stricter.status.attempts.started, stricter.status.artifact) == (0, job.status.artifact)
    again, unreached = _judged(stricter)
    assert again == reached
    assert (unreached.tuned, unreached.passed) == (reached.tuned, False)


def _judged(job: FineTuneJob) -> list[RequirementStatus]:
    """Return the judgements in the status of ``job``, one for each required score. Assert that the status shows the
    evaluation as passed exactly if all required scores are passed."""
    assert job.status is not None
    evaluation = job.status.evaluation
    assert evaluation is not None
    assert evaluation.passed is all(found.passed for found in evaluation.requirements)
    return evaluation.requirements

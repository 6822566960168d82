"""Property tests of the pods of any job that the API server accepts: the API server also accepts the pods, as far as
their volumes go."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_core.api import FineTuneJob
from finetune_core.api.pod_template import RESERVED_FOLDERS
from finetune_operator.objects.backends.pytorchjob import build_pytorchjob
from finetune_operator.objects.preflight_pod import PreflightSpec, build_preflight_pod
from tests.api.strategies import SchemaPath, jobs
from tests.operator.builders import job_manifest
from tests.operator.test_pytorchjob import attempt_spec

MOUNTED: tuple[SchemaPath, ...] = (
    ("storage", "caConfigMapRef"),
    ("storage", "credentialsSecretRef"),
    ("storage", "identity"),
    ("storage", "cache"),
    ("model", "huggingFace", "tokenSecretRef"),
    ("model", "volume"),
    ("podTemplate", "volumes"),
    ("dataset", "train", "mix"),
)
"""Fields that bring volumes into the pods."""
PREFLIGHT = PreflightSpec(number=1, name="quickstart-preflight", image="trainer:1")


def problems(pod: dict[str, Any], own: set[str]) -> list[str]:
    """Return the faults in the volumes and mounts of the pod spec ``pod``: what the API server would refuse, and each
    mount outside of `RESERVED_FOLDERS` whose path is not in ``own``, the paths of the mounts that the job asks for."""
    names = [volume["name"] for volume in pod["volumes"]]
    mounts = pod["containers"][0]["volumeMounts"]
    paths = [mount["mountPath"] for mount in mounts]
    return [
        *(f"two volumes {name}" for name in set(names) if names.count(name) > 1),
        *(f"two mounts at {path}" for path in set(paths) if paths.count(path) > 1),
        *(f"no volume {mount['name']}" for mount in mounts if mount["name"] not in names),
        *(f"{path} is not reserved" for path in paths if path not in own and not is_reserved(path)),
    ]


def is_reserved(path: str) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in RESERVED_FOLDERS)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(spec=st.sampled_from(MOUNTED).flatmap(jobs))
def test_the_volumes_of_any_job_have_names_and_places_of_their_own(spec: dict[str, Any]) -> None:
    own = {volume["mountPath"] for volume in spec.get("podTemplate", {}).get("volumes", [])}
    job = FineTuneJob.model_validate(job_manifest() | {"spec": spec})
    child = build_pytorchjob(job, attempt_spec())
    assert problems(child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"], own) == []
    assert problems(build_preflight_pod(job, PREFLIGHT)["spec"], own) == []

"""Builds the volumes for the scratch folder and for `storage.cache` of a training pod, and computes the request and the
limit of `ephemeral-storage` of its container.

The functions are pure. `pod_template.py` calls `disk_amounts`, `disk_volumes` and `cache_mounts`. The preflight check
needs `model_room` (`observe/observer.py`) and `quantity` (`decide/preflight.py`). `act/attempt_objects.py` calls
`sizes_of_inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from finetune_core.api import FineTuneJob
from finetune_core.api.method import DEFAULT_RANK, LoRASpec, Method
from finetune_core.api.resources import MEBIBYTE
from finetune_core.api.status import PreflightStatus
from finetune_core.contract import MODEL_CACHE_FOLDER, MODEL_VOLUME_FOLDER
from finetune_core.contract.preflight_result import InputSizes
from finetune_core.planning.scratch import BASE_BYTES, ScratchNeed, scratch_need
from finetune_core.validation.runnable import to_bytes
from finetune_operator.kube.manifest import Manifest

SCRATCH_VOLUME: Final = "scratch"
MODEL_CACHE_VOLUME: Final = "model-cache"
MODEL_VOLUME: Final = "model"
EPHEMERAL_STORAGE: Final = "ephemeral-storage"
ROOM_BESIDE_SCRATCH = 2048 * MEBIBYTE
"""Bytes of `ephemeral-storage` for `/tmp` and the logs, in addition to those for the scratch folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRoom:
    """The volume on which a training pod puts the files of the base model, for a job that states the volume's size."""

    field: str
    """Path in the spec of the volume's size, for example `resources.scratch.size`."""
    bytes: int


def model_room(job: FineTuneJob) -> ModelRoom | None:
    """Return the volume for the files of the base model. None where the job states no size for this volume, or where
    the model is used where it lies."""
    scratch, cache = job.spec.resources.scratch, job.spec.storage.cache
    if job.spec.model.volume is not None:
        return None
    if cache is not None and cache.ephemeral is not None:
        return ModelRoom(field="storage.cache.ephemeral.size", bytes=to_bytes(cache.ephemeral.size))
    return ModelRoom(field="resources.scratch.size", bytes=to_bytes(scratch.size)) if scratch is not None else None


def sizes_of_inputs(preflight: PreflightStatus | None) -> InputSizes | None:
    """Return the sizes of model and data that the preflight check has recorded; None where it recorded no sizes.

    ``preflight`` is the job's `status.preflight`.
    """
    if preflight is None or preflight.model_bytes is None or preflight.data_bytes is None:
        return None
    return InputSizes(model_bytes=preflight.model_bytes, data_bytes=preflight.data_bytes)


def disk_amounts(job: FineTuneJob, sizes: InputSizes | None) -> tuple[Manifest, Manifest]:
    """Return the request and the limit of `ephemeral-storage` of the training container, as two mappings.

    ``sizes`` are the sizes of model and data; None where they are not known. Without these sizes and without
    `resources.scratch` there is no limit, and the second mapping is empty.
    """
    scratch = job.spec.resources.scratch
    if scratch is not None:
        on_node = to_bytes(scratch.size) if scratch.storage_class_name is None else 0
        amount = {EPHEMERAL_STORAGE: quantity(on_node + ROOM_BESIDE_SCRATCH)}
        return amount, amount
    if (need := _need(job, sizes)) is not None:
        return {EPHEMERAL_STORAGE: f"{need.request_gibibytes}Gi"}, {EPHEMERAL_STORAGE: f"{need.limit_gibibytes}Gi"}
    return {EPHEMERAL_STORAGE: quantity(BASE_BYTES)}, {}


def disk_volumes(job: FineTuneJob, sizes: InputSizes | None) -> list[Manifest]:
    """Return the volumes for the scratch folder and for `storage.cache`.

    ``sizes`` are the sizes of model and data; None where they are not known.
    """
    scratch, cache = job.spec.resources.scratch, job.spec.storage.cache
    volumes: list[Manifest] = []
    if scratch is None:
        need = _need(job, sizes)
        limit: Manifest = {"sizeLimit": f"{need.limit_gibibytes}Gi"} if need is not None else {}
        volumes.append({"name": SCRATCH_VOLUME, "emptyDir": limit})
    elif scratch.storage_class_name is None:
        volumes.append({"name": SCRATCH_VOLUME, "emptyDir": {"sizeLimit": str(scratch.size)}})
    else:
        volumes.append(_ephemeral(SCRATCH_VOLUME, scratch.size, scratch.storage_class_name))
    if cache is not None and cache.claim_name is not None:
        volumes.append({"name": MODEL_CACHE_VOLUME, "persistentVolumeClaim": {"claimName": cache.claim_name}})
    if cache is not None and cache.ephemeral is not None:
        volumes.append(_ephemeral(MODEL_VOLUME, cache.ephemeral.size, cache.ephemeral.storage_class_name))
    return volumes


def cache_mounts(job: FineTuneJob) -> list[Manifest]:
    """Return the mounts of the volumes of `storage.cache`."""
    cache = job.spec.storage.cache
    if cache is None:
        return []
    if cache.claim_name is not None:
        return [{"name": MODEL_CACHE_VOLUME, "mountPath": MODEL_CACHE_FOLDER}]
    return [{"name": MODEL_VOLUME, "mountPath": MODEL_VOLUME_FOLDER}]


def _need(job: FineTuneJob, sizes: InputSizes | None) -> ScratchNeed | None:
    """Return the scratch space that each training pod of ``job`` needs; None where ``sizes`` is None."""
    if sizes is None:
        return None
    spec = job.spec
    exports_model = spec.method is Method.FULL or spec.storage.artifact in ("Merged", "Both")
    merges_adapter = spec.model.adapter is not None and spec.model.adapter.use == "Merge"
    return scratch_need(
        model_bytes=sizes.model_bytes,
        data_bytes=sizes.data_bytes,
        # The rank of an adapter that the job continues is not known here. The limit has room for a high rank.
        rank=None if spec.method is Method.FULL else (spec.lora or LoRASpec()).rank or DEFAULT_RANK,
        # With `model.addedTokens` the pod also writes a copy of the base model with embedding rows for these tokens.
        # Where `model.adapter.use` is Merge, the pod writes a copy with the changed weights.
        models_written=exports_model + bool(spec.model.added_tokens) + merges_adapter,
        model_is_elsewhere=spec.model.volume is not None
        or (spec.storage.cache is not None and spec.storage.cache.ephemeral is not None),
    )


def _ephemeral(name: str, size: int | str, storage_class: str | None) -> Manifest:
    """Return a generic ephemeral volume: Kubernetes creates and deletes the volume together with the pod."""
    claim: Manifest = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": str(size)}}}
    if storage_class is not None:
        claim["storageClassName"] = storage_class
    return {"name": name, "ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def quantity(amount: int) -> str:
    """Return ``amount`` bytes, rounded up to whole MiB, as a quantity such as "5Gi" or "5121Mi"."""
    mebibytes = -(-amount // MEBIBYTE)
    return f"{mebibytes // 1024}Gi" if mebibytes % 1024 == 0 else f"{mebibytes}Mi"

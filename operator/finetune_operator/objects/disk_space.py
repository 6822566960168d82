"""Builds the volumes on which a training pod writes files: the scratch folder and the volumes of `storage.cache`, with
the request and limit of `ephemeral-storage` that belongs to them. The functions are pure, and `pod_template.py` calls
them.
"""

from __future__ import annotations

from typing import Final

from finetune_core.api import FineTuneJob
from finetune_core.api.method import Method
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
"""Bytes of `ephemeral-storage` in addition to `resources.scratch.size`, for `/tmp` and the logs."""


def sizes_of_inputs(preflight: PreflightStatus | None) -> InputSizes | None:
    """Return the sizes of model and data that the preflight check has found; None where it found none."""
    if preflight is None or preflight.model_bytes is None or preflight.data_bytes is None:
        return None
    return InputSizes(model_bytes=preflight.model_bytes, data_bytes=preflight.data_bytes)


def disk_amounts(job: FineTuneJob, sizes: InputSizes | None) -> tuple[Manifest, Manifest]:
    """Return the request and the limit of `ephemeral-storage` of the training container. ``sizes`` are those of model
    and data, or None where nobody knows them. Without a limit the second mapping is empty."""
    scratch = job.spec.resources.scratch
    if scratch is not None:
        on_node = to_bytes(scratch.size) if scratch.storage_class_name is None else 0
        amount = {EPHEMERAL_STORAGE: _quantity(on_node + ROOM_BESIDE_SCRATCH)}
        return amount, amount
    if (need := _need(job, sizes)) is not None:
        return {EPHEMERAL_STORAGE: f"{need.request_gibibytes}Gi"}, {EPHEMERAL_STORAGE: f"{need.limit_gibibytes}Gi"}
    return {EPHEMERAL_STORAGE: _quantity(BASE_BYTES)}, {}


def disk_volumes(job: FineTuneJob, sizes: InputSizes | None) -> list[Manifest]:
    """Return the volumes for the scratch folder and for `storage.cache`. ``sizes`` are those of model and data, or None
    where nobody knows them."""
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
    """Return the scratch space that follows from ``sizes``, or None without them."""
    if sizes is None:
        return None
    spec = job.spec
    return scratch_need(
        model_bytes=sizes.model_bytes,
        data_bytes=sizes.data_bytes,
        trains_all=spec.method is Method.FULL,
        writes_model=bool(spec.model.added_tokens) or spec.storage.artifact in ("Merged", "Both"),
        merges_adapter=spec.model.adapter is not None and spec.model.adapter.use == "Merge",
        nodes=spec.resources.nodes,
        model_is_elsewhere=spec.model.volume is not None
        or (spec.storage.cache is not None and spec.storage.cache.ephemeral is not None),
    )


def _ephemeral(name: str, size: int | str, storage_class: str | None) -> Manifest:
    """Return a volume that Kubernetes makes for the pod and deletes with it."""
    claim: Manifest = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": str(size)}}}
    if storage_class is not None:
        claim["storageClassName"] = storage_class
    return {"name": name, "ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _quantity(amount: int) -> str:
    """Return ``amount`` bytes as a quantity in GiB, or in MiB where it is no whole number of GiB."""
    mebibytes = -(-amount // MEBIBYTE)
    return f"{mebibytes // 1024}Gi" if mebibytes % 1024 == 0 else f"{mebibytes}Mi"

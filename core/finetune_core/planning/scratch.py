"""Computes how much scratch space a training pod needs, from the sizes of model and data.

The operator's `objects/disk_space.py` makes a request and a limit of `ephemeral-storage` from the result for jobs that
do not set `resources.scratch`.
"""

from __future__ import annotations

from dataclasses import dataclass

GIBIBYTE = 1 << 30
"""Number of bytes in one GiB."""
BASE_BYTES = GIBIBYTE
"""Room for `/tmp`, the logs and all small files. Where the sizes of model and data are not known, only this room is
requested."""
TOKENISED = 2
"""Size of the data files and of the tokens of their rows together, as a multiple of the size of the data files. The
factor is 2, because a token takes 4 bytes, and the text of a token takes about as many."""
FULL_STATE = 6
"""Size of a checkpoint where every parameter is trained, as a multiple of the size of the model in 16 bits. The
checkpoint has three numbers of 32 bits for each parameter: DeepSpeed's master weight and the two moments of AdamW. Each
pod writes only its own share of a checkpoint, but downloads whole checkpoints: the one that it resumes from, and at the
end the one that becomes the artifact."""
ADAPTER_SHARE = 0.1
"""Least size of checkpoint and artifact of a LoRA training together, as a share of the size of the model."""
RANK_SHARE = 1 / 400
"""Size of checkpoint and artifact of a LoRA training together, as a share of the size of the model, where the rank of
the adapters is 1. With rank r the share is r times as large: for a weight with d rows and d columns, an adapter of rank
r has 2 r d numbers. For each of these numbers, three numbers of 32 bits and one of 16 bits are written. The weight
itself has d^2 numbers of 16 bits. The share is thus 14 r / d, and d is about 5,600 in the layers of a model with 7
billion parameters."""
LIMIT_FACTOR = 3
"""Factor by which the request is multiplied for the limit, to which `EXPANSION` and `SPARE_BYTES` add more. The factor
is 3, because a pod that has resumed may hold three checkpoints at once: a downloaded one, one that is being written,
and one that is being uploaded."""
EXPANSION = 20
"""Number of bytes that the limit allows in addition for each byte of a data file, because a compressed file may have
rows with far more tokens than `TOKENISED` assumes."""
SPARE_BYTES = 32 * GIBIBYTE
"""Number of bytes that the limit allows in addition for every pod. The limit must end a pod that fills the node's disk,
but not a training that needs more space than expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScratchNeed:
    """Request and limit of `ephemeral-storage`, in GiB."""

    request_gibibytes: int
    limit_gibibytes: int


def state_share(rank: int | None) -> float:
    """Return the size of a checkpoint as a multiple of the size of the model. For adapters of rank ``rank`` the size of
    the artifact is included. None means that every parameter is trained."""
    return FULL_STATE if rank is None else max(ADAPTER_SHARE, RANK_SHARE * rank)


def scratch_need(
    *,
    model_bytes: int,
    data_bytes: int,
    rank: int | None,
    models_written: int,
    model_is_elsewhere: bool,
) -> ScratchNeed:
    """Return how much scratch space each pod needs.

    ``rank`` is the rank of the adapters, or None where every parameter is trained. ``models_written`` is how many
    models of the base model's size a pod writes, such as a merged model. ``model_is_elsewhere`` says that the files of
    the base model are on a volume, and not in the scratch folder.
    """
    models = (not model_is_elsewhere) + models_written
    state = state_share(rank)
    request = int(BASE_BYTES + (models + state) * model_bytes + TOKENISED * data_bytes)
    limit = SPARE_BYTES + LIMIT_FACTOR * request + EXPANSION * data_bytes
    return ScratchNeed(request_gibibytes=-(-request // GIBIBYTE), limit_gibibytes=-(-limit // GIBIBYTE))

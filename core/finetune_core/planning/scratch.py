"""Computes how much scratch space a training pod needs, from the sizes of model and data.

The operator's pod template makes a request and a limit of `ephemeral-storage` from the result, where a job sets no
`resources.scratch`.
"""

from __future__ import annotations

from dataclasses import dataclass

GIBIBYTE = 1 << 30
"""Number of bytes in one GiB."""
BASE_BYTES = GIBIBYTE
"""Room for `/tmp`, the logs and all small files. It is all that is requested where the sizes are not known."""
TOKENISED = 2
"""Data files and the tokens of their rows together, as a multiple of the files. A token takes 4 bytes, and so does the
text of a token on average."""
FULL_STATE = 6
"""A checkpoint of a full training, as a multiple of a model in 16 bits: three numbers of 32 bits for each parameter
(DeepSpeed's master weights and the two moments of AdamW)."""
ADAPTER_SHARE = 0.1
"""Checkpoint and artifact of a LoRA training, as a share of the model. Adapters of rank 64 on all layers with their
moments are about a twentieth."""
LIMIT_FACTOR = 3
"""The limit as a multiple of the request: a pod that resumes has a downloaded checkpoint, one that is being written and
one that is being uploaded."""
EXPANSION = 20
"""Bytes of tokens for each byte of a data file in the limit. Compressed rows may expand so far."""
SPARE_BYTES = 32 * GIBIBYTE
"""What the limit leaves in addition. The limit is to end a pod that fills the node's disk, and no training that is
larger than expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScratchNeed:
    """Request and limit of `ephemeral-storage`, in GiB."""

    request_gibibytes: int
    limit_gibibytes: int


def scratch_need(
    *,
    model_bytes: int,
    data_bytes: int,
    trains_all: bool,
    writes_model: bool,
    merges_adapter: bool = False,
    nodes: int,
    model_is_elsewhere: bool,
) -> ScratchNeed:
    """Return how much scratch space each of ``nodes`` pods needs.

    ``trains_all`` says that every parameter is trained and not only adapters, and ``writes_model`` that a pod writes a
    model of the base model's size: an extended base model or a merged one. ``merges_adapter`` says that the pod writes
    a copy of the base model with an adapter merged into it before it trains. ``model_is_elsewhere`` says that the base
    model lies on a volume and not in the scratch folder.
    """
    models = (not model_is_elsewhere) + (trains_all or writes_model) + merges_adapter
    state = FULL_STATE / nodes if trains_all else ADAPTER_SHARE
    request = int(BASE_BYTES + (models + state) * model_bytes + TOKENISED * data_bytes)
    limit = SPARE_BYTES + LIMIT_FACTOR * request + EXPANSION * data_bytes
    return ScratchNeed(request_gibibytes=-(-request // GIBIBYTE), limit_gibibytes=-(-limit // GIBIBYTE))

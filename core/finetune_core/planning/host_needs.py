"""Computes what a training pod needs beside its GPUs: memory of the host, CPUs and scratch space, and how large
checkpoints and artifacts are.

`job_plan.py` calls `host_needs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_core.planning.gpu_types import GIBIBYTE
from finetune_core.planning.scratch import ScratchNeed, scratch_need
from finetune_core.planning.training_setup import TrainingSetup

PROCESS_BYTES = 3 * GIBIBYTE
"""Memory of the host that a training process takes on a GPU before it holds any weight: Python, the libraries, and what
the CUDA driver maps."""
LAUNCHER_BYTES = GIBIBYTE
"""Memory of the launcher, and of the tokenised rows that all ranks of the node share."""
SNAPSHOTS = 3
"""Copies of the training state that a rank may hold at once: one that is uploaded, one that waits, and one that is
taken (`checkpoints/saver.py` of the trainer)."""
STATE_BYTES = 12
"""Bytes of a checkpoint for each trained parameter: the fp32 value and both moments of AdamW."""
CPUS_PER_GPU = 8
"""CPUs for each training process: Python, autograd's thread, NCCL's threads, and the preparation of batches."""
SPARE = 1.1
"""Factor for what the figures do not count, such as the page cache that the files of the model need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostNeeds:
    """What one pod needs beside its GPUs."""

    memory: int
    """Bytes of memory, with /dev/shm."""
    loading: int
    """Of it, the bytes while the processes load the model."""
    snapshots: int
    """Of it, the bytes of the copies of the training state during the training."""
    offloaded: int
    """Of it, the bytes of optimizer state and weights that were moved out of the GPUs."""
    cpus: int
    scratch: ScratchNeed
    checkpoint: int
    """Bytes of a checkpoint of the whole job in the bucket."""
    artifact: int
    """Bytes of the artifact in the bucket: the adapter, or the model."""


def host_needs(
    setup: TrainingSetup,
    *,
    shared_memory: int,
    data_bytes: int = 0,
    models_written: int | None = None,
    model_is_elsewhere: bool = False,
) -> HostNeeds:
    """Return what one pod of ``setup`` needs. ``shared_memory`` is the size of /dev/shm in bytes, and ``data_bytes``
    that of the files with the rows. ``models_written`` is how many models of the base model's size the job publishes;
    None: one where every parameter is trained, else none. ``model_is_elsewhere`` says that the files of the model are
    on a volume."""
    ranks = setup.processes_per_node
    width = setup.number_format.bytes
    model = setup.base_parameters * width
    adapters = setup.adapters
    # At stages below 3 every process builds the whole model in the memory of the host before it goes to the GPU. Under
    # ZeRO-3 the weights are copied out of mapped files, one after the other.
    loading = ranks * (model if setup.zero_stage != 3 else model // setup.processes)
    state = STATE_BYTES * setup.trained_parameters
    snapshots = SNAPSHOTS * state * ranks // setup.processes
    offloaded = 0
    if setup.offload_optimizer:
        # The fp32 values, both moments and the gradients in fp32.
        offloaded += 16 * setup.trained_parameters * ranks // setup.processes
    if setup.offload_parameters:
        offloaded += width * setup.parameters * ranks // setup.processes
    memory = LAUNCHER_BYTES + ranks * PROCESS_BYTES + max(loading, snapshots) + offloaded + shared_memory
    written = (1 if adapters is None else 0) if models_written is None else models_written
    scratch = scratch_need(
        model_bytes=model,
        data_bytes=data_bytes,
        rank=adapters.rank if adapters is not None else None,
        models_written=written,
        model_is_elsewhere=model_is_elsewhere,
    )
    artifact = model if adapters is None else adapter_bytes(setup)
    return HostNeeds(
        memory=int(memory * SPARE),
        loading=loading,
        snapshots=snapshots,
        offloaded=offloaded,
        cpus=CPUS_PER_GPU * ranks,
        scratch=scratch,
        checkpoint=state,
        artifact=artifact,
    )


def adapter_bytes(setup: TrainingSetup) -> int:
    """Return the bytes of the published adapter of ``setup``: its parameters in the number format of the training, and
    the rows of the added tokens of both embeddings."""
    assert setup.adapters is not None
    rows = setup.added_rows * setup.sizes.hidden * (1 if setup.sizes.tied else 2)
    return (setup.adapters.parameters + rows) * setup.number_format.bytes


def quantized_bytes(setup: TrainingSetup) -> int:
    """Return the bytes that the linear layers of a base model in NF4 take: half a byte for each number, and a scale of
    8 bits for each 64 numbers, whose own scales take 32 bits for each 256 scales (Dettmers et al. 2023, arXiv
    2305.14314)."""
    return int(setup.sizes.quantizable * (0.5 + 1 / 64 + 4 / (64 * 256)))

"""Time limits that grow with the bytes of a job and with its number of nodes.

A fixed limit is right for small models only: a merged model of 140 GB takes longer than 20 minutes to upload at
100 MB/s, and the other ranks would give up after the whole training. The same holds for a million conversations, which
one process of each node makes into examples while all others wait. The launcher computes the limits once it has
fetched model and data (`sources/inputs.py` measures them), takes the limit for the other pods, and passes all limits to
the workers. `ranks/gang.py` takes the limit for the work of one rank for which the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_trainer.pod.settings import PEER_WAIT_SECONDS, STORE_BUDGET_SECONDS

NODE_BYTES_PER_SECOND = 25e6
"""The slowest transfer between a node and the store that a limit allows for: a fifth of a link of 1 Gbit/s."""
STORE_BYTES_PER_SECOND = 500e6
"""The slowest transfer of the store to or from all nodes together that a limit allows for: half of a link of
10 Gbit/s."""
DISK_BYTES_PER_SECOND = 100e6
"""The slowest disk that a limit allows for, in bytes per second. Making a file of a model reads or writes its bytes
three times at most: the weights are read, and the file is written and read again for its digest."""
DISK_PASSES = 3
PREPARED_BYTES_PER_SECOND = 50e3
"""The slowest making of examples that a limit allows for, in bytes of data files per second. One core makes about
250 kB of conversations a second into tokens (docs/performance.md, "Rows to examples"), and compressed files expand to
several times their size."""
LEAST_WORK_SECONDS = 4 * STORE_BUDGET_SECONDS
"""The limit for work of one rank without a transfer. Such work may make several calls to the store, each with a time
limit of its own."""
MOST_SECONDS = 24 * 3600.0
"""No limit is longer than a day, because a transfer that takes longer is taken for a fault."""


@dataclass(frozen=True, kw_only=True)
class JobSize:
    """The sizes on which the time limits depend."""

    model_bytes: int
    """Size of the files of the base model, which every node fetches."""
    artifact_bytes: int
    """Size of everything that the job publishes, which rank 0 makes and uploads."""
    checkpoint_bytes: int
    """Size of a whole checkpoint, which every node fetches at a resume and before the artifact is made."""
    data_bytes: int
    """Size of all data files, which every node fetches."""
    nodes: int


@dataclass(frozen=True, kw_only=True)
class TimeLimits:
    """Time limits in seconds."""

    prepare: float
    """How long the first rank of a node may take to make the rows into examples, and to write a base model that the job
    extends or that an adapter is merged into."""
    fetch: float
    """How long a node may take to fetch a checkpoint."""
    export: float
    """How long rank 0 may take to make the artifact from a checkpoint that lies on the node, and to upload the
    artifact."""
    share: float
    """How long the other ranks wait for the work of one rank, which may be one of the three above."""
    peers: float
    """How long a pod waits for the other pods at the start. The nodes pull the image and fetch model and data at
    different speeds, and a node may have all of them already."""


def time_limits(size: JobSize) -> TimeLimits:
    """Return the time limits for a job of ``size``. None is shorter than today's constant limits: 1,200 s for the work
    of a rank, and 300 s for the other pods at the start."""
    prepare = LEAST_WORK_SECONDS + size.data_bytes / PREPARED_BYTES_PER_SECOND + _disk_seconds(size.model_bytes)
    fetch = LEAST_WORK_SECONDS + _transfer_seconds(size.checkpoint_bytes, nodes=size.nodes)
    export = LEAST_WORK_SECONDS + _disk_seconds(size.artifact_bytes) + _transfer_seconds(size.artifact_bytes, nodes=1)
    # A pod without other pods waits for nothing but the processes that its own launcher starts.
    inputs = _transfer_seconds(size.model_bytes + size.data_bytes, nodes=size.nodes) if size.nodes > 1 else 0.0
    return TimeLimits(
        prepare=min(prepare, MOST_SECONDS),
        fetch=min(fetch, MOST_SECONDS),
        export=min(export, MOST_SECONDS),
        share=min(max(prepare, fetch, export), MOST_SECONDS),
        peers=min(PEER_WAIT_SECONDS + inputs, MOST_SECONDS),
    )


def _disk_seconds(amount: int) -> float:
    """Return the longest time in seconds that making files of ``amount`` bytes may take."""
    return DISK_PASSES * amount / DISK_BYTES_PER_SECOND


def _transfer_seconds(amount: int, *, nodes: int) -> float:
    """Return the longest time in seconds that the transfer of ``amount`` bytes between the store and each of ``nodes``
    nodes at the same time may take."""
    return amount / min(NODE_BYTES_PER_SECOND, STORE_BYTES_PER_SECOND / nodes)


SHORTEST = time_limits(JobSize(model_bytes=0, artifact_bytes=0, checkpoint_bytes=0, data_bytes=0, nodes=1))
"""The limits of a job with nothing to transfer. They hold where the sizes are not known, for example because a SIGTERM
came before model and data were fetched."""

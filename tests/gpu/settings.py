"""Shapes of models, settings of trainings, and the environment of a rank. Nothing here imports torch, because some of
this is needed before torch may be imported.

`section_process.py` prepares its process with this module, and the sections make their trainings of it.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_core.contract import Identity, RunConfig
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.ranks.device_environment import device_environment

LOOPBACK = "127.0.0.1"
LORA_RANK = 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama model, under the names of transformers' LlamaConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 4096


LLAMA_2_7B = Shape(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
"""The shape of Llama-2-7B: 6,738,415,616 parameters."""
TWO_LAYERS = Shape(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=32,
)
"""Two layers of Llama-2-7B, for sections that compare numbers."""
SMALL = Shape(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)
"""A model whose matrices are large enough that ZeRO-3 shards them: more than DeepSpeed's threshold of 100,000."""
TINY = Shape(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
"""The model of all sections in a dry run."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A training of one section."""

    method: str
    """`LoRA` or `Full`."""
    stage: int | None
    """ZeRO stage; None for the plain engine."""
    rows: int
    """Sequences of a micro-batch."""
    length: int
    """Tokens of a sequence."""
    packed_tokens: int | None = None
    """Average length of the examples that are packed into a sequence; None without packing."""
    precision: str = "bf16"
    recompute: bool = False
    """Whether activations are computed again in the backward pass (`training.gradientCheckpointing`)."""

    @property
    def case(self) -> str:
        """The name of the training in a section's lines, for example `1 x 4096 packed`."""
        return f"{self.rows} x {self.length}{' packed' if self.packed_tokens else ''}"


SHORT = Setup(method="LoRA", stage=None, rows=8, length=512)
LONG = Setup(method="LoRA", stage=None, rows=1, length=4096)
PACKED = Setup(method="LoRA", stage=None, rows=1, length=4096, packed_tokens=200)
"""The plain engine, because `deepspeed.zeroStage: Auto` takes it where one process trains with LoRA."""
FULL_SHORT = Setup(method="Full", stage=2, rows=8, length=512, recompute=True)
FULL_LONG = Setup(method="Full", stage=2, rows=1, length=4096, recompute=True)
"""Stage 2, because stage 1 needs 24 bytes a parameter at its peak, 151 GiB for 7B, which no GPU of 141 GB has."""


def run_config(setup: Setup, *, dry: bool) -> RunConfig:
    """Return the run file that the operator would write for a training like ``setup`` in one pod with one process."""
    config: dict[str, Any] = {
        "world": {"nodes": 1, "processesPerNode": 1, "device": "CPU" if dry else "GPU"},
        "model": {"s3": {"uri": "s3://none/model"}},
        "dataset": {
            "train": {"s3": {"uri": "s3://none/rows.jsonl"}},
            "format": {"text": {"textField": "text"}},
            "maxLength": setup.length,
        },
        "method": setup.method,
        "optimization": {
            "learningRate": 1e-4 if setup.method == "LoRA" else 5e-6,
            "maxSteps": 100,
            "globalBatchSize": setup.rows,
            "microBatchSize": setup.rows,
            "schedule": "Constant",
            "warmupSteps": 0,
            "weightDecay": 0,
            "gradientClipping": 1.0,
            "precision": setup.precision,
            "gradientCheckpointing": setup.recompute,
            "seed": 1,
            "zeroStage": setup.stage,
        },
        "evaluation": {"artifactFrom": "Last"},
        "storage": {
            "uri": "s3://none/runs/default/gpu-check/1",
            "endpoint": "http://localhost",
            "region": "us-east-1",
            "checkpointEverySteps": 100,
            "keepLast": 1,
        },
    }
    if setup.method == "LoRA":
        config["lora"] = {"rank": LORA_RANK, "alpha": 16}
    return RunConfig.model_validate(config)


def free_port() -> int:
    """Return a TCP port at which nothing listens at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def rank_environment(
    *, dry: bool, rank: int = 0, world_size: int = 1, port: int | None = None, nonce: str = "gpu-check"
) -> Mapping[str, str]:
    """Return the environment variables with which the launcher starts a worker (`finetune_trainer/processes.py`). All
    ranks compute on the first GPU."""
    settings = device_environment(
        "CPU" if dry else "GPU", ranks=world_size, scratch=Path(tempfile.gettempdir()), given=os.environ
    )
    return {
        **settings.environment,
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port or free_port()),
        "RENDEZVOUS_NONCE": nonce,
        "DS_ACCELERATOR": "cpu" if dry else "cuda",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def worker_plan(config: RunConfig) -> WorkerPlan:
    """Return the plan of a worker that trains as ``config`` says, and that reads no files."""
    folder = Path(tempfile.gettempdir())
    return WorkerPlan(
        paths=Paths(),
        identity=Identity(
            namespace="default", name="gpu-check", uid="1", attempt=1, pod_name="pod", pod_uid="1", node_rank=0
        ),
        config=config,
        inputs=Inputs(model=folder, train=folder),
        folder=folder,
    )

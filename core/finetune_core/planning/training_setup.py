"""What of a job its memory and its speed depend on.

`finetune_core/planned_job.py` makes a `TrainingSetup` out of a job, and `job_plan.py` fills in what the job leaves
open. The other modules of the room compute with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetune_core.planning.model_sizes import ModelSizes, Part


class NumberFormat(StrEnum):
    """Number format of the computation."""

    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def bytes(self) -> int:
        """Bytes of a number."""
        return 2 if self is NumberFormat.BF16 else 4


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSetup:
    """The LoRA adapters of a training."""

    rank: int
    parameters: int
    """Number of parameters of all adapters."""
    per_layer: tuple[int, ...]
    """Number of adapted linear layers of each layer of the model."""
    dropped_features: tuple[int, ...]
    """For each layer of the model, the number of input features of its adapted linear layers together, where the
    adapters have dropout. Without dropout all are 0."""
    expert_weights: tuple[tuple[int, ...], ...] = ()
    """For each layer of the model, the number of elements of each adapted tensor of experts, in the order of the
    forward pass. An empty tuple for a layer without adapted experts."""
    on_embedding: bool = False
    on_head: bool = False
    quantized: bool = False
    """Whether the linear layers of the base model are held in 4 bits (QLoRA)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetup:
    """One rank's part of a training, with every choice made."""

    sizes: ModelSizes
    adapters: AdapterSetup | None
    """None where every parameter is trained."""
    number_format: NumberFormat = NumberFormat.BF16
    processes: int = 1
    processes_per_node: int = 1
    zero_stage: int | None = 2
    """ZeRO stage of DeepSpeed. None: the only process trains with the plain engine, without DeepSpeed."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    recompute: bool = False
    """Whether activations are computed again in the backward pass (gradient checkpointing)."""
    micro_batch: int = 1
    """Sequences that one process computes at once."""
    length: int = 512
    """Length of the sequences in tokens: the longest that occurs. A micro-batch has ``micro_batch * length`` tokens."""
    packed: bool = False
    """Whether a sequence has several examples."""
    global_batch: int = 1
    """Examples of an optimizer step, over all processes; with packing the sequences that they fill at most."""
    added_rows: int = 0
    """Number of added tokens, by which embedding and head grow."""
    answers: int = 0
    """Answers that one process generates at once to score the model; 0 where the job generates none."""
    answer_length: int = 0
    """Length of the longest answer in tokens."""
    left_out: tuple[str, ...] = ()
    """Settings of the job that the plan leaves out, in sentences."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.length

    @property
    def base_parameters(self) -> int:
        """Number of parameters of the base model with its added rows."""
        copies = 1 if self.sizes.tied else 2
        return self.sizes.parameters + copies * self.added_rows * self.sizes.hidden

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters."""
        return self.base_parameters if self.adapters is None else self.adapters.parameters

    @property
    def parameters(self) -> int:
        """Number of all parameters, with adapters."""
        return self.base_parameters + (self.adapters.parameters if self.adapters is not None else 0)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one process in an optimizer step."""
        share = -(-self.global_batch // self.processes)
        return -(-share // self.micro_batch)

    @property
    def vocabulary(self) -> int:
        """Number of tokens, with added ones."""
        return self.sizes.vocabulary + self.added_rows


def adapter_setup(
    sizes: ModelSizes,
    *,
    rank: int,
    targets: Sequence[str] = (),
    dropout: bool = False,
    added_rows: int = 0,
    quantized: bool = False,
) -> AdapterSetup:
    """Return the adapters of rank ``rank`` on the modules that ``targets``, the entries of `lora.targetModules`, name.
    Raises UserError where an entry names nothing."""
    parts = sizes.adapted(targets, added_tokens=added_rows > 0)
    return AdapterSetup(
        rank=rank,
        parameters=parts.parameters(sizes, rank, added_rows=added_rows),
        per_layer=tuple(len(layer) for layer in parts.layers),
        dropped_features=tuple(sum(linear.inputs for linear in layer) if dropout else 0 for layer in parts.layers),
        expert_weights=tuple(
            tuple(linear.elements for linear in layer if linear.part is Part.EXPERTS) for layer in parts.layers
        ),
        on_embedding=parts.embedding,
        on_head=parts.head,
        quantized=quantized,
    )

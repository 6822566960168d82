"""Computes the memory of a training on one GPU: the peak of each phase of an optimizer step, and the parts that the
highest peak consists of.

`job_plan.py` calls `memory_plan`. The sums are compared with measurements of the trainer's engine in docs/planning.md.
What a GPU takes beside tensors (`DEVICE_BYTES`, `FRAGMENTED_SHARE`) can't be measured without one, and is added by
`MemoryPlan.needed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from finetune_core.planning.activations import (
    CURRENT_KERNELS,
    Kernels,
    head_rows,
    kept,
    kept_outside,
    largest_layer,
)
from finetune_core.planning.engine_memory import CURRENT_ENGINE, EngineBytes, EngineKind, engine_bytes, largest_linear
from finetune_core.planning.gpu_types import GIBIBYTE
from finetune_core.planning.host_needs import quantized_bytes
from finetune_core.planning.training_setup import TrainingSetup

DEVICE_BYTES = int(1.2 * GIBIBYTE)
"""Bytes of a GPU that torch's allocator does not count: the CUDA context with its kernels, the work spaces of cuBLAS,
and the buffers of NCCL."""
FRAGMENTED_SHARE = 0.03
"""Share of the peak that the allocator holds in gaps between tensors."""


class Phase(StrEnum):
    """A phase of a training with a peak of its own."""

    FORWARD = "forward pass"
    BACKWARD = "backward pass"
    REDUCTION = "last gradients"
    NORM = "norm of the gradient"
    UPDATE = "update"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"


STEP_PHASES = (Phase.FORWARD, Phase.BACKWARD, Phase.REDUCTION, Phase.NORM, Phase.UPDATE)
"""The phases of an optimizer step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes of one GPU."""

    standing: int
    """Bytes between two steps."""
    phases: dict[Phase, int]
    """The peak of each phase, with the standing bytes."""
    parts: dict[str, int]
    """The parts of the highest peak, in bytes: weights, optimizer, gradients, activations, logits, buffers."""

    @property
    def peak(self) -> int:
        """The highest peak of tensors."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> Phase:
        """The phase of the highest peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def step_peak(self) -> int:
        """The highest peak of an optimizer step, without evaluation and checkpoint."""
        return max(self.phases[phase] for phase in STEP_PHASES)

    @property
    def device(self) -> int:
        """Bytes that the GPU takes beside tensors."""
        return DEVICE_BYTES + int(FRAGMENTED_SHARE * self.peak)

    @property
    def needed(self) -> int:
        """Bytes of the GPU's memory that the training needs."""
        return self.peak + self.device


def memory_plan(
    setup: TrainingSetup, *, engine: EngineKind = CURRENT_ENGINE, kernels: Kernels = CURRENT_KERNELS
) -> MemoryPlan:
    """Return the memory of ``setup`` on one GPU, where each micro-batch has its full length and every token a
    target."""
    adapters = setup.adapters
    quantized = quantized_bytes(setup) if adapters is not None and adapters.quantized else None
    state = engine_bytes(setup, engine, quantized=quantized)
    passes = _Passes(setup, kernels)
    base = state.standing + state.accumulated
    computing = base + state.gathered
    ranges = {
        Phase.FORWARD: (computing, passes.kept + passes.outside, passes.forward_head),
        Phase.BACKWARD: max((passes.head_backward(computing, state), passes.layer_backward(computing, state)), key=sum),
        Phase.REDUCTION: (_reduction(state), 0, 0),
        Phase.NORM: (_after_backward(state) + state.norm, 0, 0),
        Phase.UPDATE: (_after_backward(state) + state.update, 0, 0),
        Phase.EVALUATION: (state.standing + state.gathered, *passes.evaluation),
        Phase.CHECKPOINT: (state.standing + state.checkpoint, 0, 0),
    }
    phases = {phase: sum(parts) for phase, parts in ranges.items()}
    top = max(phases, key=lambda phase: phases[phase])
    below, activations, logits = ranges[top]
    buffers = state.gathered + state.standing_bucket
    return MemoryPlan(
        standing=state.standing,
        phases=phases,
        parts={
            "weights": state.weights,
            "optimizer": state.optimizer,
            "gradients": below
            - state.weights
            - state.optimizer
            - buffers * (top in _WITH_GATHERED)
            - state.standing_bucket * (top not in _WITH_GATHERED),
            "activations": activations,
            "logits": logits,
            "buffers": buffers if top in _WITH_GATHERED else state.standing_bucket,
        },
    )


_WITH_GATHERED = (Phase.FORWARD, Phase.BACKWARD, Phase.EVALUATION)
"""The phases during which ZeRO-3 has weights of other ranks gathered."""


def _after_backward(state: EngineBytes) -> int:
    return state.standing - state.standing_gradients + state.gradients


def _reduction(state: EngineBytes) -> int:
    """Return the bytes while the last gradient of a step is reduced. All activations are freed then."""
    gathered = state.bucket - state.standing_bucket + state.reduction + state.gathered
    return _after_backward(state) + gathered


class _Passes:
    """The bytes of activations and logits of a forward and a backward pass of ``setup``."""

    def __init__(self, setup: TrainingSetup, kernels: Kernels) -> None:
        self._setup = setup
        width, sizes, tokens = setup.number_format.bytes, setup.sizes, setup.tokens
        self._width, self._hidden = width, width * sizes.hidden * tokens
        wide = max(sizes.feed_forward * max(1, sizes.active_experts), sizes.shared_feed_forward)
        self._wide = width * wide * tokens
        self.kept = kept(setup, kernels=kernels)
        self.outside = int(tokens * kept_outside(setup, kernels=kernels))
        self._layer = largest_layer(setup, kernels=kernels) if setup.recompute else 0
        self._logits = head_rows(setup) * setup.vocabulary
        self._chunks = -(-tokens // head_rows(setup))
        adapters = setup.adapters
        self._frozen = adapters is not None and not adapters.on_head
        self._trains_head = adapters is None

    @property
    def forward_head(self) -> int:
        """Bytes of the output head in the forward pass, on top of ``outside``."""
        width, more = self._width, self._chunks > 1
        if self._frozen:
            # Logits, their copy in fp32, log-probabilities in fp32, and these in the format of the weights. The fp32
            # tensors of a chunk are alive while the next chunk is begun. The gradient of the hidden states is kept.
            each = 8 + 4 + width if more else 8 + width
            return each * self._logits + self._hidden
        return 8 * self._logits

    def head_backward(self, below: int, state: EngineBytes) -> tuple[int, int, int]:
        """Return weights and gradients, activations, and logits while the backward pass of head and last norm runs, on
        top of ``below``."""
        setup = self._setup
        if self._frozen:
            # The last norm: gradients and intermediate results in fp32 of as many features as the hidden states have.
            return below, self.kept + 24 * setup.sizes.hidden * setup.tokens, 0
        # Log-probabilities, their gradient and that of the logits in fp32, and the latter in the format of the weights.
        logits = (12 if self._chunks > 1 else 8) * self._logits
        if not self._trains_head:
            return below, self.kept + self.outside + self._hidden, logits
        gradient = self._width * setup.vocabulary * setup.sizes.hidden
        if state.reduction > gradient + self._hidden + logits:
            # The gradient of the head is reduced as soon as it is whole.
            return below + state.reduction, self.kept + self.outside, 0
        return below + gradient, self.kept + self.outside + self._hidden, logits

    def layer_backward(self, below: int, state: EngineBytes) -> tuple[int, int, int]:
        """Return the same while the backward pass of the last layer runs: gradients of two results of the feed-forward
        network and of four hidden states, and where layers are computed again all that the layer keeps."""
        inside = self.kept + self._layer + 2 * self._wide + 4 * self._hidden
        if self._trains_head:
            # The layer's own gradients wait in the bucket and beside it. That of the head is reduced already.
            shard = 4 * self._setup.vocabulary * self._setup.sizes.hidden // self._setup.processes
            own = 2 * self._width * largest_linear(self._setup)
            below += (0 if state.standing_gradients else shard) + state.bucket - state.standing_bucket + own
        return below, inside, 0

    @property
    def evaluation(self) -> tuple[int, int]:
        """Bytes of activations and of logits in a forward pass without gradients."""
        inside = 4 * self._wide + 4 * self._hidden
        head = 3 * self._hidden
        logits = (4 + 4 + self._width) * self._logits
        return (inside, 0) if inside >= head + logits else (head, logits)

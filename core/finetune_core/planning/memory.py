"""Computes the memory of a training on one GPU: the peak of each phase of an optimizer step, and the parts that the
highest peak consists of.

`job_plan.py` calls `memory_plan`. The sums are compared with measurements of the trainer's engine in docs/planning.md.
What a GPU takes beside tensors (`DEVICE_BYTES`, `FRAGMENTED_SHARE`) can't be measured without one, and is added by
`MemoryPlan.needed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from finetune_core.planning.activations import (
    CURRENT_KERNELS,
    Kernels,
    head_rows,
    kept,
    kept_outside,
    largest_layer,
)
from finetune_core.planning.engine_memory import EngineBytes, engine_bytes, layer_gradients, reduced_head
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
    GENERATION = "generation of answers"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Need:
    """Bytes of a phase on top of weights and optimizer."""

    gradients: int
    buffers: int
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.buffers + self.activations + self.logits


def memory_plan(setup: TrainingSetup, *, kernels: Kernels = CURRENT_KERNELS) -> MemoryPlan:
    """Return the memory of ``setup`` on one GPU, where each micro-batch has its full length and every token a
    target."""
    adapters = setup.adapters
    quantized = quantized_bytes(setup) if adapters is not None and adapters.quantized else None
    state = engine_bytes(setup, quantized=quantized)
    passes = _Passes(setup, kernels, state)
    standing, standing_bucket = state.standing_gradients, state.standing_bucket
    needs = {
        Phase.FORWARD: passes.forward,
        Phase.BACKWARD: max((passes.head_backward, passes.layer_backward), key=lambda need: need.total),
        # All activations are freed before the last gradient is reduced.
        Phase.REDUCTION: _Need(gradients=state.gradients + state.reduction, buffers=state.bucket + state.gathered),
        Phase.NORM: _Need(gradients=state.gradients + state.norm, buffers=standing_bucket),
        Phase.UPDATE: _Need(gradients=state.gradients + state.update, buffers=standing_bucket),
        Phase.EVALUATION: passes.evaluation,
        Phase.CHECKPOINT: _Need(gradients=standing, buffers=standing_bucket + state.checkpoint),
    }
    if setup.answers:
        needs[Phase.GENERATION] = passes.generation
    base = state.weights + state.optimizer
    phases = {phase: base + need.total for phase, need in needs.items()}
    top = needs[max(phases, key=lambda phase: phases[phase])]
    return MemoryPlan(
        standing=state.standing,
        phases=phases,
        parts={
            "weights": state.weights,
            "optimizer": state.optimizer,
            "gradients": top.gradients,
            "activations": top.activations,
            "logits": top.logits,
            "buffers": top.buffers,
        },
    )


class _Passes:
    """The needs of a forward and a backward pass of ``setup``, and of an evaluation."""

    def __init__(self, setup: TrainingSetup, kernels: Kernels, state: EngineBytes) -> None:
        self._setup, self._state = setup, state
        width, sizes, tokens = setup.number_format.bytes, setup.sizes, setup.tokens
        self._width, self._hidden = width, width * sizes.hidden * tokens
        wide = max(sizes.feed_forward * max(1, sizes.active_experts), sizes.shared_feed_forward)
        self._wide = width * wide * tokens
        self._kept = kept(setup, kernels=kernels)
        self._outside = int(tokens * kept_outside(setup, kernels=kernels))
        self._layer = largest_layer(setup, kernels=kernels) if setup.recompute else 0
        self._logits = head_rows(setup) * setup.vocabulary
        self._chunks = -(-tokens // head_rows(setup))
        adapters = setup.adapters
        self._adapts_head = adapters is not None and adapters.on_head
        self._trains_head = adapters is None
        self._head_gradient = width * setup.vocabulary * sizes.hidden if self._trains_head else 0
        # In the feed-forward layer: the activation, its gradient, that of the product, and a product of gradient and
        # input, beside the gradients of two hidden states. Under ZeRO-3 torch computes instead the gradients of the
        # product and of its two inputs, and the product that was kept is freed before.
        # Experts do not compute the activation again, and copy hidden states.
        gates = 2 if setup.zero_stage == 3 else 4
        self._inside_layer = 2 * self._wide + 4 * self._hidden
        if not sizes.active_experts:
            self._inside_layer = gates * self._wide + 2 * self._hidden
        experts = _Experts(setup, state)
        self._experts = experts
        self._gradients = state.standing_gradients + state.accumulated
        # The bucket is there from the first backward pass of a step on.
        self._buffers = state.gathered + (state.bucket if setup.accumulation > 1 else state.standing_bucket)

    @property
    def _missing_bucket(self) -> int:
        """The bucket where the first backward pass of a step makes it."""
        return max(0, self._state.bucket + self._state.gathered - self._buffers)

    def _need(self, *, activations: int, logits: int = 0, gradients: int = 0, buffers: int = 0) -> _Need:
        """Return a need of both passes with the buffers that they have in any case."""
        return _Need(
            gradients=self._gradients + gradients,
            buffers=self._buffers + buffers,
            activations=activations,
            logits=logits,
        )

    @property
    def forward(self) -> _Need:
        """The need while the output head computes the loss, or while a layer's experts are gathered."""
        head, experts = self._head_forward, self._experts
        layer = self._need(activations=self._kept + experts.kept, buffers=experts.gather_copy)
        return max((head, layer), key=lambda need: need.total)

    @property
    def _head_forward(self) -> _Need:
        """The need while the output head computes the loss."""
        kept_now = self._kept + self._outside + self._experts.kept
        # A chunk of logits and of log-probabilities, both in fp32.
        logits = 8 * self._logits
        if self._adapts_head:
            return self._need(activations=kept_now + self._hidden, logits=logits)
        # The result of the last norm and the states that have a target exist beside the gradient of these states.
        return self._need(activations=kept_now + 2 * self._hidden, logits=logits, gradients=self._head_gradient)

    @property
    def head_backward(self) -> _Need:
        """The need while the backward pass of head and last norm runs."""
        sizes = self._setup.sizes
        kept_now = self._kept + self._outside + self._experts.kept
        if self._adapts_head:
            # Log-probabilities, their gradient and that of the logits in fp32, and the latter in the format of the
            # weights.
            logits = (12 if self._chunks > 1 else 8) * self._logits
            return self._need(activations=kept_now + 2 * self._hidden, logits=logits)
        # The gradients of the last norm's result and of its input. Where its factors are in fp32, the norm computes
        # with input, gradient and result in fp32.
        wide = 12 * sizes.hidden * self._setup.tokens if sizes.wide_norms and self._width < 4 else 0
        normed = self._need(activations=kept_now + self._hidden + wide, gradients=self._head_gradient)
        if not self._trains_head:
            return normed
        # The gradient of the head, which the forward pass has computed, is reduced before that.
        reduced = self._need(activations=kept_now, gradients=self._state.head_reduction, buffers=self._missing_bucket)
        return max((reduced, normed), key=lambda need: need.total)

    @property
    def layer_backward(self) -> _Need:
        """The need while the backward pass of the last layer runs: gradients inside of the layer, and where layers are
        computed again all that the layer keeps."""
        inside = self._kept + self._layer + self._inside_layer + self._experts.kept
        setup = self._setup
        # Where layers are not computed again, the last layer has the peak, and few gradients wait so early.
        waiting = self._state.waiting if setup.recompute else 0
        if not self._trains_head:
            return self._need(activations=inside, gradients=self._experts.merged_gradient + waiting)
        # The layer's own gradients wait in the bucket and beside it. That of the head is reduced already.
        head, own = reduced_head(setup), layer_gradients(setup)
        return self._need(activations=inside, gradients=head + own + waiting, buffers=self._missing_bucket)

    @property
    def evaluation(self) -> _Need:
        """The need of a forward pass without gradients."""
        state, experts = self._state, self._experts
        inside = 4 * self._wide + 4 * self._hidden + experts.merged_layer + experts.gather_copy
        head = 3 * self._hidden
        logits = (4 + 4 + self._width) * self._logits
        activations, logits = (inside, 0) if inside >= head + logits else (head, logits)
        return _Need(
            gradients=state.standing_gradients,
            buffers=state.standing_bucket + state.gathered,
            activations=activations,
            logits=logits,
        )

    @property
    def generation(self) -> _Need:
        """The need of the generation of answers to prompts of the full length: the keys and values of all tokens in all
        layers, and the forward pass over the prompts, which computes the logits of the last token only. The cache of
        transformers copies the keys or the values of one layer for each token, which takes less."""
        setup, sizes = self._setup, self._setup.sizes
        longest = min(setup.length + setup.answer_length, sizes.context or setup.length + setup.answer_length)
        keys = 2 * self._width * sizes.key_value_heads * sizes.head_width
        cache = setup.answers * longest * keys * len(sizes.layers)
        evaluation = self.evaluation
        prompts = setup.answers * setup.length
        inside = (4 * self._wide + 4 * self._hidden) * prompts // setup.tokens
        experts = self._experts.merged_layer + self._experts.gather_copy
        return replace(
            evaluation,
            activations=cache + inside + experts,
            logits=(4 + self._width) * setup.answers * setup.vocabulary,
        )


class _Experts:
    """Bytes that the weights of experts take in both passes beside the weights of the model and the gathered ones.

    peft adds the product of an adapter's matrices to the weights of adapted experts in each forward pass
    (`ParamWrapper`), and the sum stays until the layer's backward pass. Under ZeRO-3, the gathered weights of experts
    without adapters stay until then too: the backward pass needs a transposed view of them, and such a view keeps the
    memory alive although DeepSpeed lets go of the weight.
    """

    def __init__(self, setup: TrainingSetup, state: EngineBytes) -> None:
        width = setup.number_format.bytes
        adapted = setup.adapters.expert_weights if setup.adapters is not None else ()
        merged = [width * sum(weights) for weights in adapted]
        self.merged_layer = max(merged, default=0)
        """The sums of one layer."""
        held = [
            max(layer, state.held_experts[number]) if state.held_experts else layer
            for number, layer in enumerate(merged or [0] * len(setup.sizes.layers))
        ]
        # Without adapters, the weights of one layer are counted among the gathered ones.
        counted = 0 if self.merged_layer else max(held)
        self.kept = (max(held) if setup.recompute else sum(held)) - counted
        """What stays until the backward pass, of all layers or of one that is computed again."""
        self.gather_copy = 0 if self.merged_layer else state.gather_copy
        """For the gather of a layer. Adapted experts are merged after that, which takes more."""
        self.merged_gradient = width * max((_largest_gradient(weights) for weights in adapted), default=0)
        """Gradients of the sums of one layer, on top of what stays."""


def _largest_gradient(weights: Sequence[int]) -> int:
    """Return the number of elements by which the gradients of ``weights`` are more than what their backward passes have
    let go of before. The backward passes go from the last weight to the first one."""
    most = freed = 0
    for elements in reversed(weights):
        most = max(most, elements - freed)
        freed += elements
    return most

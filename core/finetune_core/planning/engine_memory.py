"""Computes the bytes that the training engine takes: weights, optimizer state, gradients, buffers, and what each phase
of an optimizer step needs for a moment.

`memory.py` adds the activations. `TrainingSetup.zero_stage` says which engine of the trainer computes. The constants of
DeepSpeed 0.19 hold for the settings in the trainer's `engine/config.py`, and those of the plain engine are in its
`engine/masters.py`; tests/planning compares the sums with measurements of both engines.

All sizes are bytes of one process. P is the number of all parameters, T that of the trained ones, N the number of
processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_core.planning.model_sizes import Part
from finetune_core.planning.training_setup import NumberFormat, TrainingSetup

BUCKET_ELEMENTS = 50_000_000
"""Numbers in a bucket of DeepSpeed's communication: `BUCKET_ELEMENTS` in the trainer's `engine/config.py`."""
LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most, apart from those that a layer needs at the moment: DeepSpeed's default
of `stage3_max_live_parameters`."""
PERSISTENT_ELEMENTS = 100_000
"""A parameter with fewer numbers is never sharded under ZeRO-3: DeepSpeed's default of
`stage3_param_persistence_threshold`."""
MOMENT_BYTES = 8
"""Bytes of both moments of AdamW, in fp32, for each trained parameter."""
MASTER_BYTES = 4
"""Bytes of the fp32 value of each trained parameter, which the engine keeps beside the weight in bf16."""
NORM_BYTES = 8
"""Bytes of a number in the copy of a gradient from which DeepSpeed computes its norm: float64. The trainer lets
DeepSpeed compute norms at ZeRO stage 3 and with offload."""
STATE_BYTES = 12
"""Bytes of the state of a parameter that is gathered whole for a checkpoint: three numbers in fp32."""


REMAINDER_BYTES = 2
"""Bytes that the plain engine keeps beside each trained weight in bf16, which together are the fp32 value."""
UPDATED_ELEMENTS = 1 << 24
"""Numbers that the plain engine updates at a time: `BATCH_ELEMENTS` in the trainer's `engine/masters.py`."""
UPDATE_BYTES = 11
"""Bytes that the plain engine needs for each number that it updates, beside what stays."""
SMALL_ELEMENTS = 1 << 20
"""A gradient with fewer numbers waits for others in the plain engine: `SMALL_ELEMENTS` in the trainer's
`engine/masters.py`."""
WAITING_ELEMENTS = 1 << 22
"""Numbers of small gradients from which the plain engine joins them and adds them up: `WAITING_ELEMENTS` there."""
NORM_PIECE_BYTES = 32 << 20
"""Bytes of the numbers in fp64 whose squares the trainer adds up at a time, in the plain engine and at ZeRO stages 1
and 2: `NORM_ELEMENTS` in the trainer's `engine/gradient_norm.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineBytes:
    """Bytes that an engine takes beside activations."""

    weights: int
    """The weights that the model computes with, and those of other ranks that ZeRO-3 has gathered."""
    optimizer: int
    """fp32 values and moments."""
    standing_gradients: int
    """Gradients that stay from step to step."""
    accumulated: int
    """Gradients that the micro-batches of a step before the last have left."""
    gradients: int
    """Gradients right after the last backward pass of a step, with ``standing_gradients``."""
    gathered: int
    """Weights of other ranks that are gathered for a while (ZeRO-3), during both passes."""
    gather_copy: int
    """What the gather of a layer's experts takes for a moment, on top of ``gathered`` (ZeRO-3)."""
    held_experts: tuple[int, ...]
    """For each layer of the model, gathered weights of experts that stay until the backward pass of the layer
    (ZeRO-3)."""
    bucket: int
    """Buffer of the communication while gradients are computed."""
    standing_bucket: int
    """Of it, what stays from step to step."""
    waiting: int
    """Small gradients that wait during the backward pass until they are added up together, with the tensors that they
    are joined in."""
    head_reduction: int
    """The gradient of the output head with its copies, while it is reduced."""
    reduction: int
    """The last gradient of a step with its copies, while it is reduced."""
    norm: int
    """For the norm of the gradient, on top of the gradients."""
    update: int
    """For the update, on top of the gradients."""
    checkpoint: int
    """For reading the state of the largest parameter."""

    @property
    def standing(self) -> int:
        """Bytes between two steps."""
        return self.weights + self.optimizer + self.standing_gradients + self.standing_bucket


def trained_tensors(setup: TrainingSetup, *, experts: bool = True) -> tuple[int, ...]:
    """Return the sizes of the large trained tensors: of the weights, or of the matrices of the adapters. ``experts``
    says whether the weights of experts are among them."""
    sizes, adapters = setup.sizes, setup.adapters
    linears = sizes.linears
    ends = setup.vocabulary
    if adapters is None:
        return (
            ends * sizes.hidden,
            *(linear.elements for linear in linears if experts or linear.part is not Part.EXPERTS),
        )
    inside = tuple(
        adapters.rank * max(linear.inputs, linear.outputs) * linear.experts
        for linear in linears
        if linear.part is not Part.ROUTER
    )
    return (*inside, adapters.rank * ends) if adapters.on_embedding or adapters.on_head else inside


def largest_trained(setup: TrainingSetup) -> int:
    """Return the number of elements of the largest trained tensor."""
    return max(trained_tensors(setup))


def engine_bytes(setup: TrainingSetup, *, quantized: int | None = None) -> EngineBytes:
    """Return the bytes that the engine of ``setup`` takes. ``quantized`` are the bytes of the linear layers where they
    are held in 4 bits."""
    if setup.zero_stage is None:
        return _plain(setup, quantized)
    if setup.zero_stage == 3:
        return _stage_3(setup)
    return _stages_0_to_2(setup, quantized)


def _weights(setup: TrainingSetup, quantized: int | None) -> int:
    width = setup.number_format.bytes
    if quantized is None:
        return width * setup.parameters
    return width * (setup.parameters - setup.sizes.quantizable) + quantized


def _plain(setup: TrainingSetup, quantized: int | None) -> EngineBytes:
    """Return the bytes of the trainer's plain engine (`engine/plain_engine.py`): 12 bytes for each trained parameter
    between two steps, and 16 with the gradient in fp32, which exists from the first backward pass of a step to the
    update."""
    width, trained = setup.number_format.bytes, setup.trained_parameters
    largest = largest_trained(setup)
    is_bf16 = setup.number_format is NumberFormat.BF16
    gradients = MASTER_BYTES * trained
    # The gradient of the numbers that are updated is freed before most of that memory is needed.
    update = (UPDATE_BYTES - MASTER_BYTES) * min(trained, UPDATED_ELEMENTS) if is_bf16 else 0
    # While a large gradient is added up, small ones may wait. They are joined when no large one is there.
    waiting = width * min(_small_trained(setup, SMALL_ELEMENTS - 1), WAITING_ELEMENTS) if is_bf16 else 0
    # A tied weight has a gradient as embedding and one as head, which are added up.
    last = (2 if setup.sizes.tied else 1) * width * largest
    checkpoint = 0
    if is_bf16:
        checkpoint = MASTER_BYTES * largest if largest <= UPDATED_ELEMENTS else STATE_BYTES * largest
    return EngineBytes(
        weights=_weights(setup, quantized),
        optimizer=((REMAINDER_BYTES if is_bf16 else 0) + MOMENT_BYTES) * trained,
        standing_gradients=0,
        accumulated=gradients if setup.accumulation > 1 else 0,
        gradients=gradients,
        gathered=0,
        gather_copy=0,
        held_experts=(),
        bucket=0,
        standing_bucket=0,
        waiting=2 * waiting,
        head_reduction=(width + _new_gradient(setup)) * largest,
        reduction=max(last + waiting if largest >= SMALL_ELEMENTS else 0, 2 * waiting),
        norm=NORM_PIECE_BYTES,
        update=update,
        checkpoint=checkpoint,
    )


def _new_gradient(setup: TrainingSetup) -> int:
    """Return the bytes of the plain engine's gradient for each number of which the last micro-batch of a step computes
    the gradient: 0 where the micro-batches before have made it already."""
    return 0 if setup.accumulation > 1 else MASTER_BYTES


def _stages_0_to_2(setup: TrainingSetup, quantized: int | None) -> EngineBytes:
    """DeepSpeed's `DeepSpeedZeroOptimizer` (deepspeed/runtime/zero/stage_1_and_2.py), and without ZeRO plain AdamW."""
    width, trained, ranks = setup.number_format.bytes, setup.trained_parameters, setup.processes
    shard = -(-trained // ranks)
    largest = largest_trained(setup)
    fragment = min(largest, shard)
    if setup.zero_stage == 0:
        gradients = width * trained
        return EngineBytes(
            weights=_weights(setup, quantized),
            optimizer=MOMENT_BYTES * trained,
            standing_gradients=0,
            accumulated=gradients if setup.accumulation > 1 else 0,
            gradients=gradients,
            gathered=0,
            gather_copy=0,
            held_experts=(),
            bucket=0,
            standing_bucket=0,
            waiting=0,
            head_reduction=width * largest,
            # A tied weight has a gradient as embedding and one as head, which are added up.
            reduction=2 * width * largest,
            norm=0,
            update=0,
            checkpoint=0,
        )
    # Stage 1 accumulates whole gradients in the number format of the weights, and shards them in the last backward
    # pass. Stage 2 accumulates the rank's shard in fp32.
    first = setup.zero_stage == 1
    accumulated = width * trained if first else MASTER_BYTES * shard
    gradients = width * shard if first else MASTER_BYTES * shard
    offloaded = setup.offload_optimizer
    # With one process, gradients that are added up in the number format of the weights stay where autograd put them.
    stay = ranks == 1 and not offloaded and (first or width == MASTER_BYTES)
    # The update makes a flat copy of them in fp32. A flat copy in another number format comes before it.
    copied = (MASTER_BYTES + (width if width < MASTER_BYTES else 0)) * shard if first or stay else 0
    optimizer = 0 if offloaded else (MASTER_BYTES + MOMENT_BYTES) * shard
    norm = NORM_BYTES * fragment if offloaded else min(NORM_PIECE_BYTES, NORM_BYTES * fragment)
    head_reduction = _reduction(setup)
    if stay:
        # A tied weight has a gradient as embedding and one as head, which are added up.
        reduction = (2 if setup.sizes.tied else 1) * width * largest
    elif first:
        # Stage 1 copies the rank's shard of all gradients at the end of the last backward pass.
        reduction = max(_reduction(setup), width * _expert_gradients(setup), width * shard)
    else:
        # A gradient of experts that lies in the rank's shard stays until the end of the backward pass.
        experts = width * _expert_gradients(setup)
        reduction = max(_reduction(setup) + experts // 2, experts)
        if setup.adapters is None:
            flat = _FlatReduction(setup)
            head_reduction, reduction = flat.head, max(reduction, flat.embedding)
    return EngineBytes(
        weights=_weights(setup, quantized),
        optimizer=optimizer,
        standing_gradients=0,
        accumulated=accumulated if setup.accumulation > 1 else 0,
        gradients=0 if offloaded else gradients,
        gathered=0,
        gather_copy=0,
        held_experts=(),
        bucket=0 if stay else width * BUCKET_ELEMENTS,
        standing_bucket=0,
        waiting=0,
        head_reduction=head_reduction,
        reduction=reduction,
        norm=norm,
        update=0 if offloaded else copied,
        checkpoint=STATE_BYTES * largest,
    )


def _stage_3(setup: TrainingSetup) -> EngineBytes:
    """DeepSpeed's `DeepSpeedZeroOptimizer_Stage3` (deepspeed/runtime/zero/stage3.py)."""
    width, trained, ranks = setup.number_format.bytes, setup.trained_parameters, setup.processes
    shard = -(-trained // ranks)
    largest = largest_trained(setup)
    persistent = _persistent(setup)
    offloaded = setup.offload_optimizer
    optimizer = 0 if offloaded else (MASTER_BYTES + MOMENT_BYTES) * shard
    gradients = 0 if offloaded else MASTER_BYTES * shard
    whole = setup.parameters - persistent
    weights = width * persistent + (0 if setup.offload_parameters else width * -(-whole // ranks))
    bucket = width * BUCKET_ELEMENTS
    return EngineBytes(
        weights=weights,
        optimizer=optimizer,
        standing_gradients=gradients,
        accumulated=0,
        gradients=gradients,
        gathered=width * _gathered(setup, whole),
        # The experts of a layer are gathered into one buffer, and each tensor is copied out of it. This term is the
        # largest of these tensors, as measured.
        gather_copy=width * max(sum(setup.sizes.experts, ()), default=0),
        held_experts=tuple(width * sum(tensors) for tensors in setup.sizes.experts),
        bucket=bucket,
        standing_bucket=bucket,
        waiting=0,
        head_reduction=_reduction(setup),
        reduction=max(_reduction(setup), width * _expert_gradients(setup)),
        norm=NORM_BYTES * min(-(-largest // ranks), shard),
        update=0 if offloaded else MASTER_BYTES * shard,
        checkpoint=STATE_BYTES * largest,
    )


class _FlatReduction:
    """Bytes while the gradients of the largest weights are reduced at stage 2 where every parameter is trained, on the
    rank that needs most of them.

    Each rank has a consecutive part of the flat tensor of all parameters, the first one the embedding and the last one
    the head. Parts of a gradient that lie side by side are joined until they are more than a bucket
    (`allreduce_and_scatter` in deepspeed/runtime/zero/stage_1_and_2.py). A rank adds a copy of its part in fp32 to its
    fp32 gradients (`_add_to_grad_partition_buffer`). It makes all of these at the first part
    (`_build_compact_grad_partition_buffer`), which on the last rank is that of the head. A gradient that is larger than
    a bucket and has a part on the rank stays until the backward pass ends (`copy_grads_in_partition`).
    """

    def __init__(self, setup: TrainingSetup) -> None:
        width, ranks, sizes = setup.number_format.bytes, setup.processes, setup.sizes
        self._width, self._shard = width, -(-setup.trained_parameters // ranks)
        weight = setup.vocabulary * sizes.hidden
        staying = sum(count * linear.elements for linear, count in sizes.linears.items() if _is_large(linear.elements))
        staying += 0 if sizes.tied or not _is_large(weight) else weight
        whole, copies = width * weight, self._copies(0, weight)
        self.head = whole
        """For the head. The gradient of a tied weight is whole, and reduced, only once that of the embedding is
        known."""
        if not sizes.tied:
            self.head += self._copies(setup.trained_parameters - weight, weight) + new_sums(setup)
        rest = copies + width * staying if ranks == 1 else max(copies, width * min(staying, self._shard + weight))
        self.embedding = max(whole + rest, 3 * whole if sizes.tied else 0)
        """For the embedding, the last gradient. That of a tied weight is the sum of two."""

    def _copies(self, start: int, elements: int) -> int:
        """Return the bytes of the copies of a gradient of ``elements`` numbers, the first of which is the number
        ``start`` of the flat tensor."""
        most, joined, end = 0, list[int](), start + elements
        while start < end:
            cut = min(end, (start // self._shard + 1) * self._shard)
            joined.append(cut - start)
            start = cut
            if start == end or _is_large(sum(joined)):
                together = sum(joined) if len(joined) > 1 else 0
                most = max(most, self._width * together + MASTER_BYTES * max(joined))
                joined = []
        return most


def _is_large(elements: int) -> bool:
    """Return whether a gradient of ``elements`` numbers is larger than a bucket of DeepSpeed."""
    return elements > BUCKET_ELEMENTS


def new_sums(setup: TrainingSetup) -> int:
    """Return the bytes of the fp32 gradients of a rank at stage 2, which the last micro-batch of a step makes: 0 where
    the micro-batches before have made them already."""
    return 0 if setup.accumulation > 1 else MASTER_BYTES * -(-setup.trained_parameters // setup.processes)


def _reduction(setup: TrainingSetup) -> int:
    """Return the bytes while the largest gradient beside those of experts is reduced: the gradient and two copies of
    it. With one process the second copy is in fp32."""
    width = setup.number_format.bytes
    copies = 3 * width if setup.processes > 1 else 2 * width + MASTER_BYTES
    return copies * max(trained_tensors(setup, experts=False))


def largest_linear(setup: TrainingSetup) -> int:
    """Return the number of elements of the largest weight inside of the layers."""
    return max(linear.elements for linear in setup.sizes.linears)


def layer_gradients(setup: TrainingSetup) -> int:
    """Return the bytes of the gradients that a layer's backward pass has at once where every parameter is trained.

    The gradient of a linear layer is copied into a bucket. Gradients of experts are larger than a bucket. ZeRO-3
    reduces those of a layer together, because the experts of a layer are gathered as one leaf module. The plain engine
    adds each gradient to one in fp32 at once.
    """
    if setup.zero_stage is None:
        return (setup.number_format.bytes + _new_gradient(setup)) * largest_linear(setup)
    dense = max(linear.elements for linear in setup.sizes.linears if linear.part is not Part.EXPERTS)
    return setup.number_format.bytes * max(2 * dense, _expert_gradients(setup))


def reduced_head(setup: TrainingSetup) -> int:
    """Return the bytes that the gradient of the output head takes on top of the standing and the accumulated gradients
    while the backward pass is in the layers, where every parameter is trained."""
    head = setup.vocabulary * setup.sizes.hidden
    if setup.zero_stage == 3 and not setup.offload_optimizer:
        return 0
    if setup.zero_stage is None:
        # The gradient of a tied weight is whole only once that of the embedding is known.
        return head * (setup.number_format.bytes if setup.sizes.tied else _new_gradient(setup))
    if setup.zero_stage in (1, 2):
        # The rank that has a part of the head keeps the gradient of the head, and at stage 1 each rank does.
        return setup.number_format.bytes * head + (new_sums(setup) if setup.zero_stage == 2 else 0)
    return MASTER_BYTES * head // setup.processes


def _expert_gradients(setup: TrainingSetup) -> int:
    """Return the number of elements of the gradients of experts that exist at once, with a copy of each one that is
    reduced alone. 0 where no layer has experts, and where their weights are frozen."""
    if setup.adapters is not None:
        return 0
    if setup.zero_stage == 3:
        return max(sum(tensors) for tensors in setup.sizes.experts)
    return 2 * max(sum(setup.sizes.experts, ()), default=0)


def _gathered(setup: TrainingSetup, whole: int) -> int:
    """Return the number of elements of the weights that ZeRO-3 has gathered at most, of ``whole`` sharded ones.

    DeepSpeed checks the limit of gathered weights before it fetches the next module and a bucket ahead of that. The
    experts of a layer are one module. Those of another layer are not among the gathered weights where they are more
    than the limit.
    """
    experts = [sum(tensors) for tensors in setup.sizes.experts]
    others = whole - sum(experts) if max(experts) > LIVE_PARAMETERS else whole
    return min(whole, min(others, LIVE_PARAMETERS + BUCKET_ELEMENTS) + max(largest_linear(setup), *experts))


def _persistent(setup: TrainingSetup) -> int:
    """Return the number of parameters that ZeRO-3 does not shard: norms, biases and small matrices of adapters."""
    small = _small_weights(setup, PERSISTENT_ELEMENTS) + _small_adapters(setup, PERSISTENT_ELEMENTS)
    return min(small, setup.parameters)


def _small_trained(setup: TrainingSetup, limit: int) -> int:
    """Return the number of trained parameters in tensors of at most ``limit`` elements."""
    if setup.adapters is None:
        return _small_weights(setup, limit)
    return min(_small_adapters(setup, limit), setup.trained_parameters)


def _small_weights(setup: TrainingSetup, limit: int) -> int:
    """Return the number of the model's own parameters in tensors of at most ``limit`` elements. Norms and biases are
    such tensors."""
    small = setup.sizes.parameters_by_kind["norms"]
    for linear, count in setup.sizes.linears.items():
        small += count * linear.biased * linear.outputs
        if linear.elements <= limit:
            small += count * linear.elements
    return small


def _small_adapters(setup: TrainingSetup, limit: int) -> int:
    """Return the number of parameters in the layers' matrices of adapters that have at most ``limit`` elements."""
    adapters = setup.adapters
    if adapters is None:
        return 0
    small = 0
    for linear, count in setup.sizes.linears.items():
        if linear.part is not Part.ROUTER:
            matrices = (adapters.rank * linear.experts * features for features in (linear.inputs, linear.outputs))
            small += count * sum(elements for elements in matrices if elements <= limit)
    return small

"""Computes the bytes of activations: what the forward pass keeps for the backward pass.

`memory.py` adds the bytes to those of weights and optimizer. What is kept follows from the code of the models in
transformers and from the trainer's own kernels (the room `kernels`, `loss/head.py`). The constants that change with the
kernels are in `Kernels`. tests/planning compares the sums with measurements of the trainer's engine.

All sizes are bytes of one process. "A number" has 2 bytes in bf16 and 4 in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from finetune_core.planning.model_sizes import Linear, NormKind, Part
from finetune_core.planning.training_setup import TrainingSetup

CHUNK_LOGITS = 1 << 25
"""Number of logits that the output head computes at a time, as in the trainer's `loss/head.py`."""
MEASURED_FAMILIES: Final = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "mixtral", "qwen3_moe"})
"""The families whose activations were measured (docs/planning.md)."""
TOKEN_BYTES = 64
"""Bytes of a token in the tensors of a micro-batch: ids, positions, targets and dropout keys of 8 bytes each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """What depends on the kernels of the trainer. `CURRENT_KERNELS` is what the trainer uses now. Other kernels are
    another value of this class."""

    norm_copies: bool
    """Whether a norm keeps a copy of its input in fp32, and not the input itself."""
    norm_result: bool
    """Whether a trained norm keeps its normalised input in the number format of the training too."""
    gate_results: int
    """How many tensors as wide as the feed-forward network it keeps: gate, its activation, input, and their product
    are 4; 2 where the activation and the product are computed again."""
    sharded_gate_results: int
    """The same under ZeRO-3, where linear layers and gated products compute with their own code (`NOT_UNDER_ZERO_3` in
    the trainer's `kernels/parts.py`)."""
    expert_results: int
    """The same of experts, for each expert of a token."""
    dropout_masks: bool
    """Whether the dropout of adapters keeps its masks and the dropped inputs. Under ZeRO-3 it does in any case."""
    passes_lora: float
    """Bytes that elementwise work and thin products read and write with LoRA, forward and backward, for each byte that
    is kept. Counted on the shape of Llama 2 7B: 37.1 MB of 109.8 KB in each of 32 layers, for a token."""
    passes_full: float
    """The same where every parameter is trained: 24.4 MB of 109.6 KB."""
    launches_lora: int
    """Kernels that a layer launches with LoRA, forward and backward, on the shape of Llama 2 7B. docs/kernels.md has
    the counts."""
    launches_full: int
    """The same where every parameter is trained."""


CURRENT_KERNELS: Final = Kernels(
    norm_copies=False,
    norm_result=False,
    gate_results=2,
    sharded_gate_results=4,
    expert_results=4,
    dropout_masks=False,
    passes_lora=10.6,
    passes_full=7.0,
    launches_lora=75,
    launches_full=63,
)
"""The trainer's fused kernels, and for experts those of transformers."""


def kept_in_layer(setup: TrainingSetup, number: int, *, kernels: Kernels = CURRENT_KERNELS) -> float:
    """Return the bytes of a token that layer ``number`` keeps for its backward pass, without recomputation."""
    sizes, adapters = setup.sizes, setup.adapters
    layer = sizes.layers[number]
    width = setup.number_format.bytes
    trained = adapters is None
    queries = sizes.heads * sizes.head_width
    keys = sizes.key_value_heads * sizes.head_width
    kept = 0.0
    for place, features in enumerate(layer.norm_widths):
        kept += _norm(setup, features, kernels)
        # Norms behind attention and feed-forward network have no linear layer behind them that would keep the result.
        if len(layer.norm_widths) == 2 or place in (0, 2):
            kept += width * features
    if layer.head_norm_widths:
        kept += _norm(setup, queries + keys, kernels)
    if sizes.window is not None and setup.length > sizes.window and not setup.packed:
        # A mask stands for the window then. torch takes a kernel that keeps keys and values for each head, and the
        # mask.
        keys = queries
        kept += setup.length
    # FlashAttention keeps queries, keys, values, its result, and the logarithm of the softmax's sum in fp32.
    kept += width * (2 * queries + 2 * keys) + 4 * sizes.heads
    for linear in layer.linears:
        if linear.part is Part.ROUTER:
            kept += 4 * linear.outputs * 2
    kept += _feed_forward(setup, layer.linears, kernels)
    if adapters is not None:
        kept += width * adapters.rank * adapters.per_layer[number]
        dropped = adapters.dropped_features[number]
        if dropped and (kernels.dropout_masks or setup.zero_stage == 3):
            kept += _dropout(setup, number)
    elif trained and sizes.norm is NormKind.LAYER:
        kept += 8
    return kept


def _norm(setup: TrainingSetup, features: int, kernels: Kernels) -> float:
    """Return the bytes of a token that a norm over ``features`` features keeps, without its result."""
    width = setup.number_format.bytes
    if setup.sizes.norm is NormKind.LAYER:
        # torch's own kernel keeps its input, a mean and a deviation.
        return width * features + 8
    kept = (4 if kernels.norm_copies else width) * features + 4
    if setup.adapters is None and kernels.norm_result:
        kept += (4 if setup.sizes.wide_norms else width) * features
    return kept


def _feed_forward(setup: TrainingSetup, linears: tuple[Linear, ...], kernels: Kernels) -> float:
    sizes, width = setup.sizes, setup.number_format.bytes
    results = kernels.sharded_gate_results if setup.zero_stage == 3 else kernels.gate_results
    kept = 0.0
    for linear in linears:
        if linear.part is Part.FEED_FORWARD and linear.name.endswith(("down_proj", "c_proj")):
            gated = not linear.name.endswith("c_proj")
            kept += width * linear.inputs * (results if gated else 2)
        if linear.part is Part.EXPERTS and linear.name.endswith("down_proj"):
            # Each token goes through several experts, which get a copy of its hidden state.
            one = width * (2 * sizes.hidden + linear.inputs * kernels.expert_results)
            kept += sizes.active_experts * one
    return kept


def _dropout(setup: TrainingSetup, number: int) -> float:
    """Return the bytes of a token that dropout on the inputs of the adapters of a layer adds: a mask of one byte and
    the dropped input for each adapter, while the frozen layers no longer keep their inputs."""
    adapters, sizes = setup.adapters, setup.sizes
    assert adapters is not None
    width = setup.number_format.bytes
    shared = width * (len(sizes.layers[number].norm_widths) * sizes.hidden + sizes.feed_forward)
    return (1 + width) * adapters.dropped_features[number] - shared


def kept_outside(setup: TrainingSetup, *, kernels: Kernels = CURRENT_KERNELS) -> float:
    """Return the bytes of a token that are kept outside of the layers: by the last norm and by the output head, where
    every token has a target."""
    sizes, width = setup.sizes, setup.number_format.bytes
    # The last norm, and the gradient of the hidden states that have a target. Under a head with an adapter these states
    # are kept instead.
    return _norm(setup, sizes.hidden, kernels) + width * sizes.hidden + TOKEN_BYTES


def frozen_start(setup: TrainingSetup, *, kernels: Kernels = CURRENT_KERNELS) -> float:
    """Return the bytes of a token that the first layer does not keep, because nothing before its first norm needs a
    gradient: the norm's part with LoRA, unless the embedding has an adapter or layers are computed again."""
    adapters = setup.adapters
    if adapters is None or adapters.on_embedding or setup.recompute:
        return 0.0
    return _norm(setup, setup.sizes.hidden, kernels)


def kept(setup: TrainingSetup, *, kernels: Kernels = CURRENT_KERNELS) -> int:
    """Return the bytes that the forward pass of a micro-batch keeps in the layers."""
    sizes, tokens = setup.sizes, setup.tokens
    if setup.recompute:
        # Only the input of each layer.
        return tokens * len(sizes.layers) * setup.number_format.bytes * sizes.hidden
    per_token = sum(kept_in_layer(setup, number, kernels=kernels) for number in range(len(sizes.layers)))
    return int(tokens * (per_token - frozen_start(setup, kernels=kernels)))


def largest_layer(setup: TrainingSetup, *, kernels: Kernels = CURRENT_KERNELS) -> int:
    """Return the bytes that a single layer keeps: what a layer needs that is computed again for its backward pass."""
    layers = range(len(setup.sizes.layers))
    return int(setup.tokens * max(kept_in_layer(setup, number, kernels=kernels) for number in layers))


def head_rows(setup: TrainingSetup) -> int:
    """Return the number of positions of which the output head computes the logits at a time."""
    return min(setup.tokens, max(1, CHUNK_LOGITS // setup.vocabulary))

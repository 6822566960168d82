"""The peak memory that a training is expected to need, which the check prints beside the measured peak.

The figures are counts, made on a CPU from the events of torch's allocator with scaled shapes. No GPU has confirmed
them. Once `core/finetune_core/planning` can say what a training needs, `expected_peak_bytes` must return the plan's
figure, and the constants of this module go.
"""

from __future__ import annotations

from tests.gpu.settings import Setup, Shape

KILOBYTE = 1000
BYTES_PER_TRAINED_PARAMETER = {0: 16.0, 1: 24.0, 2: 20.25, 3: 25.1}
"""Peak of weight, gradient, fp32 value, moments and copies of DeepSpeed together, by ZeRO stage, in one process in
bf16. Stage 1 has its peak in the update, and stage 2 in the backward pass."""
FROZEN_BYTES = 2.0
ACTIVATION_KILOBYTES = {"LoRA": 170.1, "Full": 186.4}
"""Kilobytes of activations that are kept for the backward pass, for a token and a layer of Llama-2-7B."""
HIDDEN_BYTES = 2
CHUNK_BYTES = 3 * (1 << 27)
"""Logits, log-probabilities and gradients of one chunk of the output head (`loss/head.py`)."""
SOURCE = "counted on a CPU; no plan gives a figure yet"


def expected_peak_bytes(setup: Setup, shape: Shape, *, parameters: int, trained: int) -> float:
    """Return the bytes that torch's allocator is expected to have allocated at most.

    ``parameters`` counts all parameters, and ``trained`` those that are trained. The constants fit models with the
    width of Llama-2-7B in bf16.
    """
    tokens = setup.rows * setup.length
    per_layer = tokens * ACTIVATION_KILOBYTES[setup.method] * KILOBYTE
    kept = per_layer * shape.num_hidden_layers
    if setup.recompute:
        # Only the input of each layer is kept, and the activations of the layer that is being computed again.
        kept = tokens * shape.hidden_size * HIDDEN_BYTES * shape.num_hidden_layers + per_layer
    states = FROZEN_BYTES * (parameters - trained) + BYTES_PER_TRAINED_PARAMETER[setup.stage] * trained
    return states + kept + CHUNK_BYTES

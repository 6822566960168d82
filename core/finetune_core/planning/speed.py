"""Estimates how fast a training is: FLOPs of a step, tokens per second, and so hours and cost.

`job_plan.py` calls `estimate_speed`. The time of a token is the sum of four parts that a GPU does one after the other:
large matrix products, attention, everything that is bound by the bandwidth of the memory, and communication that
nothing overlaps. Nothing here was measured on the GPU that a plan is for. The shares of the peaks that the parts reach
are the constants of this module, each with its source.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_core.planning.activations import CURRENT_KERNELS, Kernels, kept_in_layer
from finetune_core.planning.flops import ModelShape, training_flops, utilisation
from finetune_core.planning.gpu_types import GpuType
from finetune_core.planning.training_setup import TrainingSetup

MATRIX_SHARE = 0.69
"""Share of the peak FLOP/s that bf16 matrix products of the shapes of a 7B model reach: 235 of 312 TFLOP/s on an A100
(0.75), 620 to 680 of 989 on an H100 and an H200 (0.63 to 0.69)."""
ATTENTION_SHARE = 0.5
"""Share of the peak FLOP/s that FlashAttention-2 reaches, forward and backward together (Dao 2023, arXiv 2307.08691,
figure 5: 50 % to 70 % on an A100)."""
BANDWIDTH_SHARE = 0.76
"""Share of the peak bandwidth of the memory that elementwise kernels reach."""
LINK_SHARE = 0.75
"""Share of the bandwidth between GPUs that collective calls of 100 MB reach."""
LAUNCH_SECONDS = 5e-6
"""Seconds of the CPU to launch a kernel. A micro-batch never takes less than its launches."""
NODE_LINK_BANDWIDTH = 12.5
"""Bandwidth between two nodes in GB/s, in one direction, that all GPUs of a node share: Ethernet with 100 Gbit/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedEstimate:
    """How fast a training is."""

    flops_per_step: float
    """FLOPs of an optimizer step that the model needs, over all GPUs, without recomputation."""
    tokens_per_step: int
    """Tokens of an optimizer step, over all GPUs."""
    tokens_per_second: float
    """Tokens per second, over all GPUs."""
    model_flops_utilisation: float
    """FLOP/s that the model needs as a share of the peak of all GPUs, from 0 to 1."""
    seconds_per_step: float
    largest_part: str
    """What takes most of the time, as words for a sentence."""

    def hours(self, steps: int) -> float:
        """Return the hours of ``steps`` optimizer steps, without evaluations and checkpoints."""
        return steps * self.seconds_per_step / 3600


def model_shape(setup: TrainingSetup) -> ModelShape:
    """Return the sizes that the FLOPs of ``setup`` depend on."""
    sizes = setup.sizes
    return ModelShape(
        layers=len(sizes.layers),
        attention_width=sizes.heads * sizes.head_width,
        matrix_parameters=sizes.matrix_parameters,
        trained_parameters=setup.trained_parameters,
        adapters=setup.adapters is not None,
    )


def estimate_speed(setup: TrainingSetup, gpu: GpuType, *, kernels: Kernels = CURRENT_KERNELS) -> SpeedEstimate:
    """Return the speed of ``setup`` on GPUs of the type ``gpu``, where every sequence has the full length."""
    sizes, tokens = setup.sizes, setup.tokens
    shape = model_shape(setup)
    peak = gpu.tera_flops * 1e12
    squared = setup.micro_batch * setup.length**2
    needed = training_flops(shape, tokens, squared)
    attention_only = needed - training_flops(shape, tokens, 0)
    # Recomputation runs the forward pass of the layers again: 1 of 3 passes, or with frozen weights 1 of 2.
    again = 1 / (3 if setup.adapters is None else 2) if setup.recompute else 0.0
    matrix = (needed - attention_only) * (1 + again) / (peak * MATRIX_SHARE)
    # The backward pass of attention takes 2.5 times the forward pass, also where the weights are frozen.
    attention_forward = 2.0 * shape.layers * shape.attention_width * squared
    attention = attention_forward * (3.5 + setup.recompute) / (peak * ATTENTION_SHARE)
    passes = kernels.passes_lora if setup.adapters is not None else kernels.passes_full
    kept = sum(kept_in_layer(setup, number, kernels=kernels) for number in range(len(sizes.layers)))
    bandwidth = gpu.memory_bandwidth * 1e9 * BANDWIDTH_SHARE
    elementwise = kept * tokens * passes * (1.3 if setup.recompute else 1.0) / bandwidth
    micro_batches = setup.accumulation
    launches = kernels.launches_lora if setup.adapters is not None else kernels.launches_full
    launching = launches * len(sizes.layers) * LAUNCH_SECONDS * (1.3 if setup.recompute else 1.0)
    # The update reads and writes weights, moments and gradients: about 32 bytes for each parameter of the shard.
    update = 32 * setup.trained_parameters / setup.processes / bandwidth
    communication = _communication_seconds(setup, gpu)
    parts = {
        "matrix products": matrix * micro_batches,
        "attention": attention * micro_batches,
        "elementwise work, which the bandwidth of the memory bounds": elementwise * micro_batches + update,
        "communication": communication,
        "launches of kernels, for which the micro-batch is too small": max(
            0.0, launching - matrix - attention - elementwise
        )
        * micro_batches,
    }
    seconds = sum(parts.values())
    step_tokens = min(setup.global_batch, micro_batches * setup.micro_batch * setup.processes) * setup.length
    flops = needed / tokens * step_tokens
    return SpeedEstimate(
        flops_per_step=flops,
        tokens_per_step=step_tokens,
        tokens_per_second=step_tokens / seconds,
        model_flops_utilisation=utilisation(flops, seconds, setup.processes, peak) or 0.0,
        seconds_per_step=seconds,
        largest_part=max(parts, key=lambda name: parts[name]),
    )


def _communication_seconds(setup: TrainingSetup, gpu: GpuType) -> float:
    """Return the seconds of an optimizer step in which the ranks communicate and do nothing else. A ring of N ranks
    sends (N - 1) / N of a buffer for a gather, and as much for a reduction (arXiv 1910.02054, section 7)."""
    ranks = setup.processes
    if ranks == 1:
        return 0.0
    nodes = -(-ranks // setup.processes_per_node)
    links = gpu.link_bandwidth * LINK_SHARE
    if nodes > 1:
        # In a ring over several nodes, each GPU gets its share of the link between the nodes.
        links = min(links, NODE_LINK_BANDWIDTH * LINK_SHARE)
    share = (ranks - 1) / ranks
    width = setup.number_format.bytes
    gathers = 3 if setup.recompute else 2
    moved = 0.0
    if setup.zero_stage == 3:
        moved += setup.accumulation * (gathers * setup.parameters + setup.trained_parameters) * width
    elif setup.zero_stage == 2:
        moved += (setup.accumulation + 1) * setup.trained_parameters * width
    else:
        moved += 2 * setup.trained_parameters * width
    return moved * share / (links * 1e9)

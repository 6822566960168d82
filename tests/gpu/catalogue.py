"""The sections of the check, and the goals that its figures must reach. `runner.py` runs the sections, `verdict.py`
judges the goals, and docs/gpu-check.md shows both tables.

Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the check: a function that takes a `Check` (report.py)."""

    name: str
    module: str
    """Dotted name of the module that has the function."""
    function: str
    seconds: float
    """After this time the section is cut off. The import of the module is not included."""
    measures: str
    expects: str


SECTIONS: Sequence[Section] = (
    Section(
        name="machine",
        module="tests.gpu.machine",
        function="machine",
        seconds=30,
        measures="GPU, driver, versions, and the peaks of matrix products, elementwise work and copies to the host",
        expects="a GPU with bf16 that torch has kernels for",
    ),
    Section(
        name="join",
        module="tests.gpu.machine",
        function="join",
        seconds=30,
        measures="seconds until the rank has joined, and microseconds of an agreement between the ranks",
        expects="NCCL on a GPU, and the right sum",
    ),
    Section(
        name="stages",
        module="tests.gpu.exactness",
        function="stages",
        seconds=60,
        measures="losses and gradient norms of five steps in fp32, with the plain engine and at ZeRO stages 0 to 3",
        expects="those of a plain loop on the same device",
    ),
    Section(
        name="packing",
        module="tests.gpu.exactness",
        function="packing",
        seconds=25,
        measures="which attention kernel is chosen, and loss and gradient of packed examples, in fp32 and bf16",
        expects="those of the same examples alone, and Flash in bf16 on a GPU since Ampere",
    ),
    Section(
        name="resume",
        module="tests.gpu.exactness",
        function="resume",
        seconds=40,
        measures="how far two equal runs differ, and how far a resumed run differs from a straight one",
        expects="equal bits where two equal runs have equal bits, and otherwise a difference of the same size",
    ),
    Section(
        name="lora-512",
        module="tests.gpu.speed",
        function="lora_512",
        seconds=45,
        measures="LoRA of Llama-2-7B, 8 x 512 tokens: speed, memory, kernels, waits of the CPU, stall of a snapshot",
        expects="a snapshot that stalls the training for less than 0.3 s, and a copy to the GPU that does not wait",
    ),
    Section(
        name="lora-4096",
        module="tests.gpu.speed",
        function="lora_4096",
        seconds=50,
        measures="LoRA of Llama-2-7B, 1 x 4096 tokens: one example, and packed examples of about 200 tokens",
        expects="a finite loss",
    ),
    Section(
        name="full",
        module="tests.gpu.speed",
        function="full",
        seconds=75,
        measures="Full of Llama-2-7B at ZeRO stage 2 with recomputation, 8 x 512 and 1 x 4096 tokens, and a snapshot",
        expects="a finite loss; the whole training must fit",
    ),
    Section(
        name="generation",
        module="tests.gpu.speed",
        function="generation",
        seconds=40,
        measures="generated tokens per second with 8, 32 and 64 prompts at a time",
        expects="an answer of the full length for each prompt",
    ),
    Section(
        name="out-of-memory",
        module="tests.gpu.failures",
        function="out_of_memory",
        seconds=20,
        measures="what the trainer says when a step gets no memory",
        expects="exit code 66, a sentence that names a field to change, and a device that computes on",
    ),
    Section(
        name="lost-rank",
        module="tests.gpu.failures",
        function="lost_rank",
        seconds=35,
        measures="what the trainer says when NCCL refuses two ranks on one GPU; on the CPU, when a rank leaves",
        expects="exit code 75, and a sentence that names the cause",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure that must be reached, and the source of the goal."""

    name: str
    section: str
    case: str
    figure: str
    """Name of the figure in the line of ``section`` and ``case``."""
    source: str
    at_least: float | None = None
    at_most: float | None = None
    """Exactly one of the two bounds is set."""
    relative_to: tuple[str, str] | None = None
    """Section and case of another line. The figure is divided by the figure of the same name there."""
    gpu: str = ""
    """The goal is judged only on GPUs whose name contains this text."""


PROJECT = "the project's goals for its first GPU"
GOALS: Sequence[Goal] = (
    Goal(
        name="LoRA 7B, 8 x 512: TFLOP/s",
        section="lora-512",
        case="8 x 512",
        figure="tflops",
        at_least=500,
        gpu="H200",
        source=f"{PROJECT}; NeMo AutoModel reports 402 TFLOP/s for LoRA on an H100",
    ),
    Goal(
        name="LoRA 7B, 8 x 512: tokens per second",
        section="lora-512",
        case="8 x 512",
        figure="tokens_per_second",
        at_least=18_700,
        gpu="H200",
        source="500 TFLOP/s divided by 26.7 GFLOP a token",
    ),
    Goal(
        name="LoRA 7B: packed 1 x 4096 as a share of 8 x 512, tokens per second",
        section="lora-4096",
        case="1 x 4096 packed",
        figure="tokens_per_second",
        at_least=0.9,
        relative_to=("lora-512", "8 x 512"),
        source=PROJECT,
    ),
    Goal(
        name="Full 7B, 8 x 512: tokens per second",
        section="full",
        case="8 x 512",
        figure="tokens_per_second",
        at_least=10_600,
        gpu="H200",
        source="llm-foundry reports 10.6k tokens/s for 7B on an H100",
    ),
    Goal(
        name="LoRA as a multiple of Full, 8 x 512, tokens per second",
        section="lora-512",
        case="8 x 512",
        figure="tokens_per_second",
        at_least=1.4,
        relative_to=("full", "8 x 512"),
        source=PROJECT,
    ),
    Goal(
        name="LoRA 7B: waits of the CPU for the GPU in a micro-batch",
        section="lora-512",
        case="waits",
        figure="waits_per_micro_batch",
        at_most=0,
        source=PROJECT,
    ),
    Goal(
        name="LoRA 7B: waits of the CPU for the GPU in a step, without those of its micro-batches",
        section="lora-512",
        case="waits",
        figure="waits_per_step",
        at_most=1,
        source=PROJECT,
    ),
)

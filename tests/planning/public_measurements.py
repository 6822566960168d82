"""What others have measured or claimed, beside what the plan says of the same training with this trainer.

`test_planning_page.py` writes the table into docs/planning.md, and checks that a difference of more than 10 % has an
explanation. Most figures are of other programs, which keep other tensors than this trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from finetune_core.planning.activations import Kernels
from finetune_core.planning.gpu_types import GIBIBYTE, find_gpu
from finetune_core.planning.host_needs import adapter_bytes, host_needs
from finetune_core.planning.memory import memory_plan
from finetune_core.planning.model_families import model_sizes
from finetune_core.planning.speed import estimate_speed
from finetune_core.planning.training_setup import TrainingSetup, adapter_setup
from tests.planning.memory_cases import MODELS

TOLERANCE = 0.1
"""Difference between a published figure and the plan's beyond which an explanation is needed."""
A100 = find_gpu("A100-80GB")


@dataclass(frozen=True, kw_only=True)
class PublicFigure:
    """A published figure and the plan's."""

    source: str
    training: str
    published: float
    unit: str
    planned: Callable[[], float]
    explanation: str = ""
    """Why the figures differ by more than TOLERANCE."""

    @property
    def difference(self) -> float:
        """The plan's figure as a share of the published one, minus 1."""
        return self.planned() / self.published - 1


def setup(
    model: str, *, rank: int | None = None, targets: tuple[str, ...] = (), added: int = 0, **values: Any
) -> TrainingSetup:
    """Return a training of ``model`` on 8 GPUs of one node, with the settings ``values``."""
    sizes = model_sizes(MODELS[model])
    adapters = adapter_setup(sizes, rank=rank, targets=targets, added_rows=added) if rank is not None else None
    whole = TrainingSetup(sizes=sizes, adapters=adapters, processes=8, processes_per_node=8, zero_stage=2)
    changed = replace(whole, added_rows=added, **values)
    return replace(
        changed,
        global_batch=changed.global_batch if "global_batch" in values else changed.micro_batch * changed.processes,
    )


def gigabytes(training: TrainingSetup) -> float:
    """Return the peak of the tensors of ``training`` on one GPU in GB, without what CUDA takes."""
    return memory_plan(training).step_peak / 1e9


def needed_gibibytes(training: TrainingSetup) -> float:
    """Return what ``training`` needs on one GPU in GiB, with what CUDA takes."""
    return memory_plan(training).needed / GIBIBYTE


def million_tokens_an_hour(training: TrainingSetup) -> float:
    """Return the speed of ``training`` on A100-80GB over all GPUs."""
    return estimate_speed(training, A100).tokens_per_second * 3600 / 1e6


def fsdp_megabytes(rank: int | None, gpus: int) -> float:
    """Return the peak of a training of Llama 2 7B on ``gpus`` GPUs with 4 x 4096 tokens and sharded weights, in MB."""
    training = setup("Llama-2-7B", rank=rank, zero_stage=3, processes=gpus, length=4096, micro_batch=4, recompute=True)
    return 1000 * gigabytes(training)


LITGPT = "litgpt, table of resources, one A100-40GB, length 1304"
ATORCH = "atorch (dlrover) README, FSDP on A100, 4 x 4096 tokens, recomputation"
STUDY = "Anyscale, LoRA against full fine-tuning (2023), 8 x A100-80GB"
STUDY_LATER = "Anyscale, fine-tuning costs (January 2024), 8 x A100-80GB, length 512"
ONE = {"processes": 1, "processes_per_node": 1, "length": 1304}
QV = ("q_proj", "v_proj")
FULL_LOGITS = (
    "The published run computes the logits of all 16,384 tokens at once. In bf16 and fp32, with their gradients, they"
    " take 8.4 GB. This trainer computes a chunk at a time. The rest is not explained by what is published; the figure"
    " may be the memory that the allocator reserved."
)

WITHOUT_KERNELS = Kernels(
    norm_copies=True,
    norm_result=True,
    gate_results=4,
    sharded_gate_results=4,
    expert_results=4,
    dropout_masks=True,
    passes_lora=15.0,
    passes_full=10.7,
    launches_lora=168,
    launches_full=109,
)
"""The kernels of transformers and peft."""


@dataclass(frozen=True, kw_only=True)
class LitgptRun:
    """A row of litgpt's table of resources."""

    training: str
    published: float
    """GB."""
    setup: TrainingSetup

    @property
    def without_kernels(self) -> float:
        """The plan's figure where norms and feed-forward layers compute as in transformers, in GB."""
        return memory_plan(self.setup, kernels=WITHOUT_KERNELS).step_peak / 1e9


LITGPT_RUNS = (
    LitgptRun(
        training="Llama 2 7B, LoRA of q and v, micro-batch 1",
        published=21.30,
        setup=setup("Llama-2-7B", rank=8, targets=QV, **ONE),
    ),
    LitgptRun(
        training="the same, micro-batch 2",
        published=29.07,
        setup=setup("Llama-2-7B", rank=8, targets=QV, micro_batch=2, **ONE),
    ),
    LitgptRun(
        training="Llama 2 13B, LoRA of q and v, micro-batch 1",
        published=38.12,
        setup=setup("Llama-2-13B", rank=8, targets=QV, **ONE),
    ),
)

FIGURES: tuple[PublicFigure, ...] = (
    *(
        PublicFigure(
            source=LITGPT,
            training=run.training,
            published=run.published,
            unit="GB",
            planned=partial(gigabytes, run.setup),
            explanation="The norms and the feed-forward layers of this trainer keep fewer tensors than those of litgpt."
            f" Where they keep as many, the plan is {run.without_kernels:.4g} GB.",
        )
        for run in LITGPT_RUNS
    ),
    *(
        PublicFigure(
            source=ATORCH,
            training=f"Llama 2 7B, {method}, {gpus} GPUs",
            published=published,
            unit="MB",
            planned=partial(fsdp_megabytes, rank, gpus),
            explanation=FULL_LOGITS,
        )
        for method, rank, gpus, published in (
            ("LoRA r 16", 16, 8, 33_354),
            ("LoRA r 16", 16, 16, 31_736),
            ("LoRA r 16", 16, 32, 30_926),
            ("Full", None, 8, 39_596),
            ("Full", None, 16, 34_777),
            ("Full", None, 32, 32_367),
        )
    ),
    PublicFigure(
        source="LongLoRA (arXiv 2309.12307), table 12, ZeRO-2 on 8 x A100",
        training="Llama 2 7B, LoRA, 1 x 8192 tokens, recomputation",
        published=25.7,
        unit="GB",
        planned=lambda: gigabytes(setup("Llama-2-7B", rank=8, length=8192, recompute=True)),
        explanation="The published run computes the logits of all 8,192 tokens at once (4.2 GB in bf16 and fp32, with"
        " their gradients). The rest is not explained by what is published.",
    ),
    PublicFigure(
        source=STUDY,
        training="adapter of 7B, r 8, all linear layers and both embeddings with 4 added tokens",
        published=41.1,
        unit="MB",
        planned=lambda: adapter_bytes(setup("Llama-2-7B", rank=8, added=4)) / 1e6,
    ),
    PublicFigure(
        source=STUDY,
        training="the same of 70B (20 models of 7B, 280 GB, take the space of about 700 adapters and the base)",
        published=208.4,
        unit="MB",
        planned=lambda: adapter_bytes(setup("Llama-2-70B", rank=8, added=4)) / 1e6,
    ),
    PublicFigure(
        source=STUDY,
        training="20 models of 7B",
        published=280,
        unit="GB",
        planned=lambda: 20 * host_needs(setup("Llama-2-7B"), shared_memory=0).artifact / 1e9,
    ),
    PublicFigure(
        source=STUDY,
        training="7B, speed of LoRA with micro-batch 8 a GPU (batch 64) to that of Full with 1 (batch 8)",
        published=1.30,
        unit="times",
        planned=lambda: (
            million_tokens_an_hour(setup("Llama-2-7B", rank=8, length=512, micro_batch=8, recompute=True, zero_stage=3))
            / million_tokens_an_hour(setup("Llama-2-7B", length=512, recompute=True, zero_stage=3))
        ),
        explanation="With ZeRO-3 as in the study, a micro-batch of 512 tokens gathers all weights for a short"
        " computation, and nothing overlaps the gathers here. The study's DeepSpeed overlaps them.",
    ),
    PublicFigure(
        source=STUDY_LATER,
        training="7B, Full, batch 64",
        published=101.5,
        unit="M tokens an hour",
        planned=lambda: million_tokens_an_hour(
            setup("Llama-2-7B", length=512, micro_batch=8, recompute=True, zero_stage=3)
        ),
        explanation="The settings beyond length and batch are not published. The plan counts recomputation, and gathers"
        " of ZeRO-3 that nothing overlaps.",
    ),
    PublicFigure(
        source=STUDY_LATER,
        training="70B, batch 16 (LoRA, as Full does not fit)",
        published=11.2,
        unit="M tokens an hour",
        planned=lambda: million_tokens_an_hour(
            setup("Llama-2-70B", rank=8, length=512, micro_batch=2, recompute=True, zero_stage=3)
        ),
        explanation="With 1,024 tokens in a micro-batch, gathers of 138 GB, which nothing overlaps, take a large part"
        " of the time here.",
    ),
)
"""The figures, in the order of the page."""


@dataclass(frozen=True, kw_only=True)
class FitClaim:
    """A claim of the study about what trains on one node of 8 A100-80GB."""

    training: str
    fits: bool
    setup: TrainingSetup


CLAIMS: tuple[FitClaim, ...] = tuple(
    FitClaim(training=name, fits=fits, setup=training)
    for name, fits, training in (
        (
            "7B, Full, 8 sequences of 512 tokens",
            True,
            setup("Llama-2-7B", length=512, micro_batch=1, recompute=True, zero_stage=3),
        ),
        ("7B, LoRA, 64 sequences", True, setup("Llama-2-7B", rank=8, length=512, micro_batch=8)),
        ("13B, Full, 8 sequences", True, setup("Llama-2-13B", length=512, micro_batch=1, recompute=True, zero_stage=3)),
        ("13B, LoRA, 8 sequences", True, setup("Llama-2-13B", rank=8, length=512, micro_batch=1)),
        (
            "70B, LoRA, 8 sequences",
            True,
            setup("Llama-2-70B", rank=8, length=512, micro_batch=1, recompute=True, zero_stage=3),
        ),
        (
            "70B, Full, 8 sequences",
            False,
            setup("Llama-2-70B", length=512, micro_batch=1, recompute=True, zero_stage=3),
        ),
    )
)

"""The list of the study's claims about which a comparison of runs can speak.

Source: A. Niederfahrenhorst, K. Hakhamaneshi, R. Ahmad, "Fine-tuning LLMs: LoRA or full-parameter?" (Anyscale,
September 2023). The page of the comparison has a section for each claim."""

from __future__ import annotations

from finetune_cli.compare.claims import pairs, single_runs
from finetune_cli.compare.claims.findings import Claim, Comparison, Finding

STUDY = "Anyscale's study of LoRA and full-parameter fine-tuning of Llama 2 (September 2023)"

CLAIMS = (
    Claim(
        1,
        "Three tasks improve",
        "Fine-tuning raises the scores of ViGGO (functional representations), GSM8K (mathematics) and SQL.",
        single_runs.tasks_improve,
    ),
    Claim(
        2,
        "One recipe for both methods",
        "LoRA and full fine-tuning use the same recipe and differ in the method only.",
        pairs.same_recipe,
    ),
    Claim(
        3,
        "LoRA's recipe",
        "LoRA with rank 8 and alpha 16 on all dense layers trains with the rate 1e-4, and with 3e-5 where 1e-4 is"
        " unstable.",
        single_runs.lora_recipe,
    ),
    Claim(
        4,
        "The recipe of full fine-tuning",
        "Every parameter is trained with the rate 5e-6, AdamW without weight decay, a linear schedule with warm-up,"
        " bf16, gradient checkpointing, context 512 and seed 42.",
        single_runs.full_recipe,
    ),
    Claim(
        5,
        "Memory peaks at checkpoints",
        "Memory peaks when a checkpoint is saved; optimizer state and gradients take about 12 times the model's"
        " memory.",
        single_runs.memory_at_checkpoints,
    ),
    Claim(
        6,
        "The best checkpoint",
        "The checkpoint with the least validation perplexity is the best one, and it need not be the last one.",
        single_runs.best_checkpoint,
    ),
    Claim(
        7,
        "A high rate explodes",
        "LoRA with the rate 1e-4 made the training loss explode, while the perplexity still looked fine.",
        single_runs.high_rate_explodes,
    ),
    Claim(
        8,
        "Task prompts stabilise LoRA",
        "A description of the task in the prompt keeps LoRA stable where plain concatenation is unstable.",
        pairs.prompts_stabilise,
    ),
    Claim(
        9,
        "Added tokens",
        "Four added tokens get new, trained rows in the embedding, and a checkpoint must hold these rows.",
        single_runs.added_tokens,
    ),
    Claim(
        10,
        "LoRA's results are tiny",
        "20 full models of 7B take the space of one 70B base model with about 700 adapters.",
        pairs.small_artifacts,
    ),
    Claim(11, "LoRA is faster", "LoRA trains about 30 % more tokens per second.", pairs.throughput),
    Claim(12, "LoRA needs less memory", "LoRA's memory is far below that of full fine-tuning.", pairs.memory),
    Claim(
        13,
        "LoRA converges no faster",
        "After 20 minutes both methods have comparable perplexities.",
        pairs.convergence,
    ),
    Claim(
        14,
        "LoRA comes close",
        "LoRA's scores are close to those of full fine-tuning, which is slightly better, most so in mathematics.",
        pairs.close_scores,
    ),
)


def findings_of(comparison: Comparison) -> list[tuple[Claim, Finding]]:
    """Return each claim with what the compared runs say about it."""
    return [(claim, claim.check(comparison)) for claim in CLAIMS]

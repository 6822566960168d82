"""Code that `padded.py` and `sft.py`, the two compared programs with transformers' Trainer, share: the model with LoRA
adapters, the training arguments, the clock and the losses. Only `padded.py` uses the tokenised rows (`examples`)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from finetune_core.api.method import LoRASpec
from finetune_trainer.model.adapters import add_adapters
from tests.bench.peers.workload import LORA_ALPHA, LORA_RANK, TEMPLATE, Clock, Workload

IGNORED = -100
DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The names of the linear layers of a Llama model that get LoRA adapters."""


class Timing(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """A callback for transformers' Trainer that records the end of each optimizer step in a `Clock`."""

    def __init__(self, clock: Clock) -> None:
        """Record the ends of the optimizer steps in ``clock``."""
        self._clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the end of an optimizer step."""
        self._clock.update_ended()


def load(workload: Workload) -> tuple[Any, Any]:
    """Load the tokenizer and the fp32 model, and add the adapters. The adapters have the same initial values as in our
    trainer."""
    torch.set_num_threads(workload.threads)
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    tokenizer.padding_side = "right"
    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    lora = LoRASpec(rank=LORA_RANK, alpha=LORA_ALPHA)
    return tokenizer, add_adapters(model, lora, targets=DENSE, seed=workload.seed, base_name="bench")


def examples(workload: Workload, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return token ids and labels of every row. Prompt tokens have the label `IGNORED`, so that the loss leaves them
    out."""
    made = []
    for row in workload.read_rows():
        prompt = tokenizer(TEMPLATE.replace("{prompt}", row["question"]))["input_ids"]
        answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        made.append({"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + answer})
    return made


def arguments(workload: Workload, folder: str) -> dict[str, Any]:
    """Return the arguments of `TrainingArguments` for both contenders. Learning rate, gradient clipping and weight
    decay are those of our trainer's run in `ours.py`."""
    return {
        "output_dir": folder,
        "max_steps": workload.updates,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": workload.seed,
        "dataloader_pin_memory": False,
    }


def logged_losses(history: list[dict[str, Any]]) -> list[float]:
    """Return the training loss of every step. ``history`` is the `log_history` of a Trainer."""
    return [float(entry["loss"]) for entry in history if "loss" in entry]

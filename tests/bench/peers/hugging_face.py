"""The common part of the two Hugging Face contenders: the model with the same adapters, the tokenised rows, the
training arguments and the clock."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from finetune_core.api.method import LoRASpec
from finetune_trainer.model.load import add_adapters
from tests.bench.peers.workload import LORA_ALPHA, LORA_RANK, TEMPLATE, Clock, Workload

IGNORED = -100
DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The names of all dense layers of a Llama model."""


class Timing(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """A callback that calls the clock at the end of each optimizer step."""

    def __init__(self, clock: Clock) -> None:
        """Call ``clock`` at the end of each step."""
        self._clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the end of an optimizer step."""
        self._clock.update_ended()


def load(workload: Workload) -> tuple[Any, Any]:
    """Return the tokenizer and the fp32 model, with the same initial adapters as in our trainer."""
    torch.set_num_threads(workload.threads)
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    tokenizer.padding_side = "right"
    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    lora = LoRASpec(rank=LORA_RANK, alpha=LORA_ALPHA)
    return tokenizer, add_adapters(model, lora, targets=DENSE, seed=workload.seed, base_name="bench")


def examples(workload: Workload, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return token ids and labels of every row. The labels of prompt tokens are `IGNORED`, so that they carry no
    loss."""
    made = []
    for row in workload.read_rows():
        prompt = tokenizer(TEMPLATE.replace("{prompt}", row["question"]))["input_ids"]
        answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        made.append({"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + answer})
    return made


def arguments(workload: Workload, folder: str) -> dict[str, Any]:
    """Return arguments of `TrainingArguments` with which all contenders make the same updates."""
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
    """Return the training loss of every step from a Trainer's log history."""
    return [float(entry["loss"]) for entry in history if "loss" in entry]

"""The contender (compared program) with transformers' Trainer and peft. The last argument selects the padding of the
rows: either to the workload's `max_length` tokens or to the longest row of the batch.

    python -m tests.bench.peers.padded WORKLOAD OUT max_length|longest
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from tests.bench.peers import hugging_face
from tests.bench.peers.workload import Clock, Workload


class InOrder(Trainer):  # type: ignore[misc]  # transformers has no types here
    """A Trainer that reads the rows in the order of the file instead of shuffling them, so that it trains on the same
    batches as our trainer."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def main() -> None:
    """Train on the workload in the file WORKLOAD, and write the figures to the file OUT."""
    workload = Workload.model_validate_json(Path(sys.argv[1]).read_text())
    padding = {"max_length": "max_length", "longest": True}[sys.argv[3]]
    tokenizer, model = hugging_face.load(workload)
    examples = hugging_face.examples(workload, tokenizer)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=model,
            args=TrainingArguments(
                per_device_train_batch_size=workload.micro_batch,
                gradient_accumulation_steps=workload.batch // workload.micro_batch,
                **hugging_face.arguments(workload, folder),
            ),
            train_dataset=[dict(example, attention_mask=[1] * len(example["input_ids"])) for example in examples],
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=padding, max_length=workload.max_length),
            callbacks=[hugging_face.Timing(clock)],
        )
        trainer.train()
    tokens = []
    for update in range(workload.updates):
        batch = examples[update * workload.batch : (update + 1) * workload.batch]
        supervised = sum(int((torch.tensor(example["labels"]) != hugging_face.IGNORED).sum()) for example in batch)
        tokens.append((supervised, sum(len(example["input_ids"]) for example in batch)))
    losses = hugging_face.logged_losses(trainer.state.log_history)
    Path(sys.argv[2]).write_text(clock.measured(tokens, losses).model_dump_json())


if __name__ == "__main__":
    main()

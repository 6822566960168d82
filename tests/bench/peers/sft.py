"""The contender (compared program) with trl's SFTTrainer and its best settings for short rows: best-fit packing, and a
loss on answers only.

trl packs over the whole data set, so its updates hold other rows than the updates of the other contenders. The rows of
all updates together are the same: each row is trained once. The number of updates may be smaller, because the packed
sequences can't always be divided among that many updates. transformers keeps packed rows apart by their position ids.

    python -m tests.bench.peers.sft WORKLOAD OUT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.bench.peers import hugging_face
from tests.bench.peers.workload import TEMPLATE, Clock, Workload, in_one_epoch


def build(workload: Workload, model: Any, tokenizer: Any, folder: str, accumulation: int, clock: Clock) -> SFTTrainer:
    """Return an SFTTrainer in which each update adds up the gradients of ``accumulation`` packed sequences."""
    rows = [
        {"prompt": TEMPLATE.replace("{prompt}", row["question"]), "completion": row["answer"]}
        for row in workload.read_rows()
    ]
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
            max_length=workload.max_length,
            packing=True,
            packing_strategy="bfd",
            completion_only_loss=True,
            **hugging_face.arguments(workload, folder),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[hugging_face.Timing(clock)],
    )


def main() -> None:
    """Train on the workload in the file WORKLOAD, and write the figures to the file OUT."""
    workload = Workload.model_validate_json(Path(sys.argv[1]).read_text())
    tokenizer, model = hugging_face.load(workload)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        packed = len(build(workload, model, tokenizer, folder, 1, Clock()).train_dataset)
        # With a fixed number of updates, those that are left after an epoch would train rows a second time.
        accumulation, updates = in_one_epoch(packed, workload.updates)
        workload = workload.model_copy(update={"updates": updates})
        trainer = build(workload, model, tokenizer, folder, accumulation, clock)
        consumed: list[tuple[int, int]] = []
        collate = trainer.data_collator

        def counting(features: list[dict[str, Any]]) -> Any:
            batch = collate(features)
            supervised = int((batch["labels"] != hugging_face.IGNORED).sum())
            consumed.append((supervised, int(batch["input_ids"].numel())))
            return batch

        trainer.data_collator = counting
        trainer.train()
    if len(consumed) != packed or trainer.state.global_step != updates:
        sys.exit(
            f"error: {len(consumed)} sequences were trained in {trainer.state.global_step} updates, and there are"
            f" {packed} sequences for {updates} updates"
        )
    groups = [consumed[start : start + accumulation] for start in range(0, len(consumed), accumulation)]
    tokens = [(sum(s for s, _ in group), sum(r for _, r in group)) for group in groups]
    losses = hugging_face.logged_losses(trainer.state.log_history)
    Path(sys.argv[2]).write_text(clock.measured(tokens, losses).model_dump_json())


if __name__ == "__main__":
    main()

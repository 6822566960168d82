"""A training program that uses nothing of this project: the Trainer of transformers on a tiny model with random rows.

`test_stock_trainer.py` runs this program as `python -m tests.operator.stock_trainer FOLDER [CRASH_AT]`. If CRASH_AT is
given, the process exits at step CRASH_AT without clean-up. A second run resumes from the last checkpoint in FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

STEPS, SAVED_EVERY = 60, 15
ROWS, TOKENS, VOCABULARY = 512, 128, 256


def main(folder: Path, crash_at: int | None) -> None:
    # The imports are local so that the test can import the constants of this module without importing torch.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Crash(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        """Ends the process at the end of step ``crash_at`` without clean-up, as a crash does."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == crash_at:
                os._exit(9)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
    )
    rows = [{"input_ids": (row := torch.randint(0, VOCABULARY, (TOKENS,))), "labels": row} for _ in range(ROWS)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        logging_steps=5,
        save_steps=SAVED_EVERY,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [Crash()] if crash_at else []
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)

"""One rank that scores a model with several batch sizes and ZeRO stages: `python -m tests.trainer.score_many FILE`.

FILE is JSON. Its fields `stages` and `sizes` list the ZeRO stages and batch sizes, `model` is the folder of the model,
and `examples` are the tokenised texts to score. `context` is the longest text in tokens that the model can read. The
rank writes perplexities and answers as JSON to the path in the field `out`. `test_evaluation.py` starts one or two
ranks and compares their figures with those of plain transformers. At the end rank 0 is told to stop while all prompts
are answered in as few batches as possible. If the ranks stop there, the last entry of the output has a field `cut`
with the batches of answers that the rank got before StopAgreed was raised.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune_core.contract import EvaluationConfig, GenerationConfig, OptimizationConfig
from finetune_trainer.data.examples import Example, example_set
from finetune_trainer.pod.errors import StopAgreed
from finetune_trainer.ranks import process


class StopSoon:
    """A callable that stands in for the check whether this process received SIGTERM. The result is True from the fourth
    call on after `armed` was set."""

    def __init__(self) -> None:
        self.armed, self.asked = False, 0

    def __call__(self) -> bool:
        self.asked += self.armed
        return self.asked > 3


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    process.prepare_environment(Path(asked["scratch"]))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_trainer.data.micro_batches import MicroBatcher
    from finetune_trainer.engine.engine import Engine
    from finetune_trainer.evaluation.generation import Decoding, generate_answers
    from finetune_trainer.evaluation.scorer import Scorer, all_tokens
    from finetune_trainer.ranks.gang import Gang

    class CountingGang(Gang):
        """Counts the collectives, and how often the training thread says that it makes progress."""

        collectives = notes = 0

        def note_progress(self) -> None:
            super().note_progress()
            self.notes += 1

        def _reduce(self, *arguments: Any) -> None:
            super()._reduce(*arguments)
            self.collectives += 1

    stop = StopSoon()
    gang = CountingGang(device=torch.device("cpu"), stop=stop)
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    examples = example_set([Example(ids, [tuple(span) for span in spans]) for ids, spans in asked["examples"]])
    found: list[dict[str, Any]] = []
    for stage in asked["stages"]:
        model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
        optimization = OptimizationConfig(
            learning_rate=1e-3,
            global_batch_size=8,
            micro_batch_size=8,
            schedule="Constant",
            warmup_steps=0,
            weight_decay=0,
            gradient_clipping=1,
            precision="fp32",
            gradient_checkpointing=False,
            seed=1,
            zero_stage=stage,
        )
        engine = Engine(model, optimization, gang.device)
        for size in asked["sizes"]:
            batches = MicroBatcher(
                examples, rank=gang.rank, world_size=gang.world_size, pad=tokenizer.eos_token_id, capacity=None
            )
            config = EvaluationConfig(artifact_from="Last", generation=GenerationConfig(batch_size=size))
            scorer = Scorer(engine, gang, batches, config, None, batch_size=size, context=128, phase=lambda _: None)
            decoding = Decoding(
                tokenizer=tokenizer,
                stop_ids=[tokenizer.eos_token_id],
                suffix=asked["suffix"],
                suppressed=asked["suppressed"],
                batch_size=size,
                max_new_tokens=asked["newTokens"],
                context=asked["context"],
            )
            prompts = [list(example.ids[: example.prompt_tokens]) for example in examples]
            own: dict[int, str] = {}
            notes, collectives = gang.notes, gang.collectives
            for batch in generate_answers(engine, gang, prompts, decoding):
                own |= batch
            notes, collectives = gang.notes - notes, gang.collectives - collectives
            engine.exclude_tokens(asked["suppressed"])
            hidden = scorer.perplexity(examples)
            engine.exclude_tokens(())
            found.append(
                {
                    "stage": stage,
                    "size": size,
                    "perplexity": scorer.perplexity(examples),
                    "hidden": hidden,
                    "all": scorer.perplexity(all_tokens(examples)),
                    "answers": own,
                    "notes": notes,
                    "collectives": collectives,
                }
            )
        if stage == asked["stages"][-1]:
            # The ranks never forget a stop, so the stop comes after everything else.
            stop.armed, cut = gang.is_first, list[dict[int, str]]()
            try:
                for batch in generate_answers(engine, gang, prompts, replace(decoding, batch_size=len(prompts))):
                    cut.append(batch)
            except StopAgreed:
                found[-1]["cut"] = cut
        engine.close()
    Path(asked["out"]).write_text(json.dumps(found))
    gang.final_barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

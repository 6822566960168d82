"""Generates answers of the base model and of the tuned model, and counts the answers that are exactly right.

The input is the base model's folder, the artifact's folder (an adapter or a model) and a jsonl file of rows. The output
is the answers of both models as JSON. The demo starts this module as a separate process, because the module needs torch
and the demo itself does not:

    python -m examples.demo.answers --base MODEL --tuned ARTIFACT --rows heldout.jsonl --output answers.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = "Sentence: {sentence}\nMeaning:"
"""Template that makes the same prompts as the template in the quickstart job files."""
MAX_NEW_TOKENS = 28
"""Largest number of tokens in a generated answer. The longest reference answer has 25 tokens, its end token
included."""
BATCH = 40
"""Number of sentences in one call of `generate`."""


def answers(model: Any, tokenizer: Any, sentences: Sequence[str]) -> list[str]:
    """Return the model's answer to each sentence, generated without sampling. Only the first line of each answer is
    returned, because a reference answer has one line."""
    found: list[str] = []
    for start in range(0, len(sentences), BATCH):
        prompts = [TEMPLATE.format(sentence=sentence) for sentence in sentences[start : start + BATCH]]
        # Padding is on the left, so that all answers of a batch begin at the same position.
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        with torch.inference_mode():
            tokens = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [(text.strip().splitlines() or [""])[0].strip() for text in texts]
    return found


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in ``folder``. Where the tokenizer has no padding token, the end token is used for
    padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load(folder: Path) -> Any:
    """Return the model in ``folder`` with weights in fp32, because CPUs without bf16 arithmetic compute fp32 faster."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compare(base_folder: Path, tuned_folder: Path, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Return both models' answers to ``rows``, and for each model the share of answers that are exactly right."""
    sentences = [row["sentence"] for row in rows]
    tokenizer = load_tokenizer(base_folder)
    model = load(base_folder)
    before = answers(model, tokenizer, sentences)
    if (tuned_folder / "adapter_config.json").exists():
        # The adapter is merged into the model's weights, so that generation is as fast as without an adapter.
        model = PeftModel.from_pretrained(model, tuned_folder).merge_and_unload()
    else:
        model = load(tuned_folder)
    after = answers(model, tokenizer, sentences)
    answered = [row | {"base": base, "tuned": tuned} for row, base, tuned in zip(rows, before, after, strict=True)]
    share = {name: sum(row[name] == row["meaning"] for row in answered) / len(answered) for name in ("base", "tuned")}
    return {"exactMatch": share, "rows": answered}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the answers of both models, and their shares of right answers, into the file that the command line
    names."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo.answers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="the base model")
    parser.add_argument("--tuned", type=Path, required=True, metavar="FOLDER", help="the adapter, or a whole model")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="jsonl with `sentence` and `meaning`")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the answers go, as JSON")
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    options.output.write_text(json.dumps(compare(options.base, options.tuned, rows), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

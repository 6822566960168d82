"""Asks the base and the tuned model for the meaning of sentences and counts the answers that are exactly right.

In: a base model's folder, an artifact's folder (adapter or model) and a jsonl file. Out: every answer of both as JSON.
A program of its own, started by the demo, because it needs torch:

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

TEMPLATE = "Sentence: {sentence}\nMeaning: "
"""As in the job files."""
MAX_NEW_TOKENS = 28
"""The longest meaning has 25 with its end token."""
BATCH = 40


def answers(model: Any, tokenizer: Any, sentences: Sequence[str]) -> list[str]:
    """Return the model's greedy answer to each sentence: the first line, as a meaning has one."""
    found: list[str] = []
    for start in range(0, len(sentences), BATCH):
        prompts = [TEMPLATE.format(sentence=sentence) for sentence in sentences[start : start + BATCH]]
        # Padding stands at the left, so that every answer begins at the same place.
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        with torch.inference_mode():
            tokens = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [(text.strip().splitlines() or [""])[0].strip() for text in texts]
    return found


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in ``folder``; where it has no padding token, the end token pads."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load(folder: Path) -> Any:
    """Return the model in ``folder``, in fp32: CPUs without bf16 arithmetic compute it faster."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compare(base_folder: Path, tuned_folder: Path, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Return both models' answers to ``rows`` and the share of each that is exactly right."""
    sentences = [row["sentence"] for row in rows]
    tokenizer = load_tokenizer(base_folder)
    model = load(base_folder)
    before = answers(model, tokenizer, sentences)
    if (tuned_folder / "adapter_config.json").exists():
        # Folded into the weights: generation costs what it costs without an adapter.
        model = PeftModel.from_pretrained(model, tuned_folder).merge_and_unload()
    else:
        model = load(tuned_folder)
    after = answers(model, tokenizer, sentences)
    answered = [row | {"base": base, "tuned": tuned} for row, base, tuned in zip(rows, before, after, strict=True)]
    share = {name: sum(row[name] == row["meaning"] for row in answered) / len(answered) for name in ("base", "tuned")}
    return {"exactMatch": share, "rows": answered}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the two models and write the answers."""
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

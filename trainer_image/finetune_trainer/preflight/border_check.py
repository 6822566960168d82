"""Looks where prompt and completion meet: whether the base model has seen such tokens beside each other.

Prompt and completion are tokenised separately, because the model gets the tokens of the prompt alone at inference. Most
tokenizers write a word with the space before it as one token. A prompt that ends with a space is therefore followed by
a token that never follows a space in running text, and a base model answers such prompts badly: docs/prompts.md has
figures. `row_check.py` asks for the training rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from finetune_core.api.dataset import PromptCompletionFormat
from finetune_trainer.data.examples import Example

MOST_EXAMPLES = 200
"""Number of examples that are looked at."""
LARGEST_SHARE = 0.1
"""A notice tells of a larger share of examples than this. A few such borders are ordinary, for example where an answer
begins with a bracket."""


def border_notices(examples: Iterable[Example], tokenizer: Any, form: PromptCompletionFormat, field: str) -> list[str]:
    """Return a notice where prompt and completion of many of the first ``examples`` meet at a place where running text
    has no border of tokens. ``tokenizer`` is the model's, and ``field`` the path of the rows in the spec."""
    found = [is_natural(example, tokenizer) for example in islice(examples, MOST_EXAMPLES)]
    known = [natural for natural in found if natural is not None]
    unnatural = known.count(False)
    if unnatural <= LARGEST_SHARE * len(known):
        return []
    return [
        f"{field}: in {unnatural} of {len(known)} rows the completion begins with another token than in running text,"
        f" which makes a base model worse (docs/prompts.md, Where prompt and completion meet); {_advice(form)}"
    ]


def _advice(form: PromptCompletionFormat) -> str:
    template = "dataset.format.promptCompletion.template"
    trimmed = form.template.rstrip(" \t")
    if trimmed == form.template:
        return f"change how {template} ends, or how the completion begins"
    completion = form.completion if form.completion is not None else "{completion}"
    return (
        f"{template} ends with {_named(form.template[len(trimmed) :])}: leave it out, and begin the completion with it"
        f' where the tokenizer does not add it itself (completion: "{form.template[len(trimmed) :]}{completion}")'
    )


def _named(space: str) -> str:
    return "a space" if space == " " else "a tab" if space == "\t" else "white space"


def is_natural(example: Example, tokenizer: Any) -> bool | None:
    """Return whether the text of ``example`` has the same tokens around the end of its prompt when it is tokenised as a
    whole. Return None where that can't be known, because text and tokens of the completion alone differ, as with
    control tokens that are read as text."""
    border, end = example.prompt_tokens, example.spans[-1][1]
    ids = [int(number) for number in example.ids]
    special = set(tokenizer.all_special_ids)
    first = next((index for index in range(border) if ids[index] not in special), border)
    while end > border and ids[end - 1] in special:
        end -= 1
    prompt, completion = ids[first:border], ids[border:end]
    if not prompt or not completion or _again(tokenizer, completion) != completion:
        return None
    kept = len(completion) + 1
    return _again(tokenizer, [*prompt, *completion])[-kept:] == [*prompt, *completion][-kept:]


def _again(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return the tokens of the text of ``ids``."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return again

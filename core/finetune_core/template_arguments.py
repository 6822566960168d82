"""`dataset.format.messages.templateArguments`: makes the values that a chat template gets, and checks what can be
checked without the template. The operator, the trainer and `finetune validate` use this module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables that the trainer or transformers gives to every template. No argument may have one of these names."""
FUNCTIONS = ("raise_exception", "strftime_now")
"""Functions that a template may call. No argument may have one of these names."""
PARAMETERS = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "documents",
    "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
    "tokenize", "tokenizer_kwargs", "tools", "truncation",
)  # fmt: skip
"""Parameters of the functions of transformers that render a template. An argument with such a name would not reach the
template. The trainer also refuses the parameters of a tokenizer's own functions."""
RESERVED = frozenset({*GIVEN, *FUNCTIONS, *PARAMETERS})
"""Names that no argument may have, whatever the model."""
ALMOST_JSON = {"true": "true", "false": "false", "null": "null", "none": "null"}
"""For each text that people may write by mistake for a JSON value, in lower case, the JSON value that they mean."""
TAKEN = "is set by the trainer"
"""Message about an argument whose name is reserved."""


def template_arguments(given: Mapping[str, str]) -> dict[str, Any]:
    """Return `templateArguments` as the values that the template gets. A text that is JSON becomes the JSON value, and
    any other text stays a text."""
    found: dict[str, Any] = {}
    for name, text in given.items():
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def value_problem(text: str) -> str:
    """Return why ``text`` can't be the value of an argument, as a phrase that follows the argument's path. Return an
    empty text where ``text`` can be the value."""
    meant = ALMOST_JSON.get(text.strip().lower())
    if meant is None or not isinstance(template_arguments({"": text})[""], str):
        return ""
    return f"must be {meant} as JSON writes it: {text!r} would be a text, which a template takes for true"

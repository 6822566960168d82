"""`dataset.format.messages.templateArguments`: the values that a chat template gets, and those checks of the arguments
that need no template. The operator, the trainer and `finetune validate` use this module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables that a template gets in any case, so that no argument may have their names."""
FUNCTIONS = ("raise_exception", "strftime_now")
"""Functions that a template may call, so that no argument may have their names."""
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
"""Texts that people write for JSON values, in lower case, each with the JSON value that is meant."""
TAKEN = "is set by the trainer"
"""What is wrong with an argument of a name that is reserved."""


def template_arguments(given: Mapping[str, str]) -> dict[str, Any]:
    """Return `templateArguments` as the values that the template gets. A text that is JSON becomes its value, and any
    other text stays a text."""
    found: dict[str, Any] = {}
    for name, text in given.items():
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def value_problem(text: str) -> str:
    """Return why ``text`` can't be the value of an argument, as a phrase that follows the argument's path; an empty
    text if it can."""
    meant = ALMOST_JSON.get(text.strip().lower())
    if meant is None or not isinstance(template_arguments({"": text})[""], str):
        return ""
    return f"must be {meant} as JSON writes it: {text!r} would be a text, which a template takes for true"

"""The chat template of a job: which template is used, and the text and token ids of a conversation that it renders.
`preparation.py`, the evaluation and the preflight check call `use_chat_template`, and `tokenizer.py` makes a
`ChatTemplate`.

A template is a program from the model's folder or from the job. It runs in the sandbox of transformers, and in a
process that bounds its time and its memory (`template_process.py`).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_core.api.dataset import DatasetFormat
from finetune_core.errors import UserError, valid_text
from finetune_core.template_arguments import FUNCTIONS, GIVEN, TAKEN, value_problem
from finetune_trainer.data.chat.row_texts import RowTexts
from finetune_trainer.data.chat.template_process import SECONDS, TemplateLimitError, TemplateProcess
from finetune_trainer.data.piece_tokens import PieceTokenizer
from finetune_trainer.pod.errors import first_line, library_boundary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = SECONDS
"""Largest processor time in seconds that a template may take to render one conversation."""
LONGEST_TEXT = 4 * 1024 * 1024
"""Largest number of characters of a rendered conversation: 32 for each token of the longest example that
`dataset.maxLength` can allow, 131,072 tokens."""
TEMPLATE_FIELD = "dataset.format.messages.chatTemplate"
ARGUMENTS_FIELD = "dataset.format.messages.templateArguments"
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token for one byte in tokenizers such as that of Llama 2, for example `<0x0A>`."""
TAG = re.compile(r"<[^<>\s'\"{}%]{1,60}>|\[/?[A-Z_]{1,40}\]")
"""A tag in the source of a template, such as `</think>` or `[INST]`."""
NOTHING = "(?!)"
"""A regular expression that finds nothing."""
DATE_LETTERS = "aAbBcdDeFGhHIjklmMnpPrRsStTuUVwWxXyYzZ%"
"""Letters that follow `%` in the format of a date (man 3 strftime), and `%` itself, because `%%` stands for one `%`."""
DATE_FLAGS = "-_0^#"
"""Characters that may be between `%` and the letter."""


def use_chat_template(tokenizer: PreTrainedTokenizerBase, form: DatasetFormat, folder: Path) -> None:
    """Give ``tokenizer`` the chat template that the job names, so that the artifact has the template too. If the job
    names no template, the tokenizer keeps the one that it has. ``folder`` is the folder of the base model. Nothing
    happens if the rows in the format ``form`` are no conversations.

    Raises UserError if the template's file can't be read, if there is no template, if the template is no Jinja, or if
    one of `templateArguments` can't be given to it, for example because the template does not read this argument.
    """
    if form.messages is None:
        return
    chosen = form.messages.chat_template
    if chosen is not None and chosen.file is not None:
        path = folder / chosen.file
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            found = ", ".join(sorted(file.name for file in folder.glob("*.jinja"))) or "none"
            raise UserError(f"{TEMPLATE_FIELD}.file", f"the model has no {chosen.file} (templates: {found})") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{TEMPLATE_FIELD}.file", f"{chosen.file} can't be read: {first_line(error)}") from error
    elif chosen is not None and chosen.text is not None:
        tokenizer.chat_template = chosen.text
    if tokenizer.chat_template is None:
        raise UserError(
            "dataset.format.messages",
            "the model's tokenizer has no chat template; name one in chatTemplate, take a model that has one, or use"
            " promptCompletion",
        )
    known, taken = _variables_of_all(tokenizer), taken_names(tokenizer)
    for name, text in form.messages.template_arguments.items():
        if problem := value_problem(text) or argument_problem(name, known, taken):
            raise UserError(f"{ARGUMENTS_FIELD}.{name}", problem)


def _variables_of_all(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the names of the variables that the chat templates read. A tokenizer may have several named templates. Of
    them, transformers uses one for rows with tools and one for all other rows, and only these two count. Raises
    UserError if one of the two is no Jinja, or if none of several named templates has the name `default`."""
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(
            "dataset.format.messages",
            f"the model has the chat templates {names} and none with the name default; give one in chatTemplate",
        )
    texts = _templates(tokenizer)
    if not all(isinstance(text, str) for text in texts):
        raise UserError("dataset.format.messages", "the chat template of the model's tokenizer must be a text")
    return frozenset[str]().union(*(_variables(text) for text in texts))


def _templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the templates for rows without tools and with tools."""
    with_tools: list[dict[str, Any]] = [{}]
    return [tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=with_tools)]


def tags_of(templates: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern with one group that finds the tags that the source of one of ``templates`` has, such as
    `<think>` and `[INST]`. Templates look for them in the texts of messages."""
    tags = {tag for template in templates for tag in TAG.findall(template)}
    # A longer tag comes first, because the first alternative that fits is taken.
    found = "|".join(re.escape(tag) for tag in sorted(tags, key=lambda tag: (-len(tag), tag)))
    return re.compile(f"({found or NOTHING})")


def taken_names(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the names that no argument of a chat template may have: what the trainer or transformers gives to the
    template, and the parameters of transformers' own functions, which would take such an argument for themselves."""
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (tokenizer.apply_chat_template, render_jinja_template)
    parameters = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(parameters - {"kwargs"}) | {*GIVEN, *FUNCTIONS}


def argument_problem(name: str, variables: frozenset[str], taken: frozenset[str]) -> str:
    """Return why a template that reads ``variables`` can't get the argument ``name``; an empty text if it can.
    ``taken`` are the names that no argument may have."""
    if name in taken:
        return TAKEN
    if name not in variables:
        others = ", ".join(sorted(variables - taken)) or "none"
        return f"is not read by the chat template, which reads {others}"
    return ""


def _variables(template: str) -> frozenset[str]:
    # Jinja is imported only here, because the launcher imports this module and parses no template.
    from finetune_trainer.data.chat.template_variables import template_variables

    return template_variables(template, TEMPLATE_FIELD)


class ChatTemplate:
    """Renders conversations with the chat template of a tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pieces: PieceTokenizer,
        *,
        ends: Sequence[int],
        today: date | None = None,
        added_tokens: Sequence[str] = (),
    ) -> None:
        """Use the chat template that ``tokenizer`` has, and tokenise with ``pieces``. ``ends`` are the ids of the
        tokens at which generation stops, and ``today`` is the date that the template gets; None means the real one.
        ``added_tokens`` (`model.addedTokens`) are read as tokens even in the texts of a row."""
        self._tokenizer = tokenizer
        self._pieces = pieces
        prelude = _date_macro(today) if today is not None else ""
        self._process = TemplateProcess(partial(_render, tokenizer, prelude), seconds=RENDER_SECONDS)
        self.ends = frozenset(ends)
        words = {tokenizer.unk_token_id, *(n for n, text in pieces.control_tokens.items() if BYTE.fullmatch(text))}
        self.special = (frozenset(pieces.control_tokens) - words) | self.ends
        """Ids of control tokens, such as those that end a turn. The token for unknown words and the tokens for single
        bytes are not among them, because ordinary text becomes such tokens."""
        self._blank: dict[int, bool] = {}
        """Results of `is_blank` by token id. They are kept, because a template may write millions of spaces."""
        self.row_texts = RowTexts(pieces, added_tokens)
        self._taken = taken_names(tokenizer)
        self.tags = tags_of(_templates(tokenizer))
        """Finds, in the text of a message, the tags by which a template may treat messages differently, such as
        `</think>`. The pattern has one group, the tag."""

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        *,
        answer_next: bool,
    ) -> str:
        """Return the text of a conversation. With ``answer_next`` it ends with the generation prompt, which is the text
        that the template puts before an answer.

        Raises ValueError with the reason if the template fails, and UserError if the template takes too much time or
        memory.
        """
        given = [dict(tool) for tool in tools] or None
        try:
            text: str = self._process.call([dict(message) for message in messages], given, dict(arguments), answer_next)
        except TemplateLimitError as error:
            raise UserError("dataset.format.messages", f"the chat template {error} for one row") from None
        if valid_text(text) != text:
            raise ValueError("it makes half of a surrogate pair, which is no text")
        return text

    def end(self) -> None:
        """End the process that renders the template. The next call of `text` starts another one."""
        self._process.end()

    def ids(self, text: str) -> list[int]:
        """Return the token ids of rendered text, to which no special tokens are added. Control tokens that `row_texts`
        has marked are read as ordinary text. Raises RowError if the text can't be tokenised, or if a marked token can't
        be read as ordinary text."""
        return list(self._pieces.follow(self.row_texts.pieces(text)).ids)

    def is_blank(self, token: int) -> bool:
        """Return whether the text of the token ``token`` is empty or only white space. Raises ValueError if the
        tokenizer can't decode the token."""
        if token not in self._blank:
            with library_boundary(lambda error: ValueError(first_line(error))):
                text = str(self._tokenizer.decode([token]))
            self._blank[token] = not text.strip()
        return self._blank[token]

    def argument_problem(self, name: str, tools: Sequence[Mapping[str, Any]]) -> str:
        """Return why the template can't get the argument ``name`` for a row with ``tools``; an empty text if it can."""
        template: str = self._tokenizer.get_chat_template(None, [dict(tool) for tool in tools] or None)
        return argument_problem(name, _variables(template), self._taken)


def _date_macro(today: date) -> str:
    """Return a Jinja macro that takes the place of transformers' function `strftime_now`, and always shows the date
    ``today`` at 0:00.

    The line break behind the macro is no part of the rendered text, because transformers removes the first line break
    after a block.
    """
    codes = [f"%{flag}{letter}" for letter in DATE_LETTERS for flag in ("", *DATE_FLAGS)]
    values = json.dumps({code: today.strftime(code) for code in codes})
    return (
        "{% macro strftime_now(format) %}{% set values = " + values + " %}{% set ns = namespace(text='', code='') %}"
        "{% for letter in format %}{% if ns.code and letter not in '" + DATE_FLAGS + "' %}"
        "{% set ns.text = ns.text + values.get(ns.code + letter, ns.code + letter) %}{% set ns.code = '' %}"
        "{% elif ns.code or letter == '%' %}{% set ns.code = ns.code + letter %}"
        "{% else %}{% set ns.text = ns.text + letter %}{% endif %}{% endfor %}{{ ns.text }}{% endmacro %}\n"
    )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    prelude: str,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    arguments: dict[str, Any],
    answer_next: bool,
) -> str:
    """Return the rendering of a conversation by the template of ``tokenizer``, with ``prelude`` in front of it."""
    text: str = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=prelude + tokenizer.get_chat_template(None, tools),
        add_generation_prompt=answer_next,
        tokenize=False,
        **arguments,
    )
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"it makes {len(text)} characters of one row")
    return text

"""Parses a chat template, and finds the variables that it reads. `chat_template.py` calls `template_variables`."""

from __future__ import annotations

import functools

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from finetune_core.errors import UserError
from finetune_trainer.data.chat.template_process import SECONDS, TemplateLimitError, TemplateProcess


class _GenerationTag(Extension):
    """The tag `{% generation %}`, which templates put around answers. It does not change what is rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the parsed content between the tag and its end tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache
def template_variables(template: str, field: str) -> frozenset[str]:
    """Return the names of the variables that ``template`` reads. ``field`` is the path of the template in the spec.
    Raises UserError if ``template`` is no Jinja, if parsing it takes too much time or memory, or if the operator `**`,
    which no chat template needs, is found in it."""
    try:
        variables: frozenset[str] | None = TemplateProcess(_variables, seconds=SECONDS).call(template)
    except TemplateLimitError as error:
        raise UserError(field, f"is no chat template: it {error}") from error
    except ValueError as error:
        raise UserError(field, f"is no chat template: {error}") from error
    if variables is None:
        raise UserError(field, "must not use **, because no chat template needs it")
    return variables


def _variables(template: str) -> frozenset[str] | None:
    """Return the names of the variables that ``template`` reads, or None if the operator `**` is found in it."""
    environment = Environment(extensions=[_GenerationTag, loopcontrols])  # noqa: S701  (nothing is rendered)
    parsed = environment.parse(template)
    # While Jinja looks for the variables, it changes ``parsed``: the constant parts of larger expressions become their
    # values. So a `**` in such a part may not be found.
    variables = frozenset(meta.find_undeclared_variables(parsed))
    return variables if parsed.find(nodes.Pow) is None else None

"""Parses a chat template, and finds the variables that it reads. `chat_template.py` calls `template_variables`."""

from __future__ import annotations

import functools

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from finetune_core.errors import UserError
from finetune_trainer.pod.errors import first_line, library_boundary


class _GenerationTag(Extension):
    """The tag `{% generation %}`, which templates put around answers. It does not change what is rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache
def template_variables(template: str, field: str) -> frozenset[str]:
    """Return the names of the variables that ``template`` reads. Raises UserError if ``template`` is no Jinja, or if it
    raises to a power: a number such as 9 ** 9 ** 9 takes hours, which nothing can interrupt."""
    environment = Environment(extensions=[_GenerationTag, loopcontrols])  # noqa: S701  (nothing is rendered)
    # What Jinja raises for a text that is no template is not specified.
    with library_boundary(lambda error: UserError(field, f"is no chat template: {first_line(error)}")):
        parsed = environment.parse(template)
        variables = frozenset(meta.find_undeclared_variables(parsed))
    if parsed.find(nodes.Pow) is not None:
        raise UserError(field, "must not use **, because no chat template needs it")
    return variables

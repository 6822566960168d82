"""Finds what is wrong with the templates of a job: `template`, `completion`, `evaluation.basePrompt`, and the arguments
of a chat template. `runnable.py` calls `template_problems` and `argument_problems`.

The CEL rules of the schema refuse most wrong templates already. This module checks what CEL can't check: the nesting of
optional parts, and the templates of a job in relation to each other. The arguments of a chat template are checked here
and not by a CEL rule, so that the message can name the wrong argument.
"""

from __future__ import annotations

from finetune_core.api.dataset import PromptCompletionFormat
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.errors import UserError
from finetune_core.row_templates import RowTemplate, TemplateError, parse
from finetune_core.template_arguments import RESERVED, TAKEN, value_problem

FORMAT = "spec.dataset.format.promptCompletion"
BASE_PROMPT = "spec.evaluation.basePrompt"
ARGUMENTS = "spec.dataset.format.messages.templateArguments"


def template_problems(spec: FineTuneJobSpec) -> list[UserError]:
    """Return what is wrong with the templates of ``spec``, each with the field's path."""
    form = spec.dataset.format.prompt_completion
    if form is None:
        return []
    problems: list[UserError] = []
    base_prompt = spec.evaluation.base_prompt
    completion = "{completion}" if form.completion is None else form.completion
    written = ((f"{FORMAT}.template", form.template), (BASE_PROMPT, base_prompt), (f"{FORMAT}.completion", completion))
    parsed: dict[str, RowTemplate] = {}
    for path, text in written:
        if text is not None:
            try:
                parsed[path] = parse(text, form.aliases)
            except TemplateError as problem:
                problems.append(UserError(path, str(problem)))
    return problems or [*_answers_in_prompts(parsed), *_unused_fields(form, parsed)]


def argument_problems(spec: FineTuneJobSpec) -> list[UserError]:
    """Return what is wrong with the arguments of the chat template, each with the path of the argument. Whether the
    template reads an argument is not checked, because the template is not known here."""
    messages = spec.dataset.format.messages
    given = {} if messages is None else messages.template_arguments
    found = {name: value_problem(text) or (TAKEN if name in RESERVED else "") for name, text in given.items()}
    return [UserError(f"{ARGUMENTS}.{name}", problem) for name, problem in found.items() if problem]


def _answers_in_prompts(parsed: dict[str, RowTemplate]) -> list[UserError]:
    """Return a problem for each prompt template that shows all columns of the completion, because a prompt that is made
    from such a template contains the answer."""
    answer = parsed[f"{FORMAT}.completion"]
    return [
        UserError(path, "must not show every column of the completion: the prompt would give the answer away")
        for path, template in parsed.items()
        if template is not answer and answer.shown <= template.shown
    ]


def _unused_fields(form: PromptCompletionFormat, parsed: dict[str, RowTemplate]) -> list[UserError]:
    """Return a problem for `promptField` or `completionField` where no template uses the column that is set there."""
    read = {column for template in parsed.values() for column in template.columns}
    fields = (
        ("promptField", form.prompt_field, "prompt", "template"),
        ("completionField", form.completion_field, "completion", "completion"),
    )
    return [
        UserError(f"{FORMAT}.{field}", f"must be absent, because no template uses it: `{place}` holds no `{{{name}}}`")
        for field, column, name, place in fields
        if column != name and column not in read
    ]

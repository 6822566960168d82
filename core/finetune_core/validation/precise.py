"""Names the entry of a list or a map that violates a CEL rule.

A rule of the schema has one fixed message for all values. For the rules about `evaluation.require`,
`dataset.task.fields` and `resources.extended`, `finetune validate` also says which entry is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_core.api.evaluation import LOWER_IS_BETTER
from finetune_core.api.resources import EXTENDED_RULES
from finetune_core.api.spec import SCORE_RULE_MESSAGE
from finetune_core.api.task import FIELDS_RULE_BEGINNING
from finetune_core.tasks import TASKS
from finetune_core.validation.cel_rules import holds
from finetune_core.validation.problems import FieldPath, Problem

_EXTENDED = {message: rule for rule, message in EXTENDED_RULES}
"""The CEL rules about `resources.extended` by their messages. Each rule judges every entry by itself."""


def precise(problem: Problem, spec: dict[str, Any]) -> list[Problem]:
    """Return the problems to report in place of ``problem``, which says that ``spec`` violates a CEL rule. If the rule
    is about the names of the scores in `evaluation.require`, about the keys of `dataset.task.fields`, or about
    `resources.extended`, there is one problem for each wrong entry. For any other rule, ``problem`` itself is
    returned."""
    found: list[Problem] = []
    if problem.message == SCORE_RULE_MESSAGE:
        found = list(_scores(spec))
    elif problem.message.startswith(FIELDS_RULE_BEGINNING):
        found = list(_columns(problem, spec))
    elif rule := _EXTENDED.get(problem.message):
        entries = spec["resources"]["extended"].items()
        wrong = [name for name, amount in entries if not holds(rule, {name: amount})]
        found = [Problem((*problem.path, name), problem.message) for name in wrong]
    return found or [problem]


def _scores(spec: dict[str, Any]) -> Iterator[Problem]:
    task = TASKS.get(spec["dataset"].get("task", {}).get("name", ""))
    known = [*LOWER_IS_BETTER, *(task.score_names if task is not None else ())]
    for place, required in enumerate(spec["evaluation"]["require"]):
        if (score := required["score"]) not in known:
            yield Problem(
                ("spec", "evaluation", "require", place, "score"),
                "`evaluation.require` must only name scores that the job has, which are"
                f" {', '.join(known)}: {score} is none of them",
            )


def _columns(problem: Problem, spec: dict[str, Any]) -> Iterator[Problem]:
    task = spec["dataset"]["task"]
    known = {column.name for column in TASKS[task["name"]].columns}
    path: FieldPath = (*problem.path, "fields")
    for column in task["fields"]:
        if column not in known:
            yield Problem((*path, column), f"{problem.message}: `{column}` is no such key")

"""Replaces the regular expressions in `adapter_config.json` of a given adapter by names. peft compares such expressions
with names of modules by Python's `re`, whose time has no bound, and the author of an adapter may be anybody. This
module uses RE2 instead, which takes a time proportional to the length of a name.

`adapter_fit.py` calls `with_plain_names` before peft sees the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_core.errors import UserError
from finetune_core.patterns import compile_pattern
from finetune_core.target_modules import ALL_LINEAR, is_pattern
from finetune_trainer.model.adaptable import shortest_names
from finetune_trainer.model.given_adapter import FIELD
from finetune_trainer.pod.errors import one_line


def with_plain_names(config: Mapping[str, Any], names: Sequence[str], adapted: Sequence[str]) -> dict[str, Any]:
    """Return ``config``, the content of `adapter_config.json`, with names in place of all regular expressions. The
    result selects the same ones of ``names``, which are the full names of all modules of the base model. Modules that
    the adapter holds as a whole (`modules_to_save`) are excluded, as peft does. ``adapted`` are those of ``names`` for
    which the adapter has matrices.

    Raises UserError where RE2 can't read a regular expression, or where `target_modules` selects nothing.
    """
    plain = dict(config)
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if isinstance(targets, str) and targets != ALL_LINEAR:
        found = _fitting("target_modules", targets, names)
        if not found:
            raise UserError(
                FIELD, f"does not fit the base model: its target_modules {_shown(targets)} fits no module of the model"
            )
        plain["target_modules"] = shortest_names(found, names)
    if isinstance(excluded, str):
        plain["exclude_modules"] = _fitting("exclude_modules", excluded, names)
    if saved := config.get("modules_to_save"):
        kept = plain.get("exclude_modules") or []
        whole = [name for name in names if any(f".{module}." in f".{name}." for module in saved)]
        plain["exclude_modules"] = [*kept, *whole]
    for field in ("rank_pattern", "alpha_pattern"):
        if config.get(field):
            plain[field] = _by_name(field, config[field], adapted)
    return plain


def _by_name(field: str, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return ``values``, the content of ``field``, with keys that are safe in peft. The keys of ``values`` are ends of
    names, or regular expressions for such ends. Where one of them is a regular expression, or two may fit one name, the
    result has one key for each of ``names`` that a key fits, with the value of the first such key, as in peft.

    So the order of the keys in the result has no effect. peft sorts the keys when it saves a configuration.
    """
    ends = sorted(values)
    several = any(one.endswith(f".{other}") for one in ends for other in ends)
    if not several and not any(is_pattern(key) for key in values):
        return dict(values)
    found = _first_fitting(field, values, names)
    # peft reads each key as a regular expression for the end of a name. Each key made here fits one whole name.
    return {f"^{re.escape(name)}": value for name, value in found.items()}


def _first_fitting(field: str, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return for each name that a key of ``values`` fits the value of the first such key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        for name in _fitting(field, key, names, before=r"(?:.*\.)?"):
            found.setdefault(name, value)
    return found


def _fitting(field: str, text: str, names: Iterable[str], before: str = "") -> list[str]:
    """Return those of ``names`` that the regular expression ``text`` of ``field`` fits. ``before`` is a regular
    expression for what may stand before the part that ``text`` fits. Empty: ``text`` must fit a whole name."""
    try:
        pattern = compile_pattern(f"{before}(?:{text})", FIELD)
    except UserError as error:
        raise UserError(FIELD, f"its {field} {_shown(text)} {one_line(error.problem)}") from None
    return [name for name in names if pattern.fullmatch(name)]


def _shown(text: str) -> str:
    return one_line(text if len(text) <= 100 else f"{text[:100]}…")

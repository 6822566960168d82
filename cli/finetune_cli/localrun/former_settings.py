"""Compares a job with the runs that are in its folder already: whether this start goes on with them, and what differs
where it can't. `run_job.py` calls this module before the trainer starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from finetune_cli.compare.folders import RunFolder
from finetune_core.contract import RunConfig
from finetune_core.contract.same_training import NOT_THE_TRAINING, settings_digest
from finetune_core.errors import UserError
from finetune_core.layout import LOCAL_RUN

MORE_FIELDS = 3
"""How many changed fields a sentence names beside the first one at most."""
_SETTINGS = re.compile(r"settings/[0-9]{6,}\.json")
_RUN_ID = re.compile(rf"{LOCAL_RUN}(?:-([0-9]{{1,6}}))?")
_NOT_COMPARED = frozenset(".".join(map(to_camel, path.split("."))) for path in NOT_THE_TRAINING)


def run_id_of(names: Iterable[str], *, fresh: bool) -> str:
    """Return the name of the folder of the runs, where the job sets no `storage.runId`. ``names`` are the folders that
    are there: the newest one is used, or the next one where ``fresh`` is true."""
    numbers = [int(match[1] or 1) for name in names if (match := _RUN_ID.fullmatch(name)) is not None]
    newest = max(numbers, default=0)
    number = newest + 1 if fresh else max(1, newest)
    return LOCAL_RUN if number == 1 else f"{LOCAL_RUN}-{number}"


def former_settings(folder: RunFolder) -> RunConfig | None:
    """Return the run file of the newest run in ``folder``. None where there is none, or where another version wrote
    it."""
    keys = [item.key for item in folder.list_objects() if _SETTINGS.fullmatch(item.key)]
    data = folder.read(max(keys)) if keys else None
    try:
        return RunConfig.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None


def check_same_training(former: RunConfig, now: RunConfig, *, anew: str) -> None:
    """Raise UserError where ``now`` trains something else than ``former``, the run file of the newest run. ``anew``
    says how to train anew."""
    if settings_digest(former) == settings_digest(now):
        return
    first, *others = changed_fields(former, now)
    names = ", ".join(other.path for other in others[:MORE_FIELDS]) + (", …" if others[MORE_FIELDS:] else "")
    also = f", and so do {names}" if others else ""
    raise UserError(
        first.path,
        f"differs from the run in the store, which has {_shown(first.former)} and not {_shown(first.now)}{also}; that"
        f" run can't go on: {anew}",
    )


class ChangedField(NamedTuple):
    """A field of the run file with two values. None: the field is absent."""

    path: str
    former: Any
    now: Any


def changed_fields(former: RunConfig, now: RunConfig) -> list[ChangedField]:
    """Return the fields of the training that differ, such as `optimization.learningRate`."""
    old, new = _fields(former), _fields(now)
    return [
        ChangedField(path, old.get(path), new.get(path))
        for path in dict.fromkeys((*old, *new))
        if old.get(path) != new.get(path)
    ]


def _fields(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _collect(json.loads(config.to_json()), "", found)
    return found


def _collect(value: Any, path: str, found: dict[str, Any]) -> None:
    """Add the fields below ``value`` to ``found``, without those that do not define the training."""
    if path in _NOT_COMPARED:
        return
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            _collect(item, f"{path}.{name}" if path else name, found)
    elif value is not None:
        found[path] = value


def _shown(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"

"""Compares a job with the runs that are in its folder already: whether this start goes on with them, and what differs
where it can't. `run_job.py` calls this module before the trainer starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from finetune_cli.compare.folders import RunFolder
from finetune_core.contract import RunConfig
from finetune_core.contract.same_training import NOT_THE_TRAINING, settings_digest
from finetune_core.errors import UserError

RUN_ID = "local"
"""Name of the folder of the runs, where the job sets no `storage.runId`. `--fresh` begins `local-2` and so on."""
SHOWN_FIELDS = 3
"""Largest number of changed fields that a sentence names."""
_SETTINGS = re.compile(r"settings/[0-9]{6,}\.json")
_RUN_ID = re.compile(rf"{RUN_ID}(?:-([0-9]{{1,6}}))?")
_NOT_COMPARED = frozenset(".".join(map(to_camel, path.split("."))) for path in NOT_THE_TRAINING)


def run_id_of(names: Iterable[str], *, fresh: bool) -> str:
    """Return the name of the folder of the runs. ``names`` are the folders that are there: the newest one is used, or
    the next one where ``fresh`` is true."""
    numbers = [int(match[1] or 1) for name in names if (match := _RUN_ID.fullmatch(name)) is not None]
    newest = max(numbers, default=0)
    number = newest + 1 if fresh else max(1, newest)
    return RUN_ID if number == 1 else f"{RUN_ID}-{number}"


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
    changed = changed_fields(former, now)
    told = "; ".join(changed[:SHOWN_FIELDS]) + (f"; and {len(changed) - SHOWN_FIELDS} more" if changed[3:] else "")
    raise UserError(
        changed[0].partition(" ")[0],
        f"differs from the run that is in the store already ({told}), so that run can't go on: {anew}",
    )


def changed_fields(former: RunConfig, now: RunConfig) -> list[str]:
    """Return the fields of the training that differ, each with both values, such as
    `optimization.learningRate 0.001 -> 0.002`."""
    old, new = _fields(former), _fields(now)
    return [
        f"{path} {_shown(old.get(path))} -> {_shown(new.get(path))}"
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

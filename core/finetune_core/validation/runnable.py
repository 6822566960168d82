"""What the schema accepts and the operator can't run: called by `resolve`, so that the job ends with
`Accepted=False` and the field's path, and by `finetune validate`.

`NOT_YET` is the one list of what this version does not honour; a change that teaches the trainer or the operator a
field removes its line.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.errors import UserError
from finetune_core.planning.training_plan import process_share
from finetune_core.validation.overrides import override_problems


@dataclass(frozen=True, slots=True)
class NotYet:
    """A field of which this version honours only some values."""

    path: str
    """Below `spec`."""
    honoured: tuple[Any, ...]
    """Values that can be run; None: absent."""
    must: str
    """What the field must be, as the sentence goes on after `must`."""


NOT_YET_REASON = "this version of the operator can't run anything else"

NOT_YET = (NotYet("tracking", (None,), "be absent"),)


def unrunnable(spec: FineTuneJobSpec) -> list[UserError]:
    """Return why ``spec`` can't be run, each with the field's path; empty where it can."""
    problems = override_problems(spec.deepspeed.overrides) if spec.deepspeed.overrides is not None else []
    memory, shared = to_bytes(spec.resources.memory), to_bytes(spec.resources.shared_memory)
    if shared >= memory:
        problems.append(
            UserError("spec.resources.sharedMemory", f"must be less than `memory`, which is {spec.resources.memory}")
        )
    problems += _too_small_share(spec)
    stored = spec.to_json()
    for field in NOT_YET:
        if _value(stored, field.path) not in field.honoured:
            problems.append(UserError(f"spec.{field.path}", f"must {field.must}: {NOT_YET_REASON}"))
    return problems


def _too_small_share(spec: FineTuneJobSpec) -> list[UserError]:
    """A micro-batch is at most the share of one process in the global batch."""
    requested, total = spec.training.micro_batch_size, spec.training.global_batch_size
    processes = spec.resources.processes
    share = process_share(total, processes)
    if requested is None or requested <= share:
        return []
    sentence = f"must be at most {share}, the share of one of {processes} processes in a globalBatchSize of {total}"
    return [UserError("spec.training.microBatchSize", sentence)]


def _value(node: Any, path: str) -> Any:
    """Return what lies at ``path``, None where nothing does."""
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def to_bytes(quantity: int | str) -> int:
    """Return a memory quantity of the schema's form in bytes."""
    if isinstance(quantity, int):
        return quantity
    unit = quantity.lstrip("0123456789.")
    number = Decimal(quantity.removesuffix(unit))
    return int(number * _UNITS.get(unit, 1))

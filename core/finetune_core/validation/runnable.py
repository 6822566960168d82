"""Finds the reasons why the operator can't run a job that the schema accepts.

`resolve.py`, the operator's `reconcile.py` and `finetune validate` call `unrunnable`. In the cluster, a job for which
`unrunnable` finds a problem before an attempt has ended gets `Accepted=False` and ends. The message names the field's
path. `NOT_YET` lists the fields of which this version does not support all values. Remove the entry of a field when you
add support for all its values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from finetune_core.api.resources import DEFAULT_MEMORY, HUGE_PAGES, ResourcesSpec
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.errors import UserError
from finetune_core.planning.gpu_types import type_of_product
from finetune_core.planning.training_plan import process_share
from finetune_core.task_declaration import Unit
from finetune_core.tasks import TASKS
from finetune_core.validation.overrides import override_problems
from finetune_core.validation.templates import argument_problems, template_problems


@dataclass(frozen=True, slots=True)
class NotYet:
    """A field of which this version supports only some values."""

    path: str
    """Path of the field below `spec`, for example `tracking`."""
    honoured: tuple[Any, ...]
    """The supported values of the field. If None is one of these values, the field may be absent."""
    must: str
    """What the field must be, in the words that follow "must" in a message, for example `be absent`."""


_HUGE_PAGES = re.compile(f"{HUGE_PAGES}([1-9][0-9]*)([KMG]i)")
NOT_YET_REASON = "this version of the operator can't run anything else"

NOT_YET = (NotYet("tracking", (None,), "be absent"),)
"""The fields that are in the schema although this version does not support all of their values."""


def unrunnable(spec: FineTuneJobSpec) -> list[UserError]:
    """Return the reasons why ``spec`` can't be run, each with the field's path. The list is empty when ``spec`` can be
    run."""
    problems = override_problems(spec.deepspeed.overrides) if spec.deepspeed.overrides is not None else []
    problems += _too_large_shared_memory(spec.resources)
    problems += _page_problems(spec.resources.extended)
    problems += _number_format_problems(spec)
    problems += _too_small_share(spec)
    problems += _attention_problems(spec)
    problems += template_problems(spec) + argument_problems(spec)
    problems += _scores_out_of_reach(spec)
    stored = spec.to_json()
    for field in NOT_YET:
        if _value(stored, field.path) not in field.honoured:
            problems.append(UserError(f"spec.{field.path}", f"must {field.must}: {NOT_YET_REASON}"))
    return problems


def _page_problems(extended: Mapping[str, int | str]) -> list[UserError]:
    """Return a problem for each amount of huge pages in ``extended`` that is no multiple of the size of a page. The API
    server accepts the job, and would refuse its pods."""
    problems = []
    for name, amount in extended.items():
        page = _HUGE_PAGES.fullmatch(name)
        if page is not None and to_bytes(amount) % to_bytes(page[1] + page[2]):
            sentence = f"must be a multiple of {page[1]}{page[2]}, such as {4 * int(page[1])}{page[2]}"
            problems.append(UserError(f"spec.resources.extended.{name}", sentence))
    return problems


def _number_format_problems(spec: FineTuneJobSpec) -> list[UserError]:
    """Return a list with one problem where the GPUs of `resources.gpuProduct` are known to have no bf16, and the job
    computes in bf16. Otherwise return an empty list."""
    resources = spec.resources
    gpu = type_of_product(resources.gpu_product) if resources.device == "GPU" else None
    if gpu is None or gpu.bf16 or spec.training.precision != "bf16":
        return []
    if not gpu.kernels:
        sentence = (
            f"must name newer GPUs: {resources.gpu_product} has no bf16, and torch in the trainer image has no kernels"
            " for it"
        )
        return [UserError("spec.resources.gpuProduct", sentence)]
    sentence = (
        f"must be fp32 on {resources.gpu_product}, which has no bf16, and there is no fp16; or name GPUs of the"
        " generation Ampere or newer in resources.gpuProduct"
    )
    return [UserError("spec.training.precision", sentence)]


def _too_large_shared_memory(resources: ResourcesSpec) -> list[UserError]:
    """Return a list with one problem where /dev/shm may be as large as the memory of the pod. Otherwise return an empty
    list. Where the job does not set the memory, nobody knows before the preflight check whether there will be a plan,
    so the memory of a pod without a plan counts."""
    memory = DEFAULT_MEMORY if resources.memory is None else resources.memory
    if to_bytes(resources.shared_memory) < to_bytes(memory):
        return []
    which = f"which is {memory}" if resources.memory is not None else f"which may be {memory} where it is absent"
    return [UserError("spec.resources.sharedMemory", f"must be less than `memory`, {which}")]


def _too_small_share(spec: FineTuneJobSpec) -> list[UserError]:
    """Return a list with one problem where the requested micro-batch is larger than one process's share of the global
    batch. Otherwise return an empty list."""
    requested, total = spec.training.micro_batch_size, spec.training.global_batch_size
    processes = spec.resources.processes
    share = process_share(total, processes)
    if requested is None or requested <= share:
        return []
    sentence = f"must be at most {share}, the share of one of {processes} processes in a globalBatchSize of {total}"
    return [UserError("spec.training.microBatchSize", sentence)]


def _attention_problems(spec: FineTuneJobSpec) -> list[UserError]:
    """Return a list with one problem where the kernel of `training.attention` can't compute on the device of the job,
    in its number format, or for examples that are not packed. Otherwise return an empty list. Whether the model
    supports the kernel is not checked here, because only the trainer knows the model."""
    kernel, precision = spec.training.attention, spec.training.precision
    if kernel in ("Flash", "Flex") and spec.resources.device == "CPU":
        return [UserError("spec.training.attention", f"must not be {kernel} on CPUs: it trains on GPUs only")]
    if kernel == "Flash" and precision != "bf16":
        return [
            UserError("spec.training.attention", f"must not be Flash with precision {precision}: it computes in bf16")
        ]
    if kernel == "Flash" and not spec.dataset.packing:
        return [
            UserError(
                "spec.training.attention", "must not be Flash without dataset.packing: it computes packed examples"
            )
        ]
    return []


def _scores_out_of_reach(spec: FineTuneJobSpec) -> list[UserError]:
    """Return a problem for each score of `evaluation.require` that no model can reach. The scores of a job's own grader
    are not compared with the range from 0 to 1, because only the trainer knows which of them are shares."""
    task = TASKS.get(spec.dataset.task.name) if spec.dataset.task is not None and spec.dataset.task.name else None
    shares = {score.name for score in task.scores if score.unit is not Unit.VALUE} if task is not None else set()
    problems = []
    for place, requirement in enumerate(spec.evaluation.require or ()):
        if wrong := requirement.out_of_reach(is_share=requirement.score in shares):
            field, sentence = wrong
            problems.append(UserError(f"spec.evaluation.require[{place}].{field}", sentence))
    return problems


def _value(node: Any, path: str) -> Any:
    """Return the value at ``path``, or None when a key of the path is absent."""
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def to_bytes(quantity: int | str) -> int:
    """Return the number of bytes of a memory quantity, which is an integer or a string such as `1.5Gi`. The schema
    allows no other forms."""
    if isinstance(quantity, int):
        return quantity
    unit = quantity.lstrip("0123456789.")
    number = Decimal(quantity.removesuffix(unit))
    return int(number * _UNITS.get(unit, 1))
